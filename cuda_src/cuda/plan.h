// A script captured into one CUDA graph.
#pragma once

#include <map>
#include <memory>

#include "../device.h"
#include "dispatch.h"
#include "memory.h"

namespace vla::cuda {

struct Context {
  cudaStream_t stream = nullptr;
  int sms = 0, arch = 0;
  std::byte* scratch = nullptr;
  size_t scratch_bytes = 0;
  const std::map<const void*, Layout>* layouts = nullptr;

  Launch launch(int step, bool pdl) const {
    return {stream, step, sms, arch, pdl, scratch, scratch_bytes, 0};
  }
  Layout layout(const Op& op) const {
    const auto it = layouts->find(weight_of(op));
    return it == layouts->end() ? Layout::kRows : it->second;
  }
};

// Launches `ops` one after another; every launch but the first may overlap the end of the one before.
// `stable`: for each operation its Launch::stable_keys, or empty.
void enqueue(const std::vector<Op>& ops, const Context& context, int step, bool& first,
             const std::vector<int>& stable = {});

std::unique_ptr<Plan> capture(Script script, const Context& context);

}  // namespace vla::cuda
