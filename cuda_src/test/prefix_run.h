// Running the persistent prefix in its check and its timing: a case's memory on the device, its counter, the
// report of waits that were given up.
#pragma once

#include "../cuda/prefix/prefix.h"
#include "harness.h"
#include "prefix_case.h"

namespace vla::test {

using layers::Bits;
using layers::Kind;
using layers::Phase;
using layers::Prefix;
using layers::Table;
namespace pre = cuda::prefix;

inline const char* kind_name(Kind kind) {
  static const char* const names[] = {"prepare", "qkv", "attention", "linear", "gated", "project"};
  return names[static_cast<int>(kind)];
}

// A case's table and memory on the device.
class Copy {
 public:
  explicit Copy(Prefix& prefix) : prefix_(prefix), bytes_(prefix.heap().used) {
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&device_), bytes_));
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&counter_), cuda::head::kCounterWords * 4));
    TEST_CUDA(cudaMallocHost(reinterpret_cast<void**>(&report_), kReportWords * 4));  // as in a plan
    TEST_CUDA(cudaMemset(report_, 0, kReportWords * 4));
    send();
    table = std::make_unique<Table>(*prefix.table);
    Table& t = *table;
    move(t.k), move(t.v), move(t.squares), move(t.prefix), move(t.rope), move(t.positions), move(t.q_block),
        move(t.k_block);
    for (int i = 0; i < t.phases; ++i) {
      Phase& p = t.phase[i];
      move(p.x), move(p.w), move(p.out), move(p.next), move(p.cache_k), move(p.cache_v);
    }
    t.counter = counter_, t.report = report_, t.patience = 2'000'000'000;
  }
  ~Copy() { cudaFree(device_), cudaFree(counter_), cudaFree(stamps_), cudaFreeHost(report_); }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  template <typename T>
  void move(T*& p) const {
    const auto* at = reinterpret_cast<const std::byte*>(p);
    if (p == nullptr) return;
    if (at < prefix_.heap().base || at >= prefix_.heap().base + bytes_) {
      std::printf("a pointer that is not the case's\n");
      std::exit(2);
    }
    p = reinterpret_cast<T*>(device_ + (at - prefix_.heap().base));
  }
  void move(View& v) const { move(v.base); }
  void send() { TEST_CUDA(cudaMemcpy(device_, prefix_.heap().base, bytes_, cudaMemcpyHostToDevice)); }
  // NaN where results go.
  void poison() {
    for (View v : prefix_.results) {
      move(v);
      TEST_CUDA(cudaMemset2D(v.base, v.ld * 2, 0xff, v.cols * 2, v.rows));
    }
  }
  std::vector<Bits> bits(View v) const {
    move(v);
    std::vector<Bits> got(size_t(v.rows) * v.cols);
    TEST_CUDA(
        cudaMemcpy2D(got.data(), v.cols * 2, v.base, v.ld * 2, v.cols * 2, v.rows, cudaMemcpyDeviceToHost));
    return got;
  }
  std::vector<Bits> all() const {
    std::vector<Bits> every;
    for (const View& v : prefix_.results) {
      const std::vector<Bits> its = bits(v);
      every.insert(every.end(), its.begin(), its.end());
    }
    return every;
  }
  layers::Values values(const View& v) const {
    layers::Values all;
    for (const Bits b : bits(v)) all.push_back(double(layers::from_bits(b)));
    return all;
  }
  // An element of the hidden state as it comes.
  void set_input(float value) {
    View v = prefix_.input();
    move(v);
    const Bits b = layers::to_bits(value);
    TEST_CUDA(cudaMemcpy(v.base + ((v.rows - 2) * v.ld + 3) * 2, &b, 2, cudaMemcpyHostToDevice));
  }
  float first_input() const { return float(layers::Heap::get(prefix_.input(), prefix_.input().rows - 2, 3)); }

  void stamp() {
    const size_t bytes = size_t(table->phases) * 4 * 8;
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&stamps_), bytes));
    TEST_CUDA(cudaMemset(stamps_, 0, bytes));
    table->stamps = stamps_;
  }
  std::vector<int64_t> stamps() const {
    std::vector<int64_t> s(size_t(table->phases) * 4);
    TEST_CUDA(cudaMemcpy(s.data(), stamps_, s.size() * 8, cudaMemcpyDeviceToHost));
    return s;
  }
  // Waits for the kernel; false where a wait was given up.
  bool ended(const std::string& what) {
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
      std::printf("FAIL %s: %s\n", what.c_str(), cudaGetErrorString(error));
      std::exit(2);
    }
    if (report_[0] == 0) return true;
    std::printf("GAVE UP %s: %u waits\n", what.c_str(), report_[0]);
    for (unsigned i = 0; i < report_[0] && i < 24; ++i) {
      const unsigned* l = &report_[8 + 8 * i];
      const char* name = l[0] == 7    ? "all blocks to reach"
                         : l[0] == 16 ? "a stage in slot"
                         : l[0] == 17 ? "room in slot"
                                      : "the other block's sums";
      const unsigned warp = l[3] / 32;
      std::printf("  block %u %s, phase %u (%s): waits for %s %u, has %u\n", l[2],
                  warp == pre::kFeeder   ? "feeder"
                  : warp == pre::kLoader ? "loader"
                  : warp < 4             ? "warpgroup 0"
                                         : "warpgroup 1",
                  l[1], kind_name(table->phase[l[1]].kind), name, l[4], l[5]);
    }
    TEST_CUDA(cudaMemset(report_, 0, kReportWords * 4));
    return false;
  }
  bool run(const std::string& what) {
    TEST_CUDA(pre::launch(*table, nullptr));
    return ended(what);
  }

  std::unique_ptr<Table> table;

 private:
  static constexpr int kReportWords = 8 + 8 * 64;
  Prefix& prefix_;
  size_t bytes_;
  std::byte* device_ = nullptr;
  unsigned *counter_ = nullptr, *report_ = nullptr;
  int64_t* stamps_ = nullptr;
};

}  // namespace vla::test
