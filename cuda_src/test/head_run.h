// Running the persistent head in the tests: its counter, the report of waits that were given up, times of its
// phases.
#pragma once

#include "../cuda/head/build.h"
#include "../cuda/head/head.h"
#include "harness.h"

namespace vla::test {

using cuda::head::Kind;
using cuda::head::Phase;
using cuda::head::Table;

constexpr int kReportWords = 8 + 8 * 64;

inline const char* kind_name(Kind kind) {
  static const char* const names[] = {"qkv", "gated", "attention", "linear", "euler"};
  return names[static_cast<int>(kind)];
}

// What a table needs beside the operations' memory.
class Extras {
 public:
  Extras() {
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&counter_), cuda::head::kCounterWords * 4));
    TEST_CUDA(cudaMallocHost(reinterpret_cast<void**>(&report_), kReportWords * 4));  // as in a plan
    clear();
  }
  ~Extras() { cudaFree(counter_), cudaFreeHost(report_), cudaFree(stamps_); }
  Extras(const Extras&) = delete;
  Extras& operator=(const Extras&) = delete;

  void give(Table& t, bool stamps = false) {
    t.counter = counter_, t.report = report_, t.stamps = nullptr, t.patience = 2'000'000'000;
    if (!stamps) return;
    const size_t bytes = size_t(t.phases) * t.steps * 4 * 8;
    cudaFree(stamps_);
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&stamps_), bytes));
    TEST_CUDA(cudaMemset(stamps_, 0, bytes));
    t.stamps = stamps_;
  }
  void clear() { TEST_CUDA(cudaMemset(report_, 0, kReportWords * 4)); }
  // True where no wait was given up; else says which.
  bool well(const Table& t, const std::string& what) {
    std::vector<unsigned> r(kReportWords);
    TEST_CUDA(cudaMemcpy(r.data(), report_, r.size() * 4, cudaMemcpyDeviceToHost));
    if (r[0] == 0) return true;
    static const char* const names[] = {"?",
                                        "weights in slot",
                                        "room in slot",
                                        "x",
                                        "sums of group",
                                        "keys (0 prefix, 1 fresh)",
                                        "its own products",
                                        "all blocks to reach"};
    std::printf("GAVE UP %s: %u waits\n", what.c_str(), r[0]);
    for (unsigned i = 0; i < r[0] && i < 24; ++i) {
      const unsigned* l = &r[8 + 8 * i];
      const int at = l[1] == 0 ? -1 : int((l[1] - 1) % t.phases);
      const int warp = int(l[3] / 32);
      std::printf(
          "  block %u (rank %u of cluster %u) %s, phase %u = step %d, number %d (%s): waits for %s %u, has "
          "%u\n",
          l[2], l[2] % cuda::head::kCluster, l[2] / cuda::head::kCluster,
          warp == cuda::head::kFeeder   ? "feeder"
          : warp == cuda::head::kLoader ? "loader"
          : warp < 4                    ? "warpgroup 0"
                                        : "warpgroup 1",
          l[1], l[1] == 0 ? -1 : int((l[1] - 1) / t.phases), at,
          at < 0 ? "before the loop" : kind_name(t.phase[at].kind), names[l[0] < 8 ? l[0] : 0], l[4], l[5]);
    }
    clear();
    return false;
  }
  std::vector<int64_t> stamps(const Table& t) const {
    std::vector<int64_t> s(size_t(t.phases) * t.steps * 4);
    TEST_CUDA(cudaMemcpy(s.data(), stamps_, s.size() * 8, cudaMemcpyDeviceToHost));
    return s;
  }

 private:
  unsigned *counter_ = nullptr, *report_ = nullptr;
  int64_t* stamps_ = nullptr;
};

}  // namespace vla::test
