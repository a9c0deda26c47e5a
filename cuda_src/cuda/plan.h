// A script captured into one CUDA graph.
#pragma once

#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "../device.h"
#include "dispatch.h"
#include "filling.h"
#include "memory.h"

namespace vla::cuda {

// Weights in the layout of the persistent head, by their packed data and the phase's tile: prompt buckets
// share them.
using HeadWeights = std::map<std::tuple<const void*, int, int>, const uint16_t*>;

// The same of the persistent prefix, whose layout is the weight's alone.
using PrefixWeights = std::map<const void*, const uint16_t*>;

class PersistentLoop;
class PersistentLayers;
// Runs of operations before the loop that are one kernel each, in their order.
using AllLayers = std::vector<std::unique_ptr<PersistentLayers>>;

struct Context {
  cudaStream_t stream = nullptr;
  int sms = 0, arch = 0;
  std::byte* scratch = nullptr;
  size_t scratch_bytes = 0;
  float* squares = nullptr;  // Launch::squares
  Filling* filling = nullptr;
  const std::map<const void*, Layout>* layouts = nullptr;
  HeadWeights* head_weights = nullptr;  // outlives the plans
  PrefixWeights* prefix_weights = nullptr;

  Launch launch(int step, bool pdl) const {
    return {.stream = stream,
            .step = step,
            .sms = sms,
            .arch = arch,
            .pdl = pdl,
            .scratch = scratch,
            .scratch_bytes = scratch_bytes,
            .squares = squares};
  }
  Layout layout(const Op& op) const {
    const auto it = layouts->find(weight_of(op));
    return it == layouts->end() ? Layout::kRows : it->second;
  }
};

// What a plan knows of an operation of the loop beside the operation.
struct Known {
  int stable_keys = 0;           // see Launch
  bool norm_constant = false;    // see Launch
  const float* shift = nullptr;  // of step 0; the others follow
  int64_t shift_step = 0;        // floats
};

// Launches `ops` one after another; every launch but the first may overlap the end of the one before.
// `known`: of each operation, or empty. `parts`: of the sums of squares left by the last launch
// (Launch::square_parts), in and out.
struct Sequence {
  bool first = true;
  int parts = 0;
};
void enqueue(const std::vector<Op>& ops, const Context& context, int step, Sequence& at,
             const std::vector<Known>& known = {});

// Seconds of each operation, `before`, `body` (all steps together) and `after`, from runs of the whole of
// them.
std::vector<double> profile(const Script& script, const Context& context, const std::vector<Known>& known,
                            PersistentLoop* loop, const AllLayers& layers);

// Bytes a second, read and written, of the quickest of a few copies of `bytes` within the device's memory.
double copy_rate(const Context& context, size_t bytes);

// The whole loop as one kernel (head/plan.cc).
class PersistentLoop {
 public:
  virtual ~PersistentLoop() = default;
  virtual void enqueue(cudaStream_t stream) = 0;
  // After a run has ended: throws where a wait in the kernel was given up.
  virtual void check() const = 0;
};
// nullptr where the loop is not one that the kernel can express, or the device not one that it runs on.
std::unique_ptr<PersistentLoop> persistent_loop(const Script& script, const Context& context,
                                                const std::vector<Known>& known, Pool& pool);

// Layers that come before the loop, operations [begin, end), as one kernel.
class PersistentLayers : public PersistentLoop {
 public:
  PersistentLayers(size_t begin, size_t end) : begin(begin), end(end) {}
  const size_t begin, end;
};
// Those of a small prefix (prefix/plan.cc), and of the vision encoder (vision/plan.cc); nullptr as above.
std::unique_ptr<PersistentLayers> persistent_prefix(const Script& script, const Context& context, Pool& pool);
std::unique_ptr<PersistentLayers> persistent_vision(const Script& script, const Context& context, Pool& pool);

// Launches what comes before the loop, what is in `layers` as one kernel each.
void enqueue_before(const Script& script, const Context& context, const AllLayers& layers, Sequence& at);

// `pool` takes tables that live as long as the device.
std::unique_ptr<Plan> capture(Script script, const Context& context, Pool& pool);

}  // namespace vla::cuda
