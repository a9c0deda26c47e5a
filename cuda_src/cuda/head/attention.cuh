// Attention: a cluster has a tile of 64 rows of queries (a head's, or those of several heads of a key head
// one under another) and some groups of 64 columns of their output, each block a range of the keys of the
// prefix and one of the keys that the loop writes. By the first warpgroup alone: of two with 64 columns each
// both would compute the same scores, and the unit for exponentials is no faster than one of them.
//
// A block has the output, maximum and total of its own keys; they go to the block that finishes the row, the
// output as bfloat16, which weighs and adds them by rank (Milakov and Gimelshein 2018). NK: rows of keys that
// a block has, key_rows(); those that are no key are zeros and unseen.
#pragma once

#include <climits>

#include "split.cuh"

namespace vla::cuda::head {

// Two rows' 64 columns to the blocks that finish them. acc: of rows r and r + 8 of the tile, scaled by
// inverse[]; octet: the columns' first, in units of 8, of `octets`.
__device__ __forceinline__ void send_outputs(const float (&acc)[32], const float (&inverse)[2], int rows,
                                             const Block& b, int octet, int octets) {
  const unsigned lane = threadIdx.x % 32, odd = lane & 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int owner = warp_index() * 2 + h;
    if (owner * 8 >= rows) continue;
    const uint32_t at = cluster_address(b.exchange(), owner), barrier = cluster_address(b.sums(0), owner);
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

// acc (64 rows, 64 columns) = weights v, on its way. v: wgmma_tile_of_rows.
template <int NK>
__device__ __forceinline__ void weigh(float (&acc)[32], const uint32_t (&weights)[NK / 16][4], uint64_t v) {
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < NK / 16; ++kk)
    wgmma_registers<64>(acc, weights[kk], v + kk * (16 * kChunkBytes >> 4));
  wgmma_commit();
}

// Of the weights' products only the `kLeft` last are still on their way.
template <int kLeft>
__device__ __forceinline__ void arrived(float (&acc)[32]) {
  wgmma_wait<kLeft>();
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// What a thread knows before queries and keys have come: answers of the table and of memory.
struct Attending {
  int rows, columns;
  int key_block, row_block[2];  // of key `thread`, of the rows of this thread's sums
  uint32_t keys, values, queries;
  int its_octet, finished;  // what this thread finishes: 8 columns of a row
  Bits* out;                // where they go; null for none
};
__device__ __forceinline__ Attending attending(const Table& t, const Block& b, const Phase& p) {
  const AttentionPart& a = p.attention;
  const int thread = threadIdx.x, row = sum_place(thread, 0).row;
  const HeadTask task = head_task(p, t.m, b.cluster_number);
  Attending my;
  my.columns = kept(a.columns), my.rows = kept(task.rows);
  // a key is seen by rows whose block is not before its own; one that is not there by none
  const int key = key_of(a, b.rank, thread);
  my.key_block = key < 0                ? INT_MAX
                 : a.k_block != nullptr ? __ldg(a.k_block + static_cast<int64_t>(key) * a.ld_k_block)
                                        : INT_MIN + 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 8 * h, its_row = head_row(task, t.m, r).row;
    my.row_block[h] = r >= my.rows           ? INT_MIN
                      : a.q_block != nullptr ? __ldg(a.q_block + static_cast<int64_t>(its_row) * a.ld_q_block)
                                             : INT_MAX - 1;
  }
  my.keys = b.base + kept(a.at), my.values = my.keys + kept(values_at(p));
  my.queries = my.keys + kept(queries_at(p));
  // of 128 columns or 64; the same of the next 128
  const int shift = my.columns == 1 ? 3 : 4;
  my.finished = thread >> shift, my.its_octet = thread & ((1 << shift) - 1);
  my.out = nullptr;
  if ((t.parts & 8) && my.finished < 8 && b.rank * 8 + my.finished < my.rows) {
    const HeadRow to = head_row(task, t.m, b.rank * 8 + my.finished);
    my.out =
        p.out + act_index(t.rows, to.row, to.head * p.head_dim + task.column * kChunk + my.its_octet * 8);
  }
  asm volatile("" : "+r"(my.key_block), "+r"(my.row_block[0]), "+r"(my.row_block[1]), "+l"(my.out));
  return my;
}

// kPair: groups of 64 columns whose products are on their way together. kJoined: see joined.cuh.
template <int NK, int kPair, bool kJoined>
__device__ __forceinline__ void attention_phase(const Table& t, const Block& b, const Phase& p,
                                                const Attending& my, unsigned g, Carried& state, Watch& w) {
  const int thread = threadIdx.x, warp = warp_index(), lane = thread % 32;
  const bool copies = t.parts & 4, owner = owns(my.rows, b.rank) && (t.parts & 8);
  const int columns = my.columns, octets = 8 * columns, rows = my.rows;
  const int row_block[2] = {my.row_block[0], my.row_block[1]};
  int* key_block;
  {
    extern __shared__ __align__(1024) std::byte shared[];
    key_block = reinterpret_cast<int*>(shared + (b.key_blocks() - b.base));
  }
  if (owner && thread == 0) barrier_expect(b.sums(0), kCluster * 8 * (octets * 16 + 8));
  if (thread < NK) key_block[thread] = my.key_block;
  const int chunks = kept(p.chunks);
  const uint32_t values = my.values;
  const int q_step = kept(p.stack.rows * kChunkBytes >> 4);
  uint32_t q = tile_low(my.queries), k = tile_low(my.keys);
  constexpr int kOctets = 8 * kPair;
  const int finished = my.finished, its_octet = my.its_octet;
  Bits* out = my.out;
  const int out_step = t.rows * kPair * kChunk;
  named_barrier(2, kGroup);
  if (copies) wait_on(b.keys(0), state.keys_parity, w, kForKeys, 0);
  if (t.parts & (kJoined ? 8 : 4)) wait_on(b.keys(1), state.keys_parity, w, kForKeys, 1);
  state.keys_parity ^= 1;
  if (kJoined) shared_proxy_fence();  // what siblings have stored is the matrix unit's to read
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
  int seen_from[NK / 4];  // read while the products are on their way
#pragma unroll
  for (int i = 0; i < NK / 4; ++i) seen_from[i] = key_block[i / 2 * 8 + lane % 4 * 2 + i % 2];
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < NK / 2; ++i) asm volatile("" : "+f"(s[i])::"memory");

