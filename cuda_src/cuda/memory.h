// Device and pinned host memory, allocated only while a policy loads.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "check.h"

namespace vla::cuda {

// Zeroed device memory, 256-byte aligned. Small pieces share blocks: a policy has hundreds of biases and
// norms.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (std::byte* block : blocks_) cudaFree(block);
  }

  std::byte* take(size_t bytes) {
    const size_t size =
        (bytes + kAlign - 1) / kAlign * kAlign + kAlign;  // a vector may read past a row's end
    if (size > kBlock / 4) return block(size);
    if (size > left_) {
      next_ = block(kBlock);
      left_ = kBlock;
    }
    std::byte* p = next_;
    next_ += size;
    left_ -= size;
    return p;
  }
  size_t bytes() const { return total_; }

 private:
  static constexpr size_t kAlign = 256, kBlock = size_t{8} << 20;

  std::byte* block(size_t size) {
    void* p = nullptr;
    VLA_CHECK(cudaMalloc(&p, size), "allocating " + std::to_string(size) + " bytes");
    blocks_.push_back(static_cast<std::byte*>(p));
    total_ += size;
    VLA_CHECK(cudaMemset(p, 0, size), "clearing memory");
    return blocks_.back();
  }

  std::vector<std::byte*> blocks_;
  std::byte* next_ = nullptr;
  size_t left_ = 0, total_ = 0;
};

// Host memory that the device reads and writes directly.
class Pinned {
 public:
  explicit Pinned(size_t bytes) : bytes_(bytes) {
    void* p = nullptr;
    VLA_CHECK(cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocPortable | cudaHostAllocMapped),
              "pinning " + std::to_string(bytes) + " bytes of host memory");
    data_ = static_cast<std::byte*>(p);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() { cudaFreeHost(data_); }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_;
};

}  // namespace vla::cuda
