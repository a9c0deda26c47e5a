// Attention: a cluster has a head (or some of its columns), each block a range of the keys of the prefix and
// one of the keys that the loop writes, 64 columns of the output a warpgroup.
//
// Both warpgroups compute all scores of the block's keys (64 queries at once, so a second pass over 80 keys
// costs less than handing half of the probabilities over). A block has sums, maximum and total of its own
// keys; they go to the block that finishes the row, which weighs and adds them by rank (Milakov and
// Gimelshein 2018). NK: rows of keys that a block has, key_rows(); those that are no key are zeros and
// unseen.
#pragma once

#include <climits>

#include "split.cuh"

namespace vla::cuda::head {

template <int NK, int C>
__device__ __forceinline__ void attention_phase(const Table& t, const Block& b, const Phase& p, unsigned g,
                                                Carried& state, Watch& w) {
  const AttentionPart& a = p.attention;
  const int thread = threadIdx.x % kGroup, group = threadIdx.x / kGroup, lane = thread % 32;
  const int row = sum_place(thread, 0).row;
  const HeadTask task = head_task(p, b.cluster_number);
  const bool copies = t.parts & 4;
  const int owned = owned_groups(t.rows, b.rank, C);
  int* key_block;
  {
    const uint32_t at = b.key_blocks(group);
    extern __shared__ __align__(1024) std::byte shared[];
    key_block = reinterpret_cast<int*>(shared + (at - b.base));
  }
  if (owned > 0 && thread == 0 && (t.parts & 8)) barrier_expect(b.sums(group), C * owned * 8 * (64 * 4 + 8));
  // a key is seen by rows whose block is not before its own; one that is not there by none
  for (int i = thread; i < NK; i += kGroup) {
    const int key = key_of(a, b.rank, i);
    key_block[i] = key < 0                ? INT_MAX
                   : a.k_block != nullptr ? __ldg(a.k_block + static_cast<int64_t>(key) * a.ld_k_block)
                                          : INT_MIN + 1;
  }
  int row_block[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h;
    row_block[h] = r >= t.m               ? INT_MIN
                   : a.q_block != nullptr ? __ldg(a.q_block + static_cast<int64_t>(r) * a.ld_q_block)
                                          : INT_MAX - 1;
  }
  named_barrier(2 + group, kGroup);
  if (copies) {
    wait_on(b.keys(0), state.keys_parity, w, kForKeys, 0);
    wait_on(b.keys(1), state.keys_parity, w, kForKeys, 1);
    state.keys_parity ^= 1;
  }
  stamp(t, g, 1);

  float s[NK / 2];
#pragma unroll
  for (int i = 0; i < NK / 2; ++i) s[i] = 0.0f;
  int c = 0;
#pragma unroll 1
  do {
    wgmma_fence();
    const uint64_t q = wgmma_tile(b.base + queries_at(p) + c * t.rows * kChunkBytes);
    const uint64_t k = wgmma_tile(b.base + c * NK * kChunkBytes);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) multiply_add<NK>(s, q + 2 * kk, k + 2 * kk);
    wgmma_commit();
  } while (++c < p.chunks);
  wgmma_wait<0>();

  const float scale = p.scale;  // log2(e) / sqrt(d)
  float top[2], total[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float high = -INFINITY;
#pragma unroll
    for (int i = 0; i < NK / 4; ++i) {
      float& e = s[i / 2 * 4 + 2 * h + i % 2];
      e = key_block[i / 2 * 8 + lane % 4 * 2 + i % 2] <= row_block[h] ? e * scale : -INFINITY;
      high = fmaxf(high, e);
    }
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    const float base = high == -INFINITY ? 0.0f : high;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NK / 4; ++i) {
      float& e = s[i / 2 * 4 + 2 * h + i % 2];
      e = quick_exp2(e - base);
      sum += e;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    top[h] = high, total[h] = sum;
  }

  float acc[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
  uint32_t weights[NK / 16][4];
#pragma unroll
  for (int kk = 0; kk < NK / 16; ++kk) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      weights[kk][e] = pack2(s[8 * kk + 2 * e], s[8 * kk + 2 * e + 1]);
      asm volatile("" : "+r"(weights[kk][e]));  // now: reading sums between products makes all of them wait
    }
  }
  const uint32_t v = b.base + values_at(p) + group * NK * kChunkBytes;
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < NK / 16; ++kk)
    wgmma_registers<64>(acc, weights[kk], wgmma_tile_of_rows(v + kk * 2048, 0));
  wgmma_commit();
  wgmma_wait<0>();
  stamp(t, g, 2);

  if (t.parts & 8) {
    send_sums<8, C>(acc, t, b, group);
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row_group = thread / 32 * 2 + h, owner = row_group / groups_each(C);
        if (row_group * 8 >= t.rows) continue;
        const int at = t.receive + group * kReceive +
                       receive_stats(b.rank, row_group % groups_each(C) * 8 + lane / 4, C);
        send2(cluster_address(b.base + at, owner), cluster_address(b.sums(group), owner), top[h], total[h]);
      }
    }
  }
  if (owned > 0 && (t.parts & 8)) {
    wait_on(b.sums(group), state.sums_parity, w, kForSums, group);
    state.sums_parity ^= 1;
    const uint32_t from = b.base + t.receive + group * kReceive;
#pragma unroll 1
    for (int i = thread; i < rows_each(C) * 16; i += kGroup) {
      const Piece piece = piece_of(i, 64);
      const int r = b.rank * rows_each(C) + piece.row;
      if (r >= t.m) continue;
      float high = -INFINITY, tops[C], sum = 0.0f, y[4] = {};
#pragma unroll
      for (int k = 0; k < C; ++k) {
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(tops[k])
                     : "r"(from + receive_stats(k, piece.row, C))
                     : "memory");
        high = fmaxf(high, tops[k]);
      }
#pragma unroll
      for (int k = 0; k < C; ++k) {
        float its;
        float4 x;
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(its)
                     : "r"(from + receive_stats(k, piece.row, C) + 4)
                     : "memory");
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                     : "r"(from + receive_unit(k, piece.row, piece.octet, piece.half, 8, C) * 16)
                     : "memory");
        const float factor = tops[k] == -INFINITY ? 0.0f : quick_exp2(tops[k] - high);
        sum += factor * its;
        y[0] += factor * x.x, y[1] += factor * x.y, y[2] += factor * x.z, y[3] += factor * x.w;
      }
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      const int column =
          task.head * p.head_dim + (task.column + group) * kChunk + piece.octet * 8 + piece.half * 4;
      *reinterpret_cast<uint2*>(p.out + act_index(t.rows, r, column)) =
          make_uint2(pack2(y[0] * inverse, y[1] * inverse), pack2(y[2] * inverse, y[3] * inverse));
    }
  }
  finish(t, g, kGroup * a.columns);
}

}  // namespace vla::cuda::head
