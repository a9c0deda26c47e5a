// Attention: a cluster has a head (or some of its columns), each block a range of the keys of the prefix and
// one of the keys that the loop writes, a warpgroup 64 columns of the output or 128.
//
// Both warpgroups compute all scores of the block's keys (64 queries at once, so a second pass over 80 keys
// costs less than handing half of the probabilities over). A block has the output, maximum and total of its
// own keys; they go to the block that finishes the row, the output as bfloat16, which weighs and adds them by
// rank (Milakov and Gimelshein 2018). NK: rows of keys that a block has, key_rows(); those that are no key
// are zeros and unseen.
#pragma once

#include <climits>

#include "split.cuh"

namespace vla::cuda::head {

// Two rows' 64 columns, the result of a pass, to the blocks that finish them. acc: of rows r and r + 8,
// scaled by inverse[]; column: the first, in units of 8, of what the warpgroup has.
__device__ __forceinline__ void send_outputs(const float (&acc)[32], const float (&inverse)[2],
                                             const Table& t, const Block& b, int group, int octet,
                                             int octets) {
  const unsigned lane = threadIdx.x % 32, odd = lane & 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const unsigned owner = warp_index() % 4 * 2 + h;
    if (owner * 8 >= static_cast<unsigned>(t.rows)) continue;
    const uint32_t at = cluster_address(b.exchange() + group * kReceive, owner);
    const uint32_t barrier = cluster_address(b.sums(group), owner);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      // lanes in pairs: the even one gets 4 columns of octet j, the odd one of the next
      const uint32_t first = pack2(acc[4 * j + 2 * h] * inverse[h], acc[4 * j + 2 * h + 1] * inverse[h]);
      const uint32_t second = pack2(acc[4 * j + 4 + 2 * h] * inverse[h], acc[4 * j + 5 + 2 * h] * inverse[h]);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      const unsigned to = receive_octet(b.rank, lane / 4, octet + j + odd, octets) + lane % 4 / 2 * 8;
      send2(at + to, barrier, odd ? other : first, odd ? second : other);
    }
  }
}

template <int NK>
__device__ __forceinline__ void attention_phase(const Table& t, const Block& b, const Phase& p, unsigned g,
                                                Carried& state, Watch& w) {
  const AttentionPart& a = p.attention;
  const int thread = threadIdx.x % kGroup, group = warp_index() / 4, lane = thread % 32;
  const int row = sum_place(thread, 0).row;
  const HeadTask task = head_task(p, b.cluster_number);
  const bool copies = t.parts & 4, owner = owns(t.rows, b.rank) && (t.parts & 8);
  const int passes = kept(a.columns > 2 ? 2 : 1), octets = 8 * passes;
  int* key_block;
  {
    const uint32_t at = b.key_blocks(group);
    extern __shared__ __align__(1024) std::byte shared[];
    key_block = reinterpret_cast<int*>(shared + (at - b.base));
  }
  if (owner && thread == 0) barrier_expect(b.sums(group), kCluster * 8 * (octets * 16 + 8));
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
  const int chunks = kept(p.chunks), threads = kGroup * min(a.columns, 2);
  const uint32_t values = b.base + kept(values_at(p)) + group * passes * NK * kChunkBytes;
  uint32_t q = tile_low(b.base + kept(queries_at(p))), k = tile_low(b.base);
  const int q_step = kept(t.rows * kChunkBytes >> 4);
  // what this thread finishes: 8 columns of a row
  const int finished = thread / octets, octet = thread % octets, its_row = b.rank * 8 + finished;
  Bits* out = nullptr;
  if (owner && finished < 8 && its_row < t.m) {
    out = p.out + act_index(t.rows, its_row,
                            task.head * p.head_dim + (task.column + group * passes) * kChunk + octet * 8);
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
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) multiply_add<NK>(s, tile_of(q + 2 * kk), tile_of(k + 2 * kk));
    wgmma_commit();
    q += q_step, k += NK * kChunkBytes >> 4;
  }
  wgmma_wait<0>();

  const float scale = p.scale;  // log2(e) / sqrt(d)
  float top[2], total[2], inverse[2];
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
    top[h] = high, total[h] = sum, inverse[h] = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
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
  if ((t.parts & 8) && lane % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int to = thread / 32 * 2 + h;
      if (to * 8 >= t.rows) continue;
      send2(cluster_address(b.exchange() + group * kReceive + receive_stats(b.rank, lane / 4), to),
            cluster_address(b.sums(group), to), __float_as_uint(top[h]), __float_as_uint(total[h]));
    }
  }
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    float acc[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
    const uint64_t v = wgmma_tile_of_rows(values + pass * NK * kChunkBytes, 0);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < NK / 16; ++kk) wgmma_registers<64>(acc, weights[kk], v + kk * (2048 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
    if (t.parts & 8) send_outputs(acc, inverse, t, b, group, 8 * pass, octets);
  }
  stamp(t, g, 2);

  if (owner) {
    wait_on(b.sums(group), state.sums_parity, w, kForSums, group);
    state.sums_parity ^= 1;
  }
  if (out != nullptr) {
    const uint32_t from = b.exchange() + group * kReceive;
    float high = -INFINITY, tops[kCluster], its[kCluster], sum = 0.0f, y[8] = {};
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(tops[i]), "=f"(its[i])
                   : "r"(from + receive_stats(i, finished))
                   : "memory");
      high = fmaxf(high, tops[i]);
    }
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      uint32_t x[4];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(from + receive_octet(i, finished, octet, octets))
                   : "memory");
      const float share = tops[i] == -INFINITY ? 0.0f : quick_exp2(tops[i] - high) * its[i];
      sum += share;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y[2 * e] += share * __uint_as_float(x[e] << 16);
        y[2 * e + 1] += share * __uint_as_float(x[e] & 0xffff0000u);
      }
    }
    const float factor = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] *= factor;
    *reinterpret_cast<uint4*>(out) =
        make_uint4(pack2(y[0], y[1]), pack2(y[2], y[3]), pack2(y[4], y[5]), pack2(y[6], y[7]));
  }
  finish(t, g, threads);
}

}  // namespace vla::cuda::head
