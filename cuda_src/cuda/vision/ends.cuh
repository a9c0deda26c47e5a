// What the products of the persistent vision encoder do with their sums: norms, terms by column, the way out
// through shared memory and the copy engine, the hidden state.
#pragma once

#include "../large/product.cuh"
#include "block.cuh"

namespace vla::cuda::vision {

// Of this thread's two rows: asked for when the left operand is there (which says that all blocks are done
// with the phase before), summed up after the products. Four threads a row.
template <int kParts>
struct Moments {
  float4 part[2][kParts / 8];
  float mean[2], inverse[2];

  __device__ __forceinline__ void ask(const Table& t, int row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto* from = reinterpret_cast<const float4*>(
                             t.parts + static_cast<int64_t>(min(row + 8 * h, t.rows - 1)) * kParts * 2) +
                         threadIdx.x % 4;
#pragma unroll
      for (int j = 0; j < kParts / 8; ++j) part[h][j] = __ldcg(from + 4 * j);
    }
  }
  __device__ __forceinline__ void sum_up(const Table& t) {
    const float each = 1.0f / static_cast<float>(t.width);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int j = 0; j < kParts / 8; ++j)
        sum += part[h][j].x + part[h][j].z, squares += part[h][j].y + part[h][j].w;
#pragma unroll
      for (int o = 1; o <= 2; o *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
        squares += __shfl_xor_sync(0xffffffffu, squares, o);
      }
      mean[h] = sum * each;
      inverse[h] = rsqrtf(fmaxf(squares * each - mean[h] * mean[h], 0.0f) + t.eps);
    }
  }
};

// Terms of columns 8 unit + 2 (lane % 4) and the next: (a, b, a, b).
template <typename S>
__device__ __forceinline__ float4 terms_of(const Block<S>& b, int unit) {
  return load4(b.terms + (unit * 8 + threadIdx.x % 4 * 2) * 8);
}
// The tile's terms into shared memory; visible after the next meeting of the consumers.
template <typename S, int N>
__device__ __forceinline__ void fetch_terms(const Block<S>& b, const Term* from, int column, int columns,
                                            float scale = 1.0f) {
  static_assert(N <= 256 && N <= Of<S>::kConsumers);
  const int i = threadIdx.x;
  if (i >= N) return;
  float2 v = make_float2(0.0f, 0.0f);
  if (column + i < columns) v = __ldg(reinterpret_cast<const float2*>(from) + column + i);
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(b.terms + i * 8), "f"(v.x), "f"(v.y * scale)
               : "memory");
}

// Where a warp's 16 rows of N columns wait to be copied out: plain rows, or boxes of 64 swizzled columns.
template <int N>
__device__ __forceinline__ int staged_at(int row, int unit) {
  if constexpr (N % 64 != 0) return (row * N + unit * 8) * 2;
  return unit / 8 * (16 * kChunkBytes) + row * kChunkBytes + ((unit % 8) ^ (row & 7)) * 16;
}
// Two blocks of 8 x 8 beside each other and the two below, or one and the one below.
__device__ __forceinline__ void store_units(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if VLA_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
#else
  (void)to, (void)a, (void)b, (void)c, (void)d;
#endif
}
__device__ __forceinline__ void store_unit(uint32_t to, uint32_t a, uint32_t b) {
#if VLA_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b)
               : "memory");
#else
  (void)to, (void)a, (void)b;
#endif
}
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int x, int y) {
#if VLA_SM90
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(from), "r"(x), "r"(y)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// Until what this thread has had stored is there for all to read.
__device__ __forceinline__ void stores_done() {
#if VLA_SM90
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// At the barrier of another block of the cluster.
__device__ __forceinline__ void arrive_there(uint32_t barrier, int rank) {
#if VLA_SM90
  asm volatile(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
      : "memory");
#endif
}

// The consumers are done with a tile: what they share is free again, and all is stored.
template <typename S>
__device__ __forceinline__ void end_tile() {
  named_barrier(kAll, Of<S>::kConsumers);
}
__device__ __forceinline__ void end_phase(const Table& t, unsigned number) {
  stamp(t, number, 6);
  if (threadIdx.x == 0) head::add_done(t.counter);
  stamp(t, number, 7);
}

// What a block of a pair leaves of the hidden state: z[i] of unit i of those that it finishes. row: of the
// warp's first.
template <typename S>
__device__ __forceinline__ void leave_state(const Params& p, const Block<S>& b,
                                            const float (&z)[Of<S>::kOwned][4],
                                            const float4 (&terms)[Of<S>::kOwned], int row, int column,
                                            int64_t state_at, bool last) {
  constexpr int kOwned = Of<S>::kOwned, kUnits = Of<S>::kUnits, kSecond = kUnits - kOwned;
  constexpr bool kSwizzled = kOwned == 8 && kSecond == 8;
  const Table& t = p.t;
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int pitch = (b.rank == 0 ? kOwned : kSecond) * 16;
  const uint32_t to = b.meeting + Of<S>::kStateAt + warp * Of<S>::kStateOfWarp;
  const auto packed = [&](int i, int h) {
    return pack2(z[i][2 * h] * terms[i].y, z[i][2 * h + 1] * terms[i].w);
  };
  const auto at = [&](int unit) {
    const int r = lane % 16;
    return kSwizzled ? to + staged_at<64>(r, unit) : to + r * pitch + unit * 16;
  };
#pragma unroll
  for (int i = 0; i + 1 < kOwned; i += 2)
    store_units(at(i + lane / 16), packed(i, 0), packed(i, 1), packed(i + 1, 0), packed(i + 1, 1));
  if constexpr (kOwned % 2 != 0) {
    if (b.rank == 0) store_unit(at(kOwned - 1), packed(kOwned - 1, 0), packed(kOwned - 1, 1));
  }
#if VLA_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncwarp();
  if (lane == 0)
    tma_store(last ? &p.last_out[b.rank] : &p.x_out[b.rank], to, column * S::kState + b.rank * kOwned * 8,
              row);
  float sum[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    if (i >= kSecond && b.rank == 1) continue;
    if (!last)
      *reinterpret_cast<float4*>(t.state + state_at + i * kGroup * 4) =
          make_float4(z[i][0], z[i][1], z[i][2], z[i][3]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float x = z[i][2 * h], y = z[i][2 * h + 1];
      sum[h] += x + y, squares[h] += x * x + y * y;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int o = 1; o <= 2; o *= 2) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], o);
      squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], o);
    }
    const int its = row + lane / 4 + 8 * h;
    if (lane % 4 == 0 && its < t.rows)
      *reinterpret_cast<float2*>(t.parts + (its * S::kParts + column * kPair + b.rank) * 2) =
          make_float2(sum[h], squares[h]);
  }
  if (lane == 0) stores_done();
  __syncwarp();
}

}  // namespace vla::cuda::vision
