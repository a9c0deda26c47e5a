// The host's side of the waiting inside a persistent kernel: what it waits with, and what it reports.
#pragma once

#include <cstring>
#include <string>

#include "../memory.h"
#include "layout.h"

namespace vla::cuda::head {

class Waits {
 public:
  Waits() : report_(kReportBytes) { std::memset(report_.data(), 0, kReportBytes); }

  // Table: of the persistent head or prefix.
  template <typename Table>
  void give(Table& t, Pool& pool) {
    t.counter = reinterpret_cast<unsigned*>(pool.take(kCounterWords * sizeof(unsigned)));
    t.report = reinterpret_cast<unsigned*>(report_.data());
    t.patience = kPatience;
    VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing memory");
  }

  // After a run has ended: throws where a wait in the kernel, "persistent ...", was given up.
  void check(const std::string& kernel) const {
    const auto* report = reinterpret_cast<const unsigned*>(report_.data());
    if (report[0] == 0) return;
    throw DeviceLost("cuda: " + kernel + ": " + std::to_string(report[0]) +
                     " waits outlasted 2 s, the first of kind " + std::to_string(report[8]) + " in phase " +
                     std::to_string(report[9]) + " of block " + std::to_string(report[10]) +
                     "; something else holds the GPU's multiprocessors: restart this process");
  }

 private:
  static constexpr int64_t kPatience = 2'000'000'000;  // nanoseconds that a wait between blocks may take
  static constexpr size_t kReportBytes = (8 + 8 * 64) * 4;
  Pinned report_;  // the kernel writes it, the host reads it after a run
};

}  // namespace vla::cuda::head
