// What the device tests share: matrices known on both sides, random and poisoned, and comparison in double
// precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/kernels.h"

namespace vla::test {

#define TEST_CUDA(expression)                                                                      \
  do {                                                                                             \
    const cudaError_t error_ = (expression);                                                       \
    if (error_ != cudaSuccess) {                                                                   \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #expression, cudaGetErrorString(error_)); \
      std::exit(2);                                                                                \
    }                                                                                              \
  } while (false)

inline std::mt19937& random_source() {
  static std::mt19937 source(20261122);
  return source;
}

inline float round_bf16(float f) { return __bfloat162float(__float2bfloat16(f)); }

// A matrix on the host (float) and on the device (its type), `extra` columns of poison after each row.
class Matrix {
 public:
  Matrix(int rows, int cols, DType dtype, int extra = 0)
      : rows_(rows), cols_(cols), ld_(cols + extra), dtype_(dtype), values_(size_t(rows) * cols) {
    TEST_CUDA(cudaMalloc(&device_, size_t(rows_) * ld_ * size_of(dtype_)));
    poison();
  }
  ~Matrix() { cudaFree(device_); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  void poison() { TEST_CUDA(cudaMemset(device_, 0xff, size_t(rows_) * ld_ * size_of(dtype_))); }
  Matrix& normal(float scale = 1.0f, float mean = 0.0f) {
    std::normal_distribution<float> d(mean, scale);
    for (float& v : values_) {
      v = d(random_source());
      if (dtype_ == DType::kBF16) v = round_bf16(v);
    }
    send();
    return *this;
  }
  Matrix& fill(const std::function<float(int, int)>& f) {
    for (int i = 0; i < rows_; ++i) {
      for (int j = 0; j < cols_; ++j) at(i, j) = f(i, j);
    }
    send();
    return *this;
  }
  void send() {
    std::vector<std::byte> raw(size_t(rows_) * ld_ * size_of(dtype_), std::byte{0xff});
    for (int i = 0; i < rows_; ++i) {
      for (int j = 0; j < cols_; ++j) {
        const size_t k = size_t(i) * ld_ + j;
        if (dtype_ == DType::kBF16)
          reinterpret_cast<__nv_bfloat16*>(raw.data())[k] = __float2bfloat16(at(i, j));
        if (dtype_ == DType::kF32) reinterpret_cast<float*>(raw.data())[k] = at(i, j);
        if (dtype_ == DType::kI32) reinterpret_cast<int*>(raw.data())[k] = int(at(i, j));
      }
    }
    TEST_CUDA(cudaMemcpy(device_, raw.data(), raw.size(), cudaMemcpyHostToDevice));
  }
  // The device's values; padding that is no longer poison counts as NaN in the first element.
  std::vector<double> fetch() const {
    std::vector<std::byte> raw = bytes();
    std::vector<double> out(size_t(rows_) * cols_);
    bool spilled = false;
    for (int i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < ld_; ++j) {
        const size_t k = size_t(i) * ld_ + j;
        if (j >= cols_) {
          for (size_t b = 0; b < size_of(dtype_); ++b)
            spilled |= raw[k * size_of(dtype_) + b] != std::byte{0xff};
        } else if (dtype_ == DType::kBF16) {
          out[size_t(i) * cols_ + j] = __bfloat162float(reinterpret_cast<__nv_bfloat16*>(raw.data())[k]);
        } else {
          out[size_t(i) * cols_ + j] = reinterpret_cast<float*>(raw.data())[k];
        }
      }
    }
    if (spilled) out[0] = std::nan("");
    return out;
  }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> raw(size_t(rows_) * ld_ * size_of(dtype_));
    TEST_CUDA(cudaMemcpy(raw.data(), device_, raw.size(), cudaMemcpyDeviceToHost));
    return raw;
  }
  View view() const { return {static_cast<std::byte*>(device_), rows_, cols_, ld_, 0, dtype_}; }
  float& at(int i, int j) { return values_[size_t(i) * cols_ + j]; }
  float at(int i, int j) const { return values_[size_t(i) * cols_ + j]; }
  int rows() const { return rows_; }
  int cols() const { return cols_; }

 private:
  int rows_, cols_;
  int64_t ld_;
  DType dtype_;
  std::vector<float> values_;
  void* device_ = nullptr;
};

// f(i) for i in [0, n) on all processors.
inline void parallel(int n, const std::function<void(int)>& f) {
  const int workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int w = 0; w < workers; ++w) {
    threads.emplace_back([=, &f] {
      for (int i = w; i < n; i += workers) f(i);
    });
  }
  for (std::thread& t : threads) t.join();
}

// ||out - expected|| / ||expected||; NaN where anything is NaN.
inline double relative_error(const std::vector<double>& out, const std::vector<double>& expected) {
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < out.size(); ++i) {
    difference += (out[i] - expected[i]) * (out[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference) / std::sqrt(norm + 1e-30);
}

struct Report {
  int checks = 0, failures = 0;
  double worst = 0.0;

  void check(const std::string& name, double error, double limit) {
    ++checks;
    if (error > worst) worst = error;
    if (!(error <= limit)) {  // NaN fails
      ++failures;
      std::printf("FAIL %s: error %.3g, limit %.3g\n", name.c_str(), error, limit);
    }
  }
  void require(const std::string& name, bool holds) {
    ++checks;
    if (!holds) {
      ++failures;
      std::printf("FAIL %s\n", name.c_str());
    }
  }
};

// Times of a captured graph's replays in microseconds, sorted.
inline std::vector<float> replay_times(cudaGraphExec_t graph, cudaStream_t stream, int warm_up, int count) {
  cudaEvent_t begin, end;
  TEST_CUDA(cudaEventCreate(&begin));
  TEST_CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < warm_up + count; ++i) {
    TEST_CUDA(cudaEventRecord(begin, stream));
    TEST_CUDA(cudaGraphLaunch(graph, stream));
    TEST_CUDA(cudaEventRecord(end, stream));
    TEST_CUDA(cudaEventSynchronize(end));
    float ms = 0.0f;
    TEST_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= warm_up) times.push_back(ms * 1000.0f);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times;
}

// What `enqueue` does on the stream as a graph; the caller's to destroy.
inline cudaGraphExec_t capture(cudaStream_t stream, const std::function<void()>& enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  TEST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue();
  TEST_CUDA(cudaStreamEndCapture(stream, &graph));
  TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  TEST_CUDA(cudaGraphDestroy(graph));
  return exec;
}

struct Times {
  float median, p99;  // microseconds
};
// Of `count` replays of what `enqueue` does, after ten that do not count.
inline Times times(cudaStream_t stream, const std::function<void()>& enqueue, int count) {
  cudaGraphExec_t exec = capture(stream, enqueue);
  const std::vector<float> sorted = replay_times(exec, stream, 10, count);
  TEST_CUDA(cudaGraphExecDestroy(exec));
  const auto at = [&](double part) { return sorted[size_t(double(sorted.size() - 1) * part)]; };
  return {at(0.5), at(0.99)};
}

}  // namespace vla::test
