// Attention of many queries on Hopper.
//
// out (batch m, heads d) = softmax(q k^T / sqrt(d) + mask) v by head. Two warpgroups (wgmma); slices of 64
// keys or values pass through rings in shared memory that the copy engine fills. Both have the same 64
// queries, every other slice of the keys and a ring each; their results are put together at the end, which
// halves the time of a block where blocks are few (where they are many: attention_tiles_sm90.cu). Heads that
// are no multiple of 64 are filled up with zeros by the copy engine. No warp is set aside for loading: the
// register file is shared out evenly among a quarter's warps, and a ninth warp would cost the others a third
// of theirs.
#include <cudaTypedefs.h>

#include <cmath>

#include "attention.cuh"
#include "tensor_map.h"
#include "wgmma_registers.cuh"

namespace vla::cuda {
namespace {

constexpr int kKeys = 64;

constexpr int kGroups = 2;

template <int D>
struct Shape {
  static constexpr int kBoxes = (D + 63) / 64;       // of 64 columns
  static constexpr int kBuffer = kBoxes * 64 * 128;  // 64 rows: a slice of keys or values, or 64 queries
  static constexpr int kBuffers = D == 256 ? 3 : D == 64 ? 6 : 4;  // of a ring
  static constexpr int kBarriers = (1 + kGroups * kBuffers) * kBuffer;
  static constexpr int kShared = kBarriers + 8 * (2 * kGroups * kBuffers + 1);
};

template <int D, bool E4M3>
__global__ void __launch_bounds__(128 * kGroups, 1)
    attention_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                     const __grid_constant__ CUtensorMap map_v, const __grid_constant__ Queries p) {
#if VLA_SM90A
  using S = Shape<D>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = smem_address(shared), barriers = base + S::kBarriers;
  const auto full = [&](int ring, int buffer) { return barriers + 8 * (ring * S::kBuffers + buffer); };
  const auto empty = [&](int ring, int buffer) {
    return barriers + 8 * ((kGroups + ring) * S::kBuffers + buffer);
  };
  const auto at = [&](int ring, int buffer) {
    return base + S::kBuffer + (ring * S::kBuffers + buffer) * S::kBuffer;
  };
  const uint32_t queries = barriers + 8 * 2 * kGroups * S::kBuffers;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, group = warp / 4;
  const int head = blockIdx.y, batch = blockIdx.z, q0 = blockIdx.x * kQueries;
  const int slices = ceil_div(p.n, kKeys);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups * S::kBuffers; ++i) {
      barrier_init(full(0, i), 1);
      barrier_init(empty(0, i), 4);  // a warp arrives once
    }
    barrier_init(queries, 1);
    barrier_init_fence();
  }
  __syncthreads();
  pdl_trigger();
  pdl_wait();

  // This thread's rows are r and r + 8 of its warpgroup's queries.
  const int ring = group, r = warp % 4 * 16 + lane / 4, row0 = q0 + r, q = lane & 3;
  int seen_up_to[2] = {0, 0};
  if (p.q_block) {
#pragma unroll
    for (int h = 0; h < 2; ++h) seen_up_to[h] = p.q_block[min(row0 + 8 * h, p.m - 1) * p.ld_q_block];
  }

  // The ring's sequence is keys, values, keys, ... of its slices; number j is in buffer j % kBuffers.
  const bool loads = threadIdx.x % 128 == 0;
  const auto load = [&](uint32_t to, const CUtensorMap* map, uint32_t barrier, int h, int row) {
    for (int c = 0; c < S::kBoxes; ++c) tma_load3(to + c * 8192, map, barrier, c * 64, h, row);
  };
  const auto fill = [&](int j) {
    const int slice = ring + j / 2 * kGroups, b = j % S::kBuffers;
    if (slice >= slices) return;
    if (j >= S::kBuffers) barrier_wait(empty(ring, b), (j / S::kBuffers - 1) & 1);
    barrier_expect(full(ring, b), S::kBuffer);
    load(at(ring, b), j % 2 ? &map_v : &map_k, full(ring, b), head / p.group, batch * p.n + slice * kKeys);
  };
  if (threadIdx.x == 0) {
    barrier_expect(queries, S::kBuffer);
    load(base, &map_q, queries, head, batch * p.m + q0);
  }
  if (loads) {
    for (int j = 0; j < S::kBuffers; ++j) fill(j);
  }
  __syncwarp();
  float out[D / 2] = {};
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  const auto release = [&](int j) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(ring, j % S::kBuffers));
  };
  barrier_wait(queries, 0);
  for (int j = 0; ring + j / 2 * kGroups < slices; j += 2) {
    const int slice = ring + j / 2 * kGroups;
    float s[kKeys / 2];
    barrier_wait(full(ring, j % S::kBuffers), j / S::kBuffers & 1);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      const uint32_t offset = kk / 4 * 8192 + kk % 4 * 32;
      wgmma<kKeys>(s, wgmma_tile(base + offset), wgmma_tile(at(ring, j % S::kBuffers) + offset), kk > 0);
    }
    wgmma_commit();
    if (loads && j > 0) fill(j - 1 + S::kBuffers);
    __syncwarp();
    int blocks[kKeys / 4];
    const int key0 = slice * kKeys + 2 * q;
    if (p.k_block) {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        blocks[i] = p.k_block[min(key0 + i / 2 * 8 + i % 2, p.n - 1) * p.ld_k_block];
      }
    }
    wgmma_wait<0>();
    release(j);

    if (p.k_block || slice * kKeys + kKeys > p.n) {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        const bool inside = key0 + i / 2 * 8 + i % 2 < p.n;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& e = s[i / 2 * 4 + 2 * h + i % 2];
          e = inside && (!p.k_block || blocks[i] <= seen_up_to[h]) ? e : -INFINITY;
        }
      }
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = top[h];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) high = fmaxf(high, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      const float shift =
          high == -INFINITY ? 0.0f : high * p.scale;  // nothing seen yet: all weights become 0
      shrink[h] = exp2_fast(top[h] * p.scale - shift);
      top[h] = high;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * h + e];
          x = exp2_fast(x * p.scale - shift);
          sum += x;
        }
      }
      total[h] = total[h] * shrink[h] + sum;
    }
    if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // after some slices, rarely
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] *= shrink[i >> 1 & 1];
    }
    uint32_t a[kKeys / 16][4];
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[kk][e] = pack2(s[8 * kk + 2 * e], s[8 * kk + 2 * e + 1]);
    }
    if (loads) fill(j + S::kBuffers);
    __syncwarp();
    const int b = (j + 1) % S::kBuffers;
    barrier_wait(full(ring, b), (j + 1) / S::kBuffers & 1);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      wgmma_registers<D>(out, a[kk], wgmma_tile_of_rows(at(ring, b) + kk * 2048, 8192));
    }
    wgmma_commit();
    wgmma_wait<0>();
    release(j + 1);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
    top[h] = top[h] == -INFINITY ? top[h] : top[h] * p.scale;
  }
  // The second warpgroup leaves sums, maxima and totals where the queries and the ring were.
  float* const sums = reinterpret_cast<float*>(shared);
  float* const tops = sums + kQueries * D;
  named_barrier(1, 128 * kGroups);
  if (group == 1) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        *reinterpret_cast<float2*>(sums + (r + 8 * h) * D + 8 * i + 2 * q) =
            make_float2(out[4 * i + 2 * h], out[4 * i + 2 * h + 1]);
      }
      if (q == 0) {
        tops[2 * (r + 8 * h)] = top[h];
        tops[2 * (r + 8 * h) + 1] = total[h];
      }
    }
  }
  named_barrier(1, 128 * kGroups);
  if (group == 1) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float other = tops[2 * (r + 8 * h)], other_total = tops[2 * (r + 8 * h) + 1];
    const float high = fmaxf(top[h], other), shift = high == -INFINITY ? 0.0f : high;
    const float mine = exp2_fast(top[h] - shift), theirs = exp2_fast(other - shift);
    total[h] = total[h] * mine + other_total * theirs;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float2 o = *reinterpret_cast<const float2*>(sums + (r + 8 * h) * D + 8 * i + 2 * q);
      out[4 * i + 2 * h] = out[4 * i + 2 * h] * mine + o.x * theirs;
      out[4 * i + 2 * h + 1] = out[4 * i + 2 * h + 1] * mine + o.y * theirs;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) store_attention<D, E4M3>(p, out, total[h], h, batch, head, row0 + 8 * h);
