// Products of which every block has its own columns and all of k: q, k and v with rotation, and the gated
// product.
//
// y (m, n) = act-or-rotation((x W^T) / rms(x) + shift). x carries the norm's weight already (the phase that
// wrote it put it in), shift = norm.bias W^T. A unit of 16 packed rows of W has its two groups of 8 columns
// in the same thread's registers: the halves of a head, or gate and up.
#pragma once

#include "block.cuh"

namespace vla::cuda::head {

// What goes with a unit of 16 columns, read while x is on its way: a thread has columns c, c + 1 of both
// groups of 8. (Straight code is what this kernel's time is made of, so: no divisions, and nothing twice.)
template <int U>
struct UnitConstants {
  float2 shift[U][2];
  float2 cosine[U][2], sine[U][2];  // of rows r and r + 8
};

template <Kind kKind, int U>
__device__ __forceinline__ void read_constants(UnitConstants<U>& k, const Table& t, const Phase& p, int unit0,
                                               int units, int step, int row) {
  const int c = threadIdx.x % 4 * 2;
  const float* shift = p.shift.at(step);
  const float* rope[2] = {};
  if (kKind == Kind::kQkv && p.qkv.rope != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = min(row + 8 * h, t.m - 1);
      const int position = __ldg(p.qkv.positions + r * p.qkv.ld_positions);
      const bool inside = static_cast<unsigned>(position) < static_cast<unsigned>(p.qkv.rope_rows);
      rope[h] = p.qkv.rope + static_cast<int64_t>(inside ? position : 0) * p.qkv.ld_rope + c;
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    k.shift[u][0] = k.shift[u][1] = make_float2(0.0f, 0.0f);
    k.cosine[u][0] = k.cosine[u][1] = make_float2(1.0f, 1.0f);
    k.sine[u][0] = k.sine[u][1] = make_float2(0.0f, 0.0f);
    const int unit = unit0 + u;
    if (unit >= units) continue;
    const Octets o = kKind == Kind::kQkv ? octets_of(p, unit) : Octets{0, unit * 8, unit * 8};
    if (shift != nullptr) {
      const int second = kKind == Kind::kGated ? 1 : o.part;
      k.shift[u][0] = __ldg(reinterpret_cast<const float2*>(shift + shift_row(p, o.part, o.first + c)));
      k.shift[u][1] = __ldg(reinterpret_cast<const float2*>(shift + shift_row(p, second, o.second + c)));
    }
    if (kKind == Kind::kQkv && rope[0] != nullptr && o.part < 2) {
      const int column = o.first & (p.head_dim - 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        k.cosine[u][h] = __ldg(reinterpret_cast<const float2*>(rope[h] + column));
        k.sine[u][h] = __ldg(reinterpret_cast<const float2*>(rope[h] + p.head_dim / 2 + column));
      }
    }
  }
}

// This warp reads no more of x before the attention that follows phase `index`: its keys may come. For every
// such attention that the block has a part in, once, or the loader would wait for ever; for no other, or the
// barrier would get ahead of the loader.
template <int C>
__device__ __forceinline__ void release_x(const Table& t, const Block& b, const Phase& p, int index) {
  if (p.kind != Kind::kQkv || !(t.parts & 4) || !is_busy(t.phase[index + 1], b.cta, t.rows, C)) return;
  if (threadIdx.x % 32 == 0) barrier_arrive(b.free_x());
}

template <Kind kKind, int N, int C>
__device__ __forceinline__ void spread_phase(const Table& t, const Block& b, const Phase& p, int index,
                                             int step, unsigned g, Carried& state, Watch& w) {
  constexpr int U = N / 16;
  const int thread = threadIdx.x, row = sum_place(thread, 0).row, c = thread % 4 * 2;
  const Share s = share_of(p, b.cta, C);
  const int per_tile = p.tile_rows / 16, unit0 = s.tile * per_tile, units = min(p.units, unit0 + per_tile);
  UnitConstants<U> k;
  read_constants<kKind>(k, t, p, unit0, units, step, row);
  const int arrive = arriving(p, b.cta, C);
  const bool copies = t.parts & 4;
  if (copies) wait_on(b.x_full(0), state.x_parity & 1, w, kForX, 0);
  stamp(t, g, 1);
  Squares squares[2] = {};
  if (p.normed) squares[0] = read_squares(p, row), squares[1] = read_squares(p, row + 8);
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  if (s.count() > 0) {
    multiply<N>(acc, t, b, p, s, state, w);
  } else if (copies) {
#pragma unroll 1
    for (int i = 0; i < arrive; ++i) wait_on(b.x_full(i), state.x_parity >> i & 1, w, kForX, i);
  }
  if (copies) state.x_parity ^= (1u << arrive) - 1;
  release_x<C>(t, b, p, index);
  stamp(t, g, 2);
  float rms[2] = {1.0f, 1.0f};
  if (p.normed) rms[0] = inverse_rms(p, squares[0]), rms[1] = inverse_rms(p, squares[1]);
  if (t.parts & 8) {
    const bool there[2] = {row < t.m, row + 8 < t.m};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int unit = unit0 + u;
      if (unit >= units) continue;
      const Octets o = kKind == Kind::kQkv ? octets_of(p, unit) : Octets{0, unit * 8, unit * 8};
      uint32_t low[2], high[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 first = make_float2(acc[8 * u + 2 * h], acc[8 * u + 2 * h + 1]);
        float2 second = make_float2(acc[8 * u + 4 + 2 * h], acc[8 * u + 4 + 2 * h + 1]);
        first.x = first.x * rms[h] + k.shift[u][0].x, first.y = first.y * rms[h] + k.shift[u][0].y;
        second.x = second.x * rms[h] + k.shift[u][1].x, second.y = second.y * rms[h] + k.shift[u][1].y;
        if (kKind == Kind::kGated) {
          low[h] = pack2(quick_act(first.x, p.act) * second.x, quick_act(first.y, p.act) * second.y);
        } else {  // (values pass: cosine 1, sine 0)
          const float2 cosine = k.cosine[u][h], sine = k.sine[u][h];
          low[h] = pack2(first.x * cosine.x - second.x * sine.x, first.y * cosine.y - second.y * sine.y);
          high[h] = pack2(second.x * cosine.x + first.x * sine.x, second.y * cosine.y + first.y * sine.y);
        }
      }
      // rows r and r + 8 are a fixed step apart
      Bits *to, *to_high = nullptr;
      unsigned apart = 8 * kChunk;
      if (kKind == Kind::kGated) {
        to = p.out + act_index(t.rows, row, o.first + c);
      } else if (o.part == 0) {
        to = p.out + act_index(t.rows, row, o.first + c),
        to_high = p.out + act_index(t.rows, row, o.second + c);
      } else {
        Bits* base = o.part == 1 ? p.qkv.fresh_k : p.qkv.fresh_v;
        to = base + fresh_index(p, row, o.first + c, C),
        to_high = base + fresh_index(p, row, o.second + c, C);
        apart = fresh_step(p);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!there[h]) continue;
        *reinterpret_cast<uint32_t*>(to + h * apart) = low[h];
        if (kKind == Kind::kQkv) *reinterpret_cast<uint32_t*>(to_high + h * apart) = high[h];
      }
    }
  }
  finish(t, g, kGroup);
}

}  // namespace vla::cuda::head
