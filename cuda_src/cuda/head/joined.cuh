// q, k and v of a head within the cluster that then does the head's attention: one wait between all blocks
// for both. Each block has a few columns of each (layout.h, joined_column) and all of k, x by multicast; what
// it has goes straight to where its siblings' attention reads it, all queries to all, keys and values to the
// block that has their rows. By the first warpgroup: a product waits for x from shared memory, whoever asks
// for it.
#pragma once

#include "attention.cuh"

namespace vla::cuda::head {

// The four lanes of a quad have two words each, of row r and of row r + 8: a place of an octet in the low
// half, the fourth after it in the high half (layout.h, joined_place). Now a lane has four places of one row:
// of row r + 8 in odd lanes, the second four in the last two.
struct HalfOctet {
  uint32_t x, y;
};
__device__ __forceinline__ HalfOctet half_octet(const uint32_t (&words)[2]) {
  const unsigned lane = threadIdx.x;
  const bool odd = lane & 1, second = lane & 2;
  const uint32_t mine = odd ? words[1] : words[0];
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
  const uint32_t left = odd ? other : mine, right = odd ? mine : other;
  const uint32_t low = __byte_perm(left, right, 0x5410), high = __byte_perm(left, right, 0x7632);
  const uint32_t next = __shfl_xor_sync(0xffffffffu, second ? low : high, 2);
  return {second ? next : low, second ? high : next};
}
// Octets of two such: the first two lanes of a quad have the whole of `a`, the last two that of `b`.
__device__ __forceinline__ uint4 octet_of(const HalfOctet& a, const HalfOctet& b) {
  const bool second = threadIdx.x & 2;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, second ? a.x : b.x, 2),
                 y = __shfl_xor_sync(0xffffffffu, second ? a.y : b.y, 2);
  return second ? make_uint4(x, y, b.x, b.y) : make_uint4(a.x, a.y, x, y);
}
__device__ __forceinline__ void send_octet(uint32_t to, uint32_t barrier, const uint4& v) {
  send4(to, barrier,
        make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)));
}

// kParts: q, k and v, or q alone. `p`: the projection; `next`: its attention.
template <int kParts>
__device__ __forceinline__ void joined_products(const Table& t, const Block& b, const Phase& p,
                                                const Phase& next, const Attending& my, int step, unsigned g,
                                                Carried& state, Watch& w) {
  constexpr int N = kParts * kJoinedColumns;
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // what follows from it is found here, not kept through all phases
  const int lane = thread % 32;
  const Shape shape = shape_of(t, p, b, share_of(p, b.cta), 0, state);
  const bool copies = t.parts & 4, sends = t.parts & 8;
  const int row = sum_place(thread, 0).row, m = kept(t.m), rows = kept(t.rows);
  float cosine[2] = {1.0f, 1.0f}, sine[2] = {}, shift[kParts][2] = {};
  if (p.qkv.rope != nullptr) {
    const int column = joined_column(0, b.rank, thread % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = __ldg(p.qkv.positions + min(row + 8 * h, m - 1) * p.qkv.ld_positions);
      const bool inside = static_cast<unsigned>(position) < static_cast<unsigned>(p.qkv.rope_rows);
      const float* rope = p.qkv.rope + static_cast<int64_t>(inside ? position : 0) * p.qkv.ld_rope + column;
      cosine[h] = __ldg(rope), sine[h] = __ldg(rope + kChunk / 2);
    }
  }
  if (const float* shifts = p.shift.at(step)) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const SourceRow source = source_row(p, b.cta, part * kJoinedColumns + 2 * (thread % 4) + i);
        shift[part][i] = __ldg(shifts + shift_row(p, part, source.row));
      }
    }
  }
  const bool normed = kept(p.normed);
  const float eps = p.eps, mean = p.mean;
  const float* squares_in = p.squares_in;
  // what this lane sends, see half_octet(): an octet of a row of q to every second block; of k or of v
  const int its_row = row + lane % 2 * 8, second = lane / 2 % 2;
  const uint32_t query_to = my.queries + 2 * act_index(0, its_row, kJoinedColumns * b.rank);
  const uint32_t key_to =
      (second ? my.values : my.keys) +
      2 * act_index(0, kept(next.attention.prefix_rows) + its_row % kFreshRows, kJoinedColumns * b.rank);
  if (copies) wait_on(b.x_full(), state.x_parity, w, kForX, 0);
  state.x_parity ^= 1;
  stamp(t, g, 1);
  Squares squares[2] = {};
  if (normed) squares[0] = read_squares(squares_in, row), squares[1] = read_squares(squares_in, row + 8);
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  multiply<N, 1>(acc, t, b, shape, 0, w);
  stamp(t, g, 2);
  if (sends) {
    float rms[2] = {1.0f, 1.0f};
    if (normed) rms[0] = inverse_rms(squares[0], mean, eps), rms[1] = inverse_rms(squares[1], mean, eps);
    HalfOctet mine[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t words[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = acc[4 * part + 2 * h] * rms[h] + shift[part][0],
                    y = acc[4 * part + 2 * h + 1] * rms[h] + shift[part][1];
        words[h] = part < 2 ? pack2(x * cosine[h] - y * sine[h], y * cosine[h] + x * sine[h]) : pack2(x, y);
        // keys that are not there are unseen, but must be numbers: 0 times a NaN is one
        if (row + 8 * h >= m) words[h] = 0;
      }
      mine[part] = half_octet(words);
    }
    if (kParts == 3) {  // to the block that has their rows: its_row / kFreshRows
      const unsigned owner = warp_index() * 2 + lane % 2;
      send_octet(cluster_address(key_to, owner), cluster_address(b.keys(1), owner),
                 octet_of(mine[1], mine[kParts - 1]));
    }
    const uint4 query = octet_of(mine[0], mine[0]);
    if (its_row < rows) {
#pragma unroll
      for (int i = 0; i < kCluster; i += 2) {
        const unsigned to = (b.rank + i + second) % kCluster;  // not all to the same at once
        send_octet(cluster_address(query_to, to), cluster_address(b.keys(1), to), query);
      }
    }
  }
  if (thread == 0) report_joined(t);
  if (t.stamps && b.cta == 0 && thread == 0) {
    const int64_t clock = clock64();
    t.stamps[(g - 1) * 4 + 3] = clock, t.stamps[g * 4] = clock;
  }
}

// Both phases.
__device__ __forceinline__ void joined_phase(const Table& t, const Block& b, const Phase& p,
                                             const Phase& next, int step, unsigned g, Carried& state,
                                             Watch& w) {
  if (warp_index() / 4 == 0) {
    const Attending my = attending(t, b, next);
    if (p.tile_rows == kJoinedColumns) {
      joined_products<1>(t, b, p, next, my, step, g, state, w);
    } else {
      joined_products<3>(t, b, p, next, my, step, g, state, w);
    }
    if (key_rows(next.attention) == key_rows_made(0)) {
      attention_phase<key_rows_made(0), 1, true>(t, b, next, my, g + 1, state, w);
    } else {
      attention_phase<kJoinedKeys, 1, true>(t, b, next, my, g + 1, state, w);
    }
  } else {  // it may not run ahead of x's barrier, and knows where the next weights are
    shape_of(t, p, b, share_of(p, b.cta), 0, state);
    if (t.parts & 4) wait_on(b.x_full(), state.x_parity, w, kForX, 0);
    state.x_parity ^= 1;
  }
}

}  // namespace vla::cuda::head
