// Products of which every block has its own columns and all of k: q, k and v with rotation, and the gated
// product.
//
// y (m, n) = act-or-rotation((x W^T) / rms(x) + shift). x carries the norm's weight already (the phase that
// wrote it put it in), shift = norm.bias W^T. A unit of 16 packed rows of W has its two groups of 8 columns
// in the same thread's registers: the halves of a head, or gate and up.
#pragma once

#include "block.cuh"

namespace vla::cuda::head {

// What goes with a unit of 16 columns, found while x is on its way: a thread has columns c, c + 1 of both
// groups of 8 of one row. (Straight code is what this kernel's time is made of, so: no divisions, nothing
// twice, and nothing after the products that can be done before.)
template <int U>
struct UnitConstants {
  float2 shift[U][2];
  float2 cosine[U], sine[U];
  Bits *to[U], *to_high[U];  // where the group's results go; null where there is no such unit or row
};

template <Kind kKind, int U>
__device__ __forceinline__ void read_constants(UnitConstants<U>& k, const Table& t, const Phase& p, int unit0,
                                               int units, int step, int row) {
  const int c = threadIdx.x % 4 * 2;
  const float* shift = p.shift.at(step);
  const float* rope = nullptr;
  if (kKind == Kind::kQkv && p.qkv.rope != nullptr) {
    const int r = min(row, t.m - 1), position = __ldg(p.qkv.positions + r * p.qkv.ld_positions);
    const bool inside = static_cast<unsigned>(position) < static_cast<unsigned>(p.qkv.rope_rows);
    rope = p.qkv.rope + static_cast<int64_t>(inside ? position : 0) * p.qkv.ld_rope + c;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    k.shift[u][0] = k.shift[u][1] = make_float2(0.0f, 0.0f);
    k.cosine[u] = make_float2(1.0f, 1.0f), k.sine[u] = make_float2(0.0f, 0.0f);
    k.to[u] = k.to_high[u] = nullptr;
    const int unit = unit0 + u;
    if (unit >= units) continue;
    const Octets o = kKind == Kind::kQkv ? octets_of(p, unit) : Octets{0, unit * 8, unit * 8};
    if (shift != nullptr) {
      const int second = kKind == Kind::kGated ? 1 : o.part;
      k.shift[u][0] = __ldg(reinterpret_cast<const float2*>(shift + shift_row(p, o.part, o.first + c)));
      k.shift[u][1] = __ldg(reinterpret_cast<const float2*>(shift + shift_row(p, second, o.second + c)));
    }
    if (rope != nullptr && o.part < 2) {
      const int column = o.first & (p.head_dim - 1);
      k.cosine[u] = __ldg(reinterpret_cast<const float2*>(rope + column));
      k.sine[u] = __ldg(reinterpret_cast<const float2*>(rope + p.head_dim / 2 + column));
    }
    if (row >= t.m) continue;
    if (kKind == Kind::kGated) {
      k.to[u] = p.out + act_index(t.rows, row, o.first + c);
    } else if (o.part == 0) {
      const QueryRow q = query_row(p, t.m, row, o.first >> p.head_shift);
      const int in_head = (1 << p.head_shift) - 1;
      k.to[u] = p.out + q.before + act_index(p.stack.rows, q.row, (o.first + c) & in_head),
      k.to_high[u] = p.out + q.before + act_index(p.stack.rows, q.row, (o.second + c) & in_head);
    } else {
      Bits* base = o.part == 1 ? p.qkv.fresh_k : p.qkv.fresh_v;
      k.to[u] = base + fresh_index(p, row, o.first + c),
      k.to_high[u] = base + fresh_index(p, row, o.second + c);
    }
  }
}

// This warp reads no more of x before the attention that follows phase `index`: its keys may come. Once for
// every such attention that the block has a part in, or the loader would wait for ever; for no other, or the
// barrier would get ahead of the loader.
__device__ __forceinline__ void release_x(const Table& t, const Block& b, const Phase& p, int index) {
  if (p.kind != Kind::kQkv || !(t.parts & 4) || !is_busy(t.phase[index + 1], b.cta, t.rows)) return;
  if (threadIdx.x % 32 == 0) barrier_arrive(b.free_x());
}

template <Kind kKind, int N>
__device__ __forceinline__ void spread_phase(const Table& t, const Block& b, const Phase& p, int index,
                                             int step, unsigned g, Carried& state, Watch& w) {
  constexpr int U = N / 16;
  const int thread = threadIdx.x, group = warp_index() / 4,
            row = sum_place(thread % kGroup, 0).row + 8 * group;
  const Share s = share_of(p, b.cta);
  const Shape shape = shape_of(t, p, b, s, group, state);
  const int per_tile = p.tile_rows / 16, unit0 = s.tile * per_tile, units = min(p.units, unit0 + per_tile);
  UnitConstants<U> k;
  read_constants<kKind>(k, t, p, unit0, units, step, row);
  const Activation act(kept(p.act));
  const bool copies = t.parts & 4, normed = kept(p.normed);
  const float eps = p.eps, mean = p.mean;
  const float* squares_in = p.squares_in;
  if (copies) wait_on(b.x_full(), state.x_parity, w, kForX, 0);
  state.x_parity ^= 1;
  stamp(t, g, 1);
  Squares squares = {};
  if (normed) squares = read_squares(squares_in, row);
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  multiply<N, 2>(acc, t, b, shape, group, w);
  release_x(t, b, p, index);
  stamp(t, g, 2);
  if ((t.parts & 8) && shape.count > 0) {
    const float rms = normed ? inverse_rms(squares, mean, eps) : 1.0f;
    float mine[N / 4];
    swap_rows<N>(mine, acc, b, group);
    // all units at once: where one has its branch, the next waits for it
    uint32_t low[U], high[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const float2 shift0 = k.shift[u][0], shift1 = k.shift[u][1];
      const float2 first = make_float2(mine[4 * u] * rms + shift0.x, mine[4 * u + 1] * rms + shift0.y),
                   second = make_float2(mine[4 * u + 2] * rms + shift1.x, mine[4 * u + 3] * rms + shift1.y);
      if (kKind == Kind::kGated) {
        low[u] = pack2(act(first.x) * second.x, act(first.y) * second.y);
      } else {  // (values pass: cosine 1, sine 0)
        const float2 cosine = k.cosine[u], sine = k.sine[u];
        low[u] = pack2(first.x * cosine.x - second.x * sine.x, first.y * cosine.y - second.y * sine.y);
        high[u] = pack2(second.x * cosine.x + first.x * sine.x, second.y * cosine.y + first.y * sine.y);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (k.to[u] == nullptr) continue;
      *reinterpret_cast<uint32_t*>(k.to[u]) = low[u];
      if (kKind == Kind::kQkv) *reinterpret_cast<uint32_t*>(k.to_high[u]) = high[u];
    }
  }
  finish(t, g, kConsumers);
}

}  // namespace vla::cuda::head
