// What the check and timing programs share: device memory with poisoned surroundings, random numbers,
// operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../cuda/kernels.h"

namespace vla::check {

#define CUDA_OK(expression)                                                                                 \
  do {                                                                                                      \
    const cudaError_t error_ = (expression);                                                                \
    if (error_ != cudaSuccess) {                                                                            \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #expression, cudaGetErrorString(error_)); \
      std::exit(1);                                                                                         \
    }                                                                                                       \
  } while (0)

inline std::mt19937& generator() {
  static std::mt19937 g(std::random_device{}());
  return g;
}
inline float uniform(float low, float high) {
  return low + (high - low) * static_cast<float>(generator()() >> 8) * 0x1p-24f;
}
inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float power_of_two(int n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Where E4M3 numbers near v are 2^n apart: n.
inline int spacing_e4m3(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return std::max(static_cast<int>(bits >> 23 & 255) - 127, -6) - 3;
}
// The nearest in E4M3, ties to even; what is larger than 448 becomes 448, NaN stays NaN.
inline uint8_t to_e4m3(float v) {
  if (std::isnan(v)) return 0x7f;
  const float size = std::min(std::fabs(v), 448.0f);
  const int n = spacing_e4m3(size), units = static_cast<int>(std::nearbyint(size * power_of_two(-n)));
  return static_cast<uint8_t>((n + 9) * 8 + units) | (std::signbit(v) ? 0x80 : 0);
}
inline float from_e4m3(uint8_t code) {
  const int e = code >> 3 & 15, fraction = code & 7;
  if ((code & 0x7f) == 0x7f) return NAN;
  const float size = e ? (8 + fraction) * power_of_two(e - 10) : fraction * power_of_two(-9);
  return code & 0x80 ? -size : size;
}

// Device memory that lives to the end of the program or until release_all().
inline std::vector<void*>& owned() {
  static std::vector<void*> all;
  return all;
}
inline std::byte* device(size_t bytes) {
  void* p = nullptr;
  CUDA_OK(cudaMalloc(&p, bytes + 256));
  CUDA_OK(cudaMemset(p, 0xff, bytes + 256));
  owned().push_back(p);
  return static_cast<std::byte*>(p);
}
inline void release_all() {
  for (void* p : owned()) cudaFree(p);
  owned().clear();
}

// A matrix on the host and its copy on the device, with `pad` columns and one row too many. All that lies
// outside is poison (NaN); outside() tells whether it still is.
struct Matrix {
  View view;
  std::vector<float> values;  // (rows, cols)

  float at(int r, int c) const { return values[static_cast<size_t>(r) * view.cols + c]; }
  static Matrix empty(int rows, int cols, DType type, int pad) {
    Matrix m;
    m.view.rows = rows;
    m.view.cols = cols;
    m.view.ld = cols + pad;
    m.view.dtype = type;
    m.view.base = device(static_cast<size_t>(rows + 1) * m.view.ld * size_of(type));
    return m;
  }
  void upload() {
    const size_t size = size_of(view.dtype);
    std::vector<std::byte> bytes(static_cast<size_t>(view.rows + 1) * view.ld * size, std::byte{0xff});
    for (int r = 0; r < view.rows; ++r) {
      for (int c = 0; c < view.cols; ++c) {
        std::byte* to = bytes.data() + (static_cast<size_t>(r) * view.ld + c) * size;
        const float v = at(r, c);
        if (view.dtype == DType::kF32) std::memcpy(to, &v, 4);
        const uint16_t b = to_bf16(v);
        if (view.dtype == DType::kBF16) std::memcpy(to, &b, 2);
        const int i = static_cast<int>(v);
        if (view.dtype == DType::kI32) std::memcpy(to, &i, 4);
        if (view.dtype == DType::kU8) *to = static_cast<std::byte>(i);
        if (view.dtype == DType::kE4M3) *to = static_cast<std::byte>(to_e4m3(v));
      }
    }
    CUDA_OK(cudaMemcpy(view.base, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  // Uniform in [low, high), rounded to the type.
  static Matrix random(int rows, int cols, DType type, int pad, float low, float high) {
    Matrix m = empty(rows, cols, type, pad);
    m.values.resize(static_cast<size_t>(rows) * cols);
    for (float& v : m.values) {
      v = uniform(low, high);
      if (type == DType::kBF16) v = from_bf16(to_bf16(v));
      if (type == DType::kE4M3) v = from_e4m3(to_e4m3(v));
      if (type == DType::kI32 || type == DType::kU8) v = std::floor(v);
    }
    m.upload();
    return m;
  }
  void download() {
    const size_t size = size_of(view.dtype), stride = view.ld * size;
    std::vector<std::byte> bytes(static_cast<size_t>(view.rows + 1) * stride);
    CUDA_OK(cudaMemcpy(bytes.data(), view.base, bytes.size(), cudaMemcpyDeviceToHost));
    values.assign(static_cast<size_t>(view.rows) * view.cols, 0.0f);
    for (int r = 0; r < view.rows; ++r) {
      for (int c = 0; c < view.cols; ++c) {
        const std::byte* from = bytes.data() + r * stride + c * size;
        float& v = values[static_cast<size_t>(r) * view.cols + c];
        uint16_t b = 0;
        std::memcpy(&b, from, std::min<size_t>(size, 2));
        if (view.dtype == DType::kF32) std::memcpy(&v, from, 4);
        if (view.dtype == DType::kBF16) v = from_bf16(b);
        if (view.dtype == DType::kE4M3) v = from_e4m3(static_cast<uint8_t>(*from));
      }
    }
    touched_outside = false;
    for (int r = 0; r <= view.rows; ++r) {
      for (size_t i = r < view.rows ? view.cols * size : 0; i < stride; ++i) {
        touched_outside |= bytes[r * stride + i] != std::byte{0xff};
      }
    }
  }
  bool touched_outside = false;
};

// A packed weight of random matrices.
struct Packed {
  Weight weight;
  std::vector<Matrix> parts;
};
inline Packed random_weight(Packing packing, const std::vector<int>& n, int k) {
  Packed w;
  std::vector<cuda::RawMatrix> raw;
  const float size = std::sqrt(3.0f / static_cast<float>(k));
  for (int rows : n) {
    w.parts.push_back(Matrix::random(rows, k, DType::kBF16, 0, -size, size));
    raw.push_back({w.parts.back().view.base, DType::kBF16, rows, k, w.parts.back().view.ld});
  }
  void* to = device(cuda::packed_bytes_large(packing, n, k));
  CUDA_OK(cuda::pack_large(to, packing, raw, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  w.weight = {to, DType::kBF16, packing, k, n};
  return w;
}

inline cuda::Launch launch_on(cudaStream_t stream, size_t scratch) {
  cuda::Launch at;
  cudaDeviceProp properties;
  int index = 0;
  CUDA_OK(cudaGetDevice(&index));
  CUDA_OK(cudaGetDeviceProperties(&properties, index));
  at.stream = stream;
  at.sms = properties.multiProcessorCount;
  at.arch = 10 * properties.major + properties.minor;
  at.scratch = device(scratch);
  at.scratch_bytes = scratch;
  return at;
}

}  // namespace vla::check