#endif
}

template <int D>
cudaError_t run(const Queries& p, const Launch& at) {
  using S = Shape<D>;
  CUtensorMap maps[3];
  const int kv_heads = p.heads / p.group;
  cudaError_t error = tensor_map_heads(&maps[0], p.q, p.batch * p.m, p.heads, p.head_dim, p.ldq, kQueries);
  if (error == cudaSuccess)
    error = tensor_map_heads(&maps[1], p.k, p.batch * p.n, kv_heads, p.head_dim, p.ldk, kKeys);
  if (error == cudaSuccess)
    error = tensor_map_heads(&maps[2], p.v, p.batch * p.n, kv_heads, p.head_dim, p.ldv, kKeys);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(p.m, kQueries), p.heads, p.batch);
  const auto kernel = p.out_inverse != 0.0f ? attention_kernel<D, true> : attention_kernel<D, false>;
  return launch_kernel(kernel, grid, dim3(128 * kGroups), S::kShared, at, 1, maps[0], maps[1], maps[2], p);
}

}  // namespace

cudaError_t attention_sm90(const Queries& p, const Launch& at) {
  if (p.head_dim <= 64) {
    const int blocks = ceil_div(p.m, kQueries) * p.heads * p.batch;
    return blocks > at.sms && !p.k_block ? attention_tiles_sm90(p, at) : run<64>(p, at);
  }
  if (p.head_dim <= 80) return run<80>(p, at);
  if (p.head_dim <= 128) return run<128>(p, at);
  return fits_attention_pairs(p, at.sms) ? attention_pairs_sm90(p, at) : run<256>(p, at);
}

}  // namespace vla::cuda
