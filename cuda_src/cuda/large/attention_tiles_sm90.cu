// Attention of many queries on Hopper where tiles are many: as attention_sm90.cu, of heads of up to 64
// columns and without a mask.
//
// A block is one warpgroup with 64 queries; a multiprocessor holds three, which share its units in turn. A
// slice is 128 keys: what a step costs whatever its keys (waits, the matrix unit's latency, the rows' maxima)
// is what 64 keys at a time spent most of their time on.
#include <cudaTypedefs.h>

#include <cmath>

#include "attention.cuh"
#include "tensor_map.h"
#include "wgmma_registers.cuh"

namespace vla::cuda {
namespace {

[[maybe_unused]] constexpr int kHead = 64;
constexpr int kKeys = 128, kBlocks = 3;
constexpr int kBuffer = 64 * 128, kSlice = kKeys * 128;  // bytes of 64 queries, of a slice of keys or values
constexpr int kRing = 2;                                 // buffers of keys, and as many of values
constexpr int kBarriers = kBuffer + 2 * kRing * kSlice, kShared = kBarriers + 8 * (1 + 4 * kRing);
static_assert(kBlocks * (kShared + 1024) <= 228 * 1024);

enum Which { kOfKeys = 0, kOfValues = 1 };

template <bool E4M3>
__global__ void __launch_bounds__(128, kBlocks)
    attention_tiles(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                    const __grid_constant__ CUtensorMap map_v, const __grid_constant__ Queries p) {
#if VLA_SM90A
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = smem_address(shared), queries = base + kBarriers;
  const auto full = [&](Which w, int slice) { return queries + 8 * (1 + w * kRing + slice % kRing); };
  const auto empty = [&](Which w, int slice) { return queries + 8 * (1 + (2 + w) * kRing + slice % kRing); };
  const auto at = [&](Which w, int slice) { return base + kBuffer + kSlice * (w * kRing + slice % kRing); };
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, q = lane & 3;
  const int head = blockIdx.y, batch = blockIdx.z, q0 = blockIdx.x * kQueries;
  const int slices = ceil_div(p.n, kKeys);

  if (threadIdx.x == 0) {
    barrier_init(queries, 1);
    for (int i = 0; i < kRing; ++i) {
      for (const Which w : {kOfKeys, kOfValues}) barrier_init(full(w, i), 1), barrier_init(empty(w, i), 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  pdl_trigger();
  pdl_wait();

  const auto fill = [&](Which w, int slice) {
    if (slice >= slices) return;
    if (slice >= kRing) barrier_wait(empty(w, slice), (slice / kRing - 1) & 1);
    barrier_expect(full(w, slice), kSlice);
    tma_load3(at(w, slice), w == kOfKeys ? &map_k : &map_v, full(w, slice), 0, head / p.group,
              batch * p.n + slice * kKeys);
  };
  if (threadIdx.x == 0) {
    barrier_expect(queries, kBuffer);
    tma_load3(base, &map_q, queries, 0, head, batch * p.m + q0);
    for (int i = 0; i < kRing; ++i) fill(kOfKeys, i), fill(kOfValues, i);
  }
  __syncwarp();
  const auto release = [&](Which w, int slice) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(w, slice));
  };

  float out[kHead / 2] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  barrier_wait(queries, 0);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    float s[kKeys / 2];
    barrier_wait(full(kOfKeys, slice), slice / kRing & 1);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kHead / 16; ++kk)
      wgmma<kKeys>(s, wgmma_tile(base + kk * 32), wgmma_tile(at(kOfKeys, slice) + kk * 32), kk > 0);
    wgmma_commit();
    if (threadIdx.x == 0 && slice > 0) fill(kOfValues, slice - 1 + kRing);
    __syncwarp();
    wgmma_wait<0>();
    release(kOfKeys, slice);
    if (slice * kKeys + kKeys > p.n) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (slice * kKeys + i / 4 * 8 + 2 * q + i % 2 >= p.n) s[i] = -INFINITY;
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high[4] = {top[h], s[2 * h], s[2 * h + 1], s[4 + 2 * h]};  // four chains of comparisons
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        high[i % 4] = fmaxf(high[i % 4], fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
      }
      float most = fmaxf(fmaxf(high[0], high[1]), fmaxf(high[2], high[3]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float shift = most * p.scale;
      shrink[h] = exp2_fast(top[h] * p.scale - shift);
      top[h] = most;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * h + e];
          x = exp2_fast(x * p.scale - shift);
          sum[(2 * i + e) % 4] += x;
        }
      }
      total[h] = total[h] * shrink[h] + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    if (threadIdx.x == 0) fill(kOfKeys, slice + kRing);
    __syncwarp();
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // after some slices, rarely
#pragma unroll
      for (int i = 0; i < kHead / 2; ++i) out[i] *= shrink[i >> 1 & 1];
    }
    uint32_t a[kKeys / 16][4];
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[kk][e] = pack2(s[8 * kk + 2 * e], s[8 * kk + 2 * e + 1]);
    }
    barrier_wait(full(kOfValues, slice), slice / kRing & 1);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk)
      wgmma_registers<kHead>(out, a[kk], wgmma_tile_of_rows(at(kOfValues, slice) + kk * 2048, 8192));
    wgmma_commit();
    wgmma_wait<0>();
    release(kOfValues, slice);
  }

  const int row0 = q0 + warp * 16 + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
    store_attention<kHead, E4M3>(p, out, total[h], h, batch, head, row0 + 8 * h);
  }
#endif
}

}  // namespace

cudaError_t attention_tiles_sm90(const Queries& p, const Launch& at) {
  CUtensorMap maps[3];
  const int kv_heads = p.heads / p.group;
  cudaError_t error = tensor_map_heads(&maps[0], p.q, p.batch * p.m, p.heads, p.head_dim, p.ldq, kQueries);
  if (error == cudaSuccess)
    error = tensor_map_heads(&maps[1], p.k, p.batch * p.n, kv_heads, p.head_dim, p.ldk, kKeys);
  if (error == cudaSuccess)
    error = tensor_map_heads(&maps[2], p.v, p.batch * p.n, kv_heads, p.head_dim, p.ldv, kKeys);
  if (error != cudaSuccess) return error;
  const auto kernel = p.out_inverse != 0.0f ? attention_tiles<true> : attention_tiles<false>;
  return launch_kernel(kernel, dim3(ceil_div(p.m, kQueries), p.heads, p.batch), dim3(128), kShared, at, 1,
                       maps[0], maps[1], maps[2], p);
}

}  // namespace vla::cuda
