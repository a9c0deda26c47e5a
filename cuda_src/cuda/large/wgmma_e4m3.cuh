// Hopper's matrix unit on E4M3: c (64, N) (+)= a (64, 32) b (N, 32)^T, all but c in shared memory, 32 bytes
// of a row a step as in bf16. Both operands have k along their rows: there is no transposed form of 8 bits
// (PTX ISA 8.0, "wgmma.mma_async").
#pragma once

#include "wgmma.cuh"

namespace vla::cuda {

template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&c)[N / 2], uint64_t a, uint64_t b, bool add);

// As VLA_WGMMA.
#define VLA_WGMMA_E4M3(N, R, A, B, ADD)                                                            \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma_e4m3<N>(float (&c)[R], uint64_t a, uint64_t b, bool add) { \
    VLA_MATRIX_UNIT("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD                                      \
                    ", 0;\n"                                                                       \
                    "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" VLA_NAMES_##R     \
                    "}, %" #A ", %" #B ", p, 1, 1;\n}\n" : VLA_SUMS_##R : "l"(a),                  \
                    "l"(b), "r"(static_cast<int>(add)));                                           \
    (void)c, (void)a, (void)b, (void)add;                                                          \
  }
VLA_WGMMA_E4M3(64, 32, 32, 33, 34)
VLA_WGMMA_E4M3(128, 64, 64, 65, 66)
VLA_WGMMA_E4M3(192, 96, 96, 97, 98)
VLA_WGMMA_E4M3(256, 128, 128, 129, 130)
#undef VLA_WGMMA_E4M3

}  // namespace vla::cuda
