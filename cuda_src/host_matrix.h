// Reading matrices of the checkpoint on the host. Not for the CPU kernels: an inline function that they share
// with other files could be linked with their instruction set (see cpu/vec.h, which has its own in a
// namespace).
#pragma once

#include <cstring>

#include "device.h"

namespace vla {

inline float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float element(const HostMatrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.ld + col;
  return m.dtype == DType::kBF16 ? bf16_to_float(static_cast<const uint16_t*>(m.data)[at])
                                 : static_cast<const float*>(m.data)[at];
}

}  // namespace vla
