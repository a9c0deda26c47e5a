// What an operation is made of: views of planned memory, packed weights, and a norm before a product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vla {

enum class DType : int { kF32 = 0, kBF16 = 1, kI32 = 2, kU8 = 3, kI8 = 4, kE4M3 = 5 };

constexpr size_t size_of(DType type) {
  return type == DType::kF32 || type == DType::kI32 ? 4 : type == DType::kBF16 ? 2 : 1;
}

// A matrix (rows, cols) in planned memory, row-major. In the loop it moves by `step_bytes` an iteration.
struct View {
  std::byte* base = nullptr;  // nullptr: the operand is absent
  int rows = 0;
  int cols = 0;
  int64_t ld = 0;          // elements from one row to the next
  int64_t step_bytes = 0;  // added once an iteration of the loop
  DType dtype = DType::kF32;

  explicit operator bool() const { return base != nullptr; }
  template <typename T>
  T* at(int step) const {
    return reinterpret_cast<T*>(base + step * step_bytes);
  }
};

// One or more matrices (n, k) of the checkpoint, stacked and laid out as the device's product wants them.
// kStacked: rows one under another (q, k, v). kInterleaved: two matrices of the same shape, for a gated
// product.
enum class Packing : int { kStacked = 0, kInterleaved = 1 };

struct Weight {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  Packing packing = Packing::kStacked;
  int k = 0;
  std::vector<int> n;  // rows of each part

  int rows() const {
    int total = 0;
    for (int part : n) total += part;
    return total;
  }
};

enum class NormKind : int { kNone = 0, kLayer = 1, kRms = 2 };

// norm(x) of a row, in float32: (x - mean) / sqrt(var + eps) or x / sqrt(mean(x^2) + eps); then
// * (weight + plus) + bias where given. weight and bias are (1, k) float32 and may move with the loop.
struct Norm {
  NormKind kind = NormKind::kNone;
  float eps = 0.0f;
  float plus = 0.0f;
  View weight;
  View bias;
};

enum class Act : int { kNone = 0, kGeluTanh = 1, kSilu = 2 };

}  // namespace vla
