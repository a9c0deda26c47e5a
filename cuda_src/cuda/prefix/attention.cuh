// Attention of the persistent prefix: a block has 64 queries of a head; all keys lie in shared memory, half
// of them each warpgroup's (NK). What the warpgroups find of their keys is weighed and added (Milakov and
// Gimelshein 2018), either of them finishing half of the columns.
#pragma once

#include <climits>

#include "product.cuh"

namespace vla::cuda::prefix {

// Which blocks the keys belong to: once, since no layer changes that. A key is seen by rows whose block is
// not before its own; one that is not there by none.
__device__ __forceinline__ void read_key_blocks(const Table& t, int* key_blocks) {
  for (int i = threadIdx.x; i < 2 * t.key_rows; i += kConsumers) {
    key_blocks[i] = i >= t.m               ? INT_MAX
                    : t.k_block != nullptr ? __ldg(t.k_block + i * t.ld_k_block)
                                           : INT_MIN + 1;
  }
}

template <int NK>
__device__ __forceinline__ void attention_phase(const Table& t, const Block& b, const Phase& p, int index,
                                                const int* key_blocks, Carried& state, Watch& w) {
  const int thread = threadIdx.x % kGroup, group = warp_index() / 4, lane = thread % 32;
  const float scale = t.scale;
#pragma unroll 1
  for (int tile = first_tile(p, b.cta); tile < tiles_of(p); tile += p.ctas) {
    const Tile at = tile_at(p, tile, b.cta);
    const int row = at.row + head::sum_place(thread, 0).row;
    int row_block[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      row_block[h] = r >= t.m               ? INT_MIN
                     : t.q_block != nullptr ? __ldg(t.q_block + r * t.ld_q_block)
                                            : INT_MAX - 1;
    }
    const int keys = 1 + group;  // their slot; the queries' is 0
    head::wait_on(b.full(0), state.ring.parity(0, 0), w, kForStage, 0);
    head::wait_on(b.full(keys), state.ring.parity(keys, 0), w, kForStage, keys);
    state.ring.use(kStages, t.slots);
    stamp(t, index, 1);
    float s[NK / 2];
#pragma unroll
    for (int i = 0; i < NK / 2; ++i) s[i] = 0.0f;
    const uint32_t q = head::tile_low(b.ring), k = head::tile_low(b.ring + keys * t.slot);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kHead / 16; ++kk)
      head::multiply_add<NK>(s, head::tile_of(q + 2 * kk), head::tile_of(k + 2 * kk));
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < NK / 2; ++i) asm volatile("" : "+f"(s[i])::"memory");  // read no earlier
    release(b, 0, 1);

    float top[2], total[2];
    const int* its = key_blocks + group * NK + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = -INFINITY;
#pragma unroll
      for (int i = 0; i < NK / 4; ++i) {
        float& e = s[i / 2 * 4 + 2 * h + i % 2];
        e = its[i / 2 * 8 + i % 2] <= row_block[h] ? e * scale : -INFINITY;
        high = fmaxf(high, e);
      }
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      const float base = high == -INFINITY ? 0.0f : high;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < NK / 4; ++i) {
        float& e = s[i / 2 * 4 + 2 * h + i % 2];
        e = head::quick_exp2(e - base);
        sum += e;
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      top[h] = high, total[h] = sum;
    }
    uint32_t weights[NK / 16][4];
#pragma unroll
    for (int kk = 0; kk < NK / 16; ++kk) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[kk][e] = pack2(s[8 * kk + 2 * e], s[8 * kk + 2 * e + 1]);
        asm volatile("" : "+r"(weights[kk][e]));  // now: reading sums between products makes all of them wait
      }
    }
    float acc[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
    const uint32_t v = b.ring + keys * t.slot + NK * kChunkBytes;
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < NK / 16; ++kk)
      wgmma_registers<kHead>(acc, weights[kk], wgmma_tile_of_rows(v + kk * 2048, 0));
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    release(b, keys, 2);
    stamp(t, index, 2);

    // four units of 8 columns to the other warpgroup, and a fifth of statistics
    const uint32_t to = b.exchange + (group * 5 * kGroup + thread) * 16,
                   from = b.exchange + ((group ^ 1) * 5 * kGroup + thread) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float o[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) o[e] = group == 0 ? acc[4 * (4 + j) + e] : acc[4 * j + e];
      store4(to + j * kUnitBytes, o[0], o[1], o[2], o[3]);
    }
    store4(to + 4 * kUnitBytes, top[0], total[0], top[1], total[1]);
    named_barrier(kAll, kConsumers);
    const float4 other = load4(from + 4 * kUnitBytes);
    float mine[2], theirs[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float its_top = h == 0 ? other.x : other.z, its_total = h == 0 ? other.y : other.w;
      const float high = fmaxf(top[h], its_top), base = high == -INFINITY ? 0.0f : high;
      const float a = head::quick_exp2(top[h] - base), o = head::quick_exp2(its_top - base);
      const float sum = a * total[h] + o * its_total, factor = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
      mine[h] = a * factor, theirs[h] = o * factor;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 o = load4(from + j * kUnitBytes);
      const float x[4] = {o.x, o.y, o.z, o.w};
      const int column = at.column * kHead + (group * 4 + j) * 8 + lane % 4 * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float a = group == 0 ? acc[4 * j + 2 * h + e] : acc[4 * (4 + j) + 2 * h + e];
          y[e] = a * mine[h] + x[2 * h + e] * theirs[h];
        }
        if (row + 8 * h < t.m) store_pair(p.out, t.rows, row + 8 * h, column, pack2(y[0], y[1]));
      }
    }
    named_barrier(kAll, kConsumers);
  }
  if (threadIdx.x == 0) head::add_done(t.counter);
  stamp(t, index, 3);
}

}  // namespace vla::cuda::prefix
