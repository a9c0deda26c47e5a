// What the device's memory gives to a kernel that does nothing but copy: the ceiling of what is bound by
// bytes.
#include <algorithm>
#include <random>
#include <vector>

#include "plan.h"

namespace vla::cuda {

namespace {

constexpr int kCopies = 8, kThreads = 512, kAtOnce = 8;

// Each block copies pieces of kThreads * kAtOnce words; a thread has all of its reads on their way before it
// writes. Past the first-level cache, which would keep nothing.
__global__ void __launch_bounds__(kThreads) copy_words(uint4* to, const uint4* from, size_t words) {
  constexpr size_t kPiece = size_t{kThreads} * kAtOnce;
  for (size_t piece = blockIdx.x * kPiece; piece < words; piece += gridDim.x * kPiece) {
    uint4 v[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) v[i] = __ldcs(from + piece + i * kThreads + threadIdx.x);
    for (int i = 0; i < kAtOnce; ++i) __stcs(to + piece + i * kThreads + threadIdx.x, v[i]);
  }
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { VLA_CHECK(cudaEventCreate(&event), "making an event"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

}  // namespace

double copy_rate(const Context& context, size_t bytes) {
  constexpr size_t kPiece = sizeof(uint4) * kThreads * kAtOnce;
  bytes = std::max(bytes / kPiece, size_t{1}) * kPiece;
  Pool pool;
  std::byte *from = pool.take(bytes), *to = pool.take(bytes);
  std::vector<uint64_t> random(size_t{1} << 21);  // zeros would take less power, and power limits clocks
  std::mt19937_64 generator;
  for (uint64_t& v : random) v = generator();
  const size_t some = random.size() * sizeof(uint64_t);
  for (size_t at = 0; at < bytes; at += some) {
    VLA_CHECK(cudaMemcpyAsync(from + at, random.data(), std::min(some, bytes - at), cudaMemcpyHostToDevice,
                              context.stream),
              "filling memory");
  }
  const size_t words = bytes / sizeof(uint4);
  const auto pieces = static_cast<unsigned>(std::min<size_t>(bytes / kPiece, size_t{1} << 30));
  Event marks[kCopies + 1];
  VLA_CHECK(cudaEventRecord(marks[0].event, context.stream), "copying");
  for (int i = 0; i < kCopies; ++i) {
    copy_words<<<pieces, kThreads, 0, context.stream>>>(reinterpret_cast<uint4*>(to),
                                                        reinterpret_cast<const uint4*>(from), words);
    VLA_CHECK(cudaGetLastError(), "copying");
    VLA_CHECK(cudaEventRecord(marks[i + 1].event, context.stream), "copying");
  }
  VLA_CHECK(cudaStreamSynchronize(context.stream), "copying");
  float least = 0.0f;
  for (int i = 0; i < kCopies; ++i) {
    float milliseconds = 0.0f;
    VLA_CHECK(cudaEventElapsedTime(&milliseconds, marks[i].event, marks[i + 1].event), "copying");
    if (i == 0 || milliseconds < least) least = milliseconds;
  }
  return 2.0 * static_cast<double>(bytes) / (1e-3 * least);
}

}  // namespace vla::cuda
