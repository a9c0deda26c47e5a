// E4M3 (Micikevicius et al. 2022): a sign, 4 bits of exponent, 3 of fraction; the largest number is 448,
// there is a NaN and no infinity.
#pragma once

#include "../common.cuh"

namespace vla::cuda {

struct e4m3 {
  uint8_t bits;
};
constexpr float kLargestE4M3 = 448.0f;

// Two numbers to the nearest in E4M3, `lo` in the low byte. Those beyond the largest become the largest; NaN
// stays NaN (PTX ISA, "cvt"). Nothing on devices before sm_89: no E4M3 is used there.
__device__ __forceinline__ uint32_t pack_e4m3(float lo, float hi) {
  uint16_t both = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(hi), "f"(lo));
#else
  (void)lo, (void)hi;
#endif
  return both;
}
__device__ __forceinline__ e4m3 to_e4m3(float v) { return {static_cast<uint8_t>(pack_e4m3(v, 0.0f))}; }

// Blocks of 8 columns lie with four lanes, columns 2 (lane mod 4) + {0, 1} with each. Two lanes exchange
// halves, so that what one has of blocks i (`even`) and i + 1 (`odd`) becomes four columns of one block: of i
// where lane is even, of i + 1 where it is odd, from column 4 (lane / 2 mod 2) on. Every lane of the warp
// takes part.
__device__ __forceinline__ uint32_t join_e4m3(uint32_t even, uint32_t odd) {
  const bool second = threadIdx.x & 1;
  const uint32_t theirs = __shfl_xor_sync(0xffffffffu, second ? even : odd, 1);
  return second ? theirs | odd << 16 : even | theirs << 16;
}

}  // namespace vla::cuda
