// Hopper's matrix unit as the persistent kernels want it, both operands in shared memory with k along rows of
// 128 swizzled bytes: c (64, N) += a b^T.
#pragma once

#include "../large/wgmma_registers.cuh"

namespace vla::cuda::head {

template <int N>
__device__ __forceinline__ void multiply_add(float (&c)[N / 2], uint64_t a, uint64_t b);

// Of N columns with R sums a thread; A, B: the numbers of the operands after the sums.
#define VLA_MULTIPLY_ADD(N, R, A, B)                                                           \
  template <>                                                                                  \
  __device__ __forceinline__ void multiply_add<N>(float (&c)[R], uint64_t a, uint64_t b) {     \
    VLA_MATRIX_UNIT("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" VLA_NAMES_##R \
                    "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;" : VLA_SUMS_##R : "l"(a),             \
                    "l"(b));                                                                   \
    (void)c, (void)a, (void)b;                                                                 \
  }
VLA_MULTIPLY_ADD(8, 4, 4, 5)
VLA_MULTIPLY_ADD(16, 8, 8, 9)
VLA_MULTIPLY_ADD(24, 12, 12, 13)
VLA_MULTIPLY_ADD(32, 16, 16, 17)
VLA_MULTIPLY_ADD(40, 20, 20, 21)
VLA_MULTIPLY_ADD(48, 24, 24, 25)
VLA_MULTIPLY_ADD(64, 32, 32, 33)
VLA_MULTIPLY_ADD(72, 36, 36, 37)
VLA_MULTIPLY_ADD(80, 40, 40, 41)
VLA_MULTIPLY_ADD(96, 48, 48, 49)
VLA_MULTIPLY_ADD(112, 56, 56, 57)
VLA_MULTIPLY_ADD(128, 64, 64, 65)
VLA_MULTIPLY_ADD(136, 68, 68, 69)
VLA_MULTIPLY_ADD(160, 80, 80, 81)
VLA_MULTIPLY_ADD(200, 100, 100, 101)
#undef VLA_MULTIPLY_ADD

}  // namespace vla::cuda::head