  // two rows, each by halves: with one warp a scheduler it is latency that counts
  const float scale = p.scale;  // log2(e) / sqrt(d)
  float high[2][2], sum[2][2] = {}, top[2], total[2], inverse[2], base[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) high[h][0] = high[h][1] = -INFINITY;
#pragma unroll
  for (int i = 0; i < NK / 4; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& e = s[i / 2 * 4 + 2 * h + i % 2];
      e = seen_from[i] <= row_block[h] ? e : -INFINITY;
      high[h][i % 2] = fmaxf(high[h][i % 2], e);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = fmaxf(high[h][0], high[h][1]);
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    top[h] = most * scale, base[h] = most == -INFINITY ? 0.0f : -top[h];
  }
#pragma unroll
  for (int i = 0; i < NK / 4; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& e = s[i / 2 * 4 + 2 * h + i % 2];
      e = quick_exp2(fmaf(e, scale, base[h]));
      sum[h][i % 2] += e;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float all = sum[h][0] + sum[h][1];
    all += __shfl_xor_sync(0xffffffffu, all, 1);
    all += __shfl_xor_sync(0xffffffffu, all, 2);
    total[h] = all, inverse[h] = all > 0.0f ? __fdividef(1.0f, all) : 0.0f;
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
  const bool sends = t.parts & 8;
#pragma unroll 1
  for (int column = 0; column < columns; column += kPair) {
    const uint64_t v = wgmma_tile_of_rows(values + column * NK * kChunkBytes, 0);
    float acc[kPair][32];
#pragma unroll
    for (int i = 0; i < kPair; ++i) weigh<NK>(acc[i], weights, v + i * (NK * kChunkBytes >> 4));
    if (column == 0 && sends && lane % 4 == 0) {  // while the products are on their way
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int to = warp * 2 + h;
        if (to * 8 >= rows) continue;
        send2(cluster_address(b.exchange() + receive_stats(b.rank, lane / 4), to),
              cluster_address(b.sums(0), to), __float_as_uint(top[h]), __float_as_uint(total[h]));
      }
    }
    if constexpr (kPair == 2) {
      arrived<1>(acc[0]);
      if (sends) send_outputs(acc[0], inverse, rows, b, 8 * column, octets);
    }
    arrived<0>(acc[kPair - 1]);
    if (sends) send_outputs(acc[kPair - 1], inverse, rows, b, 8 * (column + kPair - 1), octets);
  }
  stamp(t, g, 2);

  if (owner) {
    wait_on(b.sums(0), state.sums_parity, w, kForSums, 0);
    state.sums_parity ^= 1;
  }
  if (out != nullptr) {
    const uint32_t from = b.exchange();
    float high = -INFINITY, share[kCluster], its[kCluster], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(share[i]), "=f"(its[i])
                   : "r"(from + receive_stats(i, finished))
                   : "memory");
      high = fmaxf(high, share[i]);
    }
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      share[i] = share[i] == -INFINITY ? 0.0f : quick_exp2(share[i] - high) * its[i];
      sum += share[i];
    }
    const float factor = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll 1
    for (int o = its_octet; o < octets; o += kOctets, out += out_step) {
      float y[8] = {};
#pragma unroll
      for (int i = 0; i < kCluster; ++i) {
        uint32_t x[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(from + receive_octet(i, finished, o, octets))
                     : "memory");
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[2 * e] += share[i] * __uint_as_float(x[e] << 16);
          y[2 * e + 1] += share[i] * __uint_as_float(x[e] & 0xffff0000u);
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] *= factor;
      *reinterpret_cast<uint4*>(out) =
          make_uint4(pack2(y[0], y[1]), pack2(y[2], y[3]), pack2(y[4], y[5]), pack2(y[6], y[7]));
    }
  }
  finish(t, g, kGroup);
}

}  // namespace vla::cuda::head
