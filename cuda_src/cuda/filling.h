// Filling a large input: slices of the caller's memory go through pinned memory to the device, each as soon
// as it is copied, so that what is left when the last is copied is the transfer of one slice.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../cpu/threads.h"
#include "check.h"

namespace vla::cuda {

// As memcpy, past the cache: what is written is read next by the device, and a line that is to be overwritten
// is not read first.
inline void copy_past_cache(std::byte* to, const std::byte* from, size_t bytes) {
#if defined(__SSE2__)
  const size_t head = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64;
  if (bytes > head + 64) {
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
      __m128i v[4];
      for (int i = 0; i < 4; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
      for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, v[i]);
    }
    _mm_sfence();
  }
#endif
  std::memcpy(to, from, bytes);
}

// One for a device, whose plans share memory: what one has sent, a run of another may overwrite.
class Filling {
 public:
  // Slices of about this many bytes: smaller ones keep the copy engine busy for longer than the copies take.
  static constexpr size_t kSlice = size_t{128} << 10;

  explicit Filling(int threads) : count_(threads) {}

  static size_t slices(size_t bytes) { return (bytes + kSlice - 1) / kSlice; }
  void reserve(size_t slices) { slices_.reserve(slices); }

  // Ends what is under way. Then add() for each piece and begin() once.
  void clear() {
    if (threads_) threads_->finish();
    slices_.clear();
    error_ = cudaSuccess;
    sent_ = nullptr;
  }
  void add(const std::byte* from, std::byte* pinned, std::byte* device, size_t bytes) {
    if (bytes == 0) return;
    const size_t each = (bytes / slices(bytes) + kAlign) / kAlign * kAlign;
    for (size_t at = 0; at < bytes; at += each) {
      slices_.push_back({from + at, pinned + at, device + at, each < bytes - at ? each : bytes - at});
    }
  }
  void begin(cudaStream_t stream, const void* input) {
    stream_ = stream;
    sent_ = input;
    if (slices_.empty()) return;
    // made here, with the priority of who infers: who loads a policy may have a lower one
    if (!threads_) threads_.emplace(count_, Threads::Bound::kNowhere);
    threads_->start(static_cast<int>(slices_.size()), send_);
  }
  // The caller copies too; returns when every slice is on its way in the stream.
  void finish() {
    if (threads_) threads_->finish();
    const cudaError_t error = error_.exchange(cudaSuccess);
    if (error != cudaSuccess) sent_ = nullptr;
    VLA_CHECK(error, "copying an input");
  }
  // The input that was sent since the last run of any plan; none after this.
  const void* take() {
    finish();
    return std::exchange(sent_, nullptr);
  }

 private:
  static constexpr size_t kAlign = 4096;

  struct Slice {
    const std::byte* from;
    std::byte *pinned, *device;
    size_t bytes;
  };
  struct Send {
    Filling* of;
    void operator()(int item, int) const {
      const Slice& s = of->slices_[item];
      copy_past_cache(s.pinned, s.from, s.bytes);
      const cudaError_t error =
          cudaMemcpyAsync(s.device, s.pinned, s.bytes, cudaMemcpyHostToDevice, of->stream_);
      if (error != cudaSuccess) of->error_ = error;
    }
  };

  cudaStream_t stream_ = nullptr;
  const void* sent_ = nullptr;
  std::vector<Slice> slices_;
  Send send_{this};
  std::atomic<cudaError_t> error_{cudaSuccess};
  int count_;
  std::optional<Threads> threads_;  // last: it ends first
};

}  // namespace vla::cuda
