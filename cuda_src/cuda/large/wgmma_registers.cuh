// Hopper's matrix unit with its left operand in registers and the right one stored with N along the rows.
#pragma once

#include "wgmma.cuh"

namespace vla::cuda {

// A box of a (rows, heads, columns) tensor: from column x of head y, row z.
__device__ __forceinline__ void tma_load3(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y,
                                          int z) {
#if VLA_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
#else
  (void)to, (void)map, (void)barrier, (void)x, (void)y, (void)z;
#endif
}
// Describes b (K, N) stored as boxes of rows of 64 bf16 with the 128-byte swizzle: 1024 bytes from one group
// of 8 rows (K) to the next, `next` bytes from one box (64 of N) to the next. 16 rows further on is 2048
// bytes.
__device__ __forceinline__ uint64_t wgmma_tile_of_rows(uint32_t address, uint32_t next) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{next >> 4} << 16) |
         ((address & 0x3ffff) >> 4);
}
// c (64, N) += a (64, 16) b (16, N).
template <int N>
__device__ __forceinline__ void wgmma_registers(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b);

// Of N columns with R sums a thread; A0 to A3, B: the numbers of the operands after the sums.
#define VLA_WGMMA_REGISTERS(N, R, A0, A1, A2, A3, B)                                                      \
  template <>                                                                                             \
  __device__ __forceinline__ void wgmma_registers<N>(float (&c)[R], const uint32_t (&a)[4], uint64_t b) { \
    VLA_MATRIX_UNIT("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" VLA_NAMES_##R            \
                    "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B                                   \
                    ", 1, 1, 1, 1;" : VLA_SUMS_##R : "r"(a[0]),                                           \
                    "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
    (void)c, (void)a, (void)b;                                                                            \
  }
VLA_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36)
VLA_WGMMA_REGISTERS(80, 40, 40, 41, 42, 43, 44)
VLA_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68)
VLA_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132)
#undef VLA_WGMMA_REGISTERS

}  // namespace vla::cuda
