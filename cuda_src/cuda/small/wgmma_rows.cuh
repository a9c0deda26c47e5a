// Hopper's matrix unit for few rows: weights from registers, x from shared memory with K along its rows.
#pragma once

#include "../large/wgmma.cuh"

namespace vla::cuda {

// c (64, N) += a (64, 16) b (N, 16)^T.
template <int N>
__device__ __forceinline__ void wgmma_rows(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b);

// Of N columns with R sums a thread; A0 to A3, B: the numbers of the operands after the sums.
#define VLA_WGMMA_ROWS(N, R, A0, A1, A2, A3, B)                                                      \
  template <>                                                                                        \
  __device__ __forceinline__ void wgmma_rows<N>(float (&c)[R], const uint32_t (&a)[4], uint64_t b) { \
    VLA_MATRIX_UNIT("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" VLA_NAMES_##R       \
                    "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B                              \
                    ", 1, 1, 1, 0;" : VLA_SUMS_##R : "r"(a[0]),                                      \
                    "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                        \
    (void)c, (void)a, (void)b;                                                                       \
  }
VLA_WGMMA_ROWS(16, 8, 8, 9, 10, 11, 12)
VLA_WGMMA_ROWS(56, 28, 28, 29, 30, 31, 32)
VLA_WGMMA_ROWS(64, 32, 32, 33, 34, 35, 36)
#undef VLA_WGMMA_ROWS

// ---- sums to another block of the cluster, counted in bytes by the barrier that waits for them
__device__ __forceinline__ void send4(uint32_t to, uint32_t barrier, float4 v) {
#if VLA_SM90
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
#else
  (void)to, (void)barrier, (void)v;
#endif
}
// Waits for the end of the barrier's phase of this parity. Of the block's own scope, which is enough for what
// the copy engine and st.async write: a wider one would empty the first-level cache each time.
__device__ __forceinline__ void wait_for(uint32_t barrier, int parity) {
#if VLA_SM90
  asm volatile(
      "{\n.reg .pred p;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra AGAIN;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  (void)barrier, (void)parity;
#endif
}
// Contiguous bytes of global memory to shared memory, counted by the barrier. All multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
#if VLA_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#else
  (void)to, (void)from, (void)bytes, (void)barrier;
#endif
}

}  // namespace vla::cuda
