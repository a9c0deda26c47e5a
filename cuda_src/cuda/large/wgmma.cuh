// Hopper's matrix unit, asynchronous copies and barriers, as PTX (ISA 8.0: "wgmma", "cp.async.bulk.tensor",
// "mbarrier"). Everything here is empty on other devices: kernels that use it are not launched there.
#pragma once

#include <cuda.h>

#include "../common.cuh"
#include "../matrix_unit.h"

namespace vla::cuda {

// ---- mbarrier: counts arrivals and bytes; a phase ends when both are complete
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
#if VLA_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  (void)barrier, (void)arrivals;
#endif
}
// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
#if VLA_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
#if VLA_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#else
  (void)barrier, (void)bytes;
#endif
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
#if VLA_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  (void)barrier;
#endif
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
#if VLA_SM90
  asm volatile(
      "{\n.reg .pred p;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  (void)barrier, (void)parity;
#endif
}

// ---- the copy engine: a box of a matrix (`map`) from column x, row y to shared memory, swizzled as the map
// says
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x,
                                         int y) {
#if VLA_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
#else
  (void)to, (void)map, (void)barrier, (void)x, (void)y;
#endif
}
// The same of four dimensions, the third from 0.
__device__ __forceinline__ void tma_load4(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y,
                                          int w) {
#if VLA_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(0), "r"(w)
      : "memory");
#else
  (void)to, (void)map, (void)barrier, (void)x, (void)y, (void)w;
#endif
}
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
#if VLA_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  (void)map;
#endif
}
// Four numbers, or two, to the memory of another block of the cluster, which counts their bytes at `barrier`.
__device__ __forceinline__ void give4(uint32_t to, uint32_t barrier, const float* v) {
#if VLA_SM90
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
      "r"(barrier), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
      : "memory");
#else
  (void)to, (void)barrier, (void)v;
#endif
}
__device__ __forceinline__ void give2(uint32_t to, uint32_t barrier, float2 v) {
#if VLA_SM90
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(to),
               "r"(barrier), "f"(v.x), "f"(v.y)
               : "memory");
#else
  (void)to, (void)barrier, (void)v;
#endif
}
// Arrives at the cluster's barrier without publishing anything, which would wait for all that was written.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if VLA_SM90
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if VLA_SM90
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// ---- registers of a warpgroup
template <int N>
__device__ __forceinline__ void registers_up() {
#if VLA_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
__device__ __forceinline__ void registers_down() {
#if VLA_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
// A barrier among `threads` threads of the block; id 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- wgmma: c (64, N) (+)= a (64, 16) b (N, 16)^T, all but c in shared memory
__device__ __forceinline__ void wgmma_fence() {
#if VLA_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if VLA_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
#if VLA_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}
// Describes a tile of rows of 64 bf16 (128 bytes) with the 128-byte swizzle: 1024 bytes from one group of 8
// rows to the next. The tile starts on a multiple of 1024; 16 columns further on is 32 bytes, which is 2 in
// the descriptor.
__device__ __forceinline__ uint64_t wgmma_tile(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((address & 0x3ffff) >> 4);
}
template <int N>
__device__ __forceinline__ void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b, bool add);

// Of N columns with R sums a thread; A, B, ADD: the numbers of the operands after the sums.
#define VLA_WGMMA(N, R, A, B, ADD)                                                             \
  template <>                                                                                  \
  __device__ __forceinline__ void wgmma<N>(float (&c)[R], uint64_t a, uint64_t b, bool add) {  \
    VLA_MATRIX_UNIT("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD                                  \
                    ", 0;\n"                                                                   \
                    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" VLA_NAMES_##R \
                    "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n" : VLA_SUMS_##R : "l"(a),        \
                    "l"(b), "r"(static_cast<int>(add)));                                       \
    (void)c, (void)a, (void)b, (void)add;                                                      \
  }
VLA_WGMMA(64, 32, 32, 33, 34)
VLA_WGMMA(128, 64, 64, 65, 66)
VLA_WGMMA(160, 80, 80, 81, 82)
VLA_WGMMA(192, 96, 96, 97, 98)
VLA_WGMMA(256, 128, 128, 129, 130)
#undef VLA_WGMMA

}  // namespace vla::cuda
