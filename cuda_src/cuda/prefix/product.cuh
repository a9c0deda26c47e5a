// Products of the persistent prefix: y^T (64 columns, N rows) = W x^T a tile, 128 columns where gated.
//
// A thread has columns c and c + 8 of a tile's 64 (of W's packed rows) of two neighbouring rows of x in each
// unit of 8 rows. The warpgroups take the stages of k in turn and hand each other half of the units; where k is
// split, so do the blocks of a pair. The hidden state stays in float32 in the registers of the threads that
// finish it; what goes to memory is the state times the weight of the norm that reads it, and the rows' sums of
// squares, by which the next product's sums are scaled.
#pragma once

#include "block.cuh"
#include "multiply.cuh"

namespace vla::cuda::prefix {

// acc (64 rows of W, N rows of x) += W x^T over a tile's chunks: stages in turn, or all of them where kWide,
// when either warpgroup has its own 64 rows of W. `at`: of the tile's first stage.
template <int N, bool kWide>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Table& t, const Block& b, int chunks,
                                         int per_stage, Slot at, int group, Watch& w) {
  constexpr int kStep = kWide ? 1 : 2, kCount = kWide ? 1 : 2;
  const int slots = head::kept(t.slots), bytes = head::kept(t.slot >> 4), stages = divide_up(chunks, per_stage);
  const uint32_t ring = head::kept(head::tile_low(b.ring)) + (kWide ? group * (64 * kChunkBytes >> 4) : 0);
  int stage = kWide ? 0 : group, before = -1;
  at.skip(stage, slots);
  bool there = stage < stages && head::try_wait(b.full(at.slot), at.parity);
#pragma unroll 1
  for (; stage < stages; stage += kStep) {
    const Slot now = at;
    at.skip(kStep, slots);
    if (!there) head::wait_on(b.full(now.slot), now.parity, w, kForStage, now.slot);
    // asked now, used after this stage's products are on their way
    there = stage + kStep < stages && head::try_wait(b.full(at.slot), at.parity);
    uint32_t rows = ring + now.slot * bytes, x = head::tile_low(b.ring) + now.slot * bytes + (kWeightBytes >> 4);
    int left = min(per_stage, chunks - stage * per_stage);
#pragma unroll 1
    do {
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        head::multiply_add<N>(acc, head::tile_of(rows + 2 * kk), head::tile_of(x + 2 * kk));
      wgmma_commit();
      rows += 64 * kChunkBytes >> 4, x += N * kChunkBytes >> 4;
    } while (--left > 0);
    wgmma_wait<1>();  // the stage before has been read
    if (before >= 0) release(b, before, kCount);
    before = now.slot;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // read no earlier
  if (before >= 0) release(b, before, kCount);
}

__device__ __forceinline__ void store4(uint32_t to, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ float4 load4(uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// The tile's rows' 1 / rms, four threads a row, from the parts of its sum of squares: asked for before the
// products, left in shared memory after them.
template <int N>
struct Squares {
  static constexpr int kTurns = divide_up(N, 64);
  float4 part[kTurns][4];

  __device__ __forceinline__ void ask(const Table& t, int row0) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = min(row0 + i * 64 + static_cast<int>(threadIdx.x / 4), kMaxRows - 1);
      const auto* from = reinterpret_cast<const float4*>(t.squares + row * kSquareParts) + threadIdx.x % 4 * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) part[i][j] = __ldcg(from + j);
    }
  }
  __device__ __forceinline__ void leave(const Block& b, float mean, float eps) const {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = i * 64 + static_cast<int>(threadIdx.x / 4);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum += (part[i][j].x + part[i][j].y) + (part[i][j].z + part[i][j].w);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (threadIdx.x % 4 == 0 && row < N)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(b.inverse + row * 4), "f"(rsqrtf(sum * mean + eps)) : "memory");
    }
  }
};
// Of this thread's two rows of a unit.
__device__ __forceinline__ float2 inverse_of(const Block& b, int unit) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(b.inverse + (unit * 8 + threadIdx.x % 4 * 2) * 4)
               : "memory");
  return v;
}

// Hands over the sums of what others finish and adds theirs: mine[i] of unit i of the first warpgroup, H + i
// of the second (of those of this block, kUnits). The sums of a pair are added as (group 0 + group 1) of one
// block + those of the other: the same bits whoever adds. `between` runs before the warpgroups meet.
template <int N, int kSplit, int kUnits, int H, typename Between>
__device__ __forceinline__ void exchange(float (&mine)[H][4], const float (&acc)[N / 2], const Block& b, int group,
                                         Carried& state, Watch& w, const Between& between) {
  const uint32_t thread = threadIdx.x % kGroup * 16;
  const bool high = kSplit == kPair && b.rank == 1;
  const auto own = [&](int unit, int e) {  // of the units that this block finishes
    return high ? acc[4 * ((kSplit - 1) * kUnits + unit) + e] : acc[4 * unit + e];
  };
  if constexpr (kSplit == kPair) {
    const uint32_t there = cluster_address(b.exchange, b.rank ^ 1), sums = cluster_address(b.sums(), b.rank ^ 1);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = high ? acc[4 * u + e] : acc[4 * (kUnits + u) + e];
      send4(there + received_at(kUnits, group, u) + thread, sums, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
#pragma unroll
  for (int i = 0; i < H; ++i) {
    const int second = H + i < kUnits ? H + i : 0;
    if (group == 0 && H + i >= kUnits) continue;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = group == 0 ? own(second, e) : own(i, e);
    store4(b.exchange + (group == 0 ? second : i) * kUnitBytes + thread, v[0], v[1], v[2], v[3]);
  }
  between();
  named_barrier(kAll, kConsumers);
  if constexpr (kSplit == kPair) {
    head::wait_on(b.sums(), state.sums_parity, w, kForPair, 0);
    state.sums_parity ^= 1;
  }
#pragma unroll
  for (int i = 0; i < H; ++i) {
    const int second = H + i < kUnits ? H + i : 0, unit = group == 0 ? i : second;
    const float4 other = load4(b.exchange + unit * kUnitBytes + thread);
    float v[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] += group == 0 ? own(i, e) : own(second, e);
    if constexpr (kSplit == kPair) {
      const float4 first = load4(b.exchange + received_at(kUnits, 0, unit) + thread),
                   last = load4(b.exchange + received_at(kUnits, 1, unit) + thread);
      v[0] += first.x + last.x, v[1] += first.y + last.y, v[2] += first.z + last.z, v[3] += first.w + last.w;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) mine[i][e] = v[e];
  }
}

// Lanes four apart have neighbouring columns of the same two rows, a and b: the even column's gets both of row
// a, the odd one's both of row b.
__device__ __forceinline__ bool odd_column() { return threadIdx.x / 4 & 1; }
__device__ __forceinline__ uint32_t pair_columns(float a, float b) {
  const bool odd = odd_column();
  const float other = __shfl_xor_sync(0xffffffffu, odd ? a : b, 4);
  return odd ? pack2(other, b) : pack2(a, other);
}
__device__ __forceinline__ void store_pair(Bits* out, int rows, int row, int column, uint32_t v) {
  *reinterpret_cast<uint32_t*>(out + act_index(rows, row, column)) = v;
}

// The hidden state's new sums in: z of a block's kUnits units from row `row` on, of column tile `column`.
template <int kUnits, int H>
__device__ __forceinline__ void end_state(float (&z)[H][4], const Table& t, const Phase& p, int column, int row,
                                          const float (&next)[2], int group, Carried& state) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, c = column * 64 + warp * 16 + lane / 4;
  const int odd = odd_column();
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (group == 1 && H + i >= kUnits) continue;
    const int first = row + 8 * (group == 0 ? i : H + i) + lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) state.state[i][e] = z[i][e] += state.state[i][e];
    float a = z[i][0] * z[i][0] + z[i][2] * z[i][2], b = z[i][1] * z[i][1] + z[i][3] * z[i][3];
#pragma unroll
    for (int o = 4; o < 32; o *= 2)
      a += __shfl_xor_sync(0xffffffffu, a, o), b += __shfl_xor_sync(0xffffffffu, b, o);
    if (lane < 4) {
      float* squares = t.squares + first * kSquareParts + column * 4 + warp;
      if (first < t.m) squares[0] = a;
      if (first + 1 < t.m) squares[kSquareParts] = b;
    }
    const uint32_t low = pair_columns(z[i][0] * next[0], z[i][1] * next[0]),
                   high = pair_columns(z[i][2] * next[1], z[i][3] * next[1]);
    if (first + odd < t.m) {
      store_pair(p.out, t.rows, first + odd, c - odd, low);
      store_pair(p.out, t.rows, first + odd, c + 8 - odd, high);
    }
  }
}

// Cosines and sines of this thread's column of a head, for its rows, asked for ahead.
template <int H>
struct Rotation {
  float cosine[H][2], sine[H][2];

  __device__ __forceinline__ void ask(const Table& t, int part, int row, int group) {
    const int lane = threadIdx.x % 32, c = threadIdx.x / 32 % 4 * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < H; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        cosine[i][h] = 1.0f, sine[i][h] = 0.0f;
        if (part == 2) continue;
        const int r = min(row + 8 * (group * H + i) + lane % 4 * 2 + h, t.m - 1);
        const int position = __ldg(t.positions + r * t.ld_positions);
        const bool inside = static_cast<unsigned>(position) < static_cast<unsigned>(t.rope_rows);
        const float* from = t.rope + (inside ? position : 0) * t.ld_rope + c;
        cosine[i][h] = __ldg(from), sine[i][h] = __ldg(from + kHead / 2);
      }
    }
  }
};

template <int kUnits, int H>
__device__ __forceinline__ void end_qkv(float (&z)[H][4], const Table& t, const Block& b, const Phase& p,
                                        const HeadOf& of, int row, const Rotation<H>& r, int group) {
  const int lane = threadIdx.x % 32, odd = odd_column();
  const int c = of.head * kHead + threadIdx.x / 32 % 4 * 8 + lane / 4 - odd;
  Bits* const out = of.part == 0 ? p.out : of.part == 1 ? t.k : t.v;
  Bits* const cache = of.part == 1 ? p.cache_k : p.cache_v;
  const int64_t ld = of.part == 1 ? p.ld_k : p.ld_v;
  const int rows = of.part == 0 ? t.rows : 2 * t.key_rows;
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (group == 1 && H + i >= kUnits) continue;
    const int unit = group == 0 ? i : H + i, its = row + 8 * unit + lane % 4 * 2 + odd;
    const float2 inverse = inverse_of(b, unit);
    const float x[2] = {z[i][0] * inverse.x, z[i][1] * inverse.y}, y[2] = {z[i][2] * inverse.x, z[i][3] * inverse.y};
    const float* cosine = r.cosine[i];
    const float* sine = r.sine[i];
    const uint32_t low = pair_columns(x[0] * cosine[0] - y[0] * sine[0], x[1] * cosine[1] - y[1] * sine[1]),
                   high = pair_columns(y[0] * cosine[0] + x[0] * sine[0], y[1] * cosine[1] + x[1] * sine[1]);
    if (its >= t.m) continue;
    store_pair(out, rows, its, c, low);
    store_pair(out, rows, its, c + kHead / 2, high);
    if (of.part > 0) {
      *reinterpret_cast<uint32_t*>(cache + its * ld + c) = low;
      *reinterpret_cast<uint32_t*>(cache + its * ld + c + kHead / 2) = high;
    }
  }
}

template <Kind kKind, int N, int kSplit>
__device__ __forceinline__ void product_phase(const Table& t, const Block& b, const Phase& p, int index,
                                              Carried& state, Watch& w) {
  constexpr bool kGated = kKind == Kind::kGated, kNormed = kGated || kKind == Kind::kQkv;
  constexpr int kUnits = N / 8 / kSplit, H = units_first(kUnits);
  const int group = warp_index() / 4, lane = threadIdx.x % 32, warp = warp_index() % 4, odd = odd_column();
#pragma unroll 1
  for (int tile = first_tile(p, b.cta); tile < tiles_of(p); tile += p.ctas) {
    const Tile at = tile_at(p, tile, b.cta);
    const int row = at.row + (kSplit == kPair ? b.rank * kUnits * 8 : 0);
    if (kSplit == kPair && threadIdx.x == 0) barrier_expect(b.sums(), 2 * kUnits * kUnitBytes);
    [[maybe_unused]] float next[2] = {1.0f, 1.0f};
    [[maybe_unused]] Rotation<kKind == Kind::kQkv ? H : 1> rotation;
    [[maybe_unused]] HeadOf of{0, 0};
    if constexpr (kKind == Kind::kLinear) {
      if (p.next != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          next[i] = p.next_plus + __ldg(p.next + at.column * 64 + warp * 16 + i * 8 + lane / 4);
      }
    }
    if constexpr (kKind == Kind::kQkv) {
      of = head_of(p.heads, at.column);
      rotation.ask(t, t.rope == nullptr ? 2 : of.part, row, group);
    }
    [[maybe_unused]] Squares<N> squares;
    if constexpr (kNormed) {
      // (that x has come says that all blocks are done with the groups before)
      Slot first = state.at;
      if (!kGated) first.skip(group, t.slots);
      head::wait_on(b.full(first.slot), first.parity, w, kForStage, first.slot);
      squares.ask(t, at.row);
    }
    stamp(t, index, 1);
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
    multiply<N, kGated>(acc, t, b, head::kept(at.chunks()), head::kept(p.stage_chunks), state.at, group, w);
    state.at.skip(stages_of(p, at), t.slots);
    stamp(t, index, 2);
    if constexpr (kGated) {
      squares.leave(b, p.mean, p.eps);
      named_barrier(kAll, kConsumers);
      const int act = head::kept(p.act), c = at.column * 64 + group * 32 + warp * 8 + lane / 4 - odd;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float2 inverse = inverse_of(b, u);
        const float* z = acc + 4 * u;
        const uint32_t both = pair_columns(head::quick_act(z[0] * inverse.x, act) * (z[2] * inverse.x),
                                           head::quick_act(z[1] * inverse.y, act) * (z[3] * inverse.y));
        const int its = row + 8 * u + lane % 4 * 2 + odd;
        if (its < t.m) store_pair(p.out, t.rows, its, c, both);
      }
    } else {
      float mine[H][4];
      exchange<N, kSplit, kUnits, H>(mine, acc, b, group, state, w, [&] {
        if constexpr (kNormed) squares.leave(b, p.mean, p.eps);
      });
      if constexpr (kKind == Kind::kQkv) {
        end_qkv<kUnits, H>(mine, t, b, p, of, row, rotation, group);
      } else if constexpr (kKind == Kind::kLinear) {
        end_state<kUnits, H>(mine, t, p, at.column, row, next, group, state);
      } else {
        const int c = at.column * 64 + warp * 16 + lane / 4 - odd;
#pragma unroll
        for (int i = 0; i < H; ++i) {
          if (group == 1 && H + i >= kUnits) continue;
          const uint32_t low = pair_columns(mine[i][0], mine[i][1]), high = pair_columns(mine[i][2], mine[i][3]);
          const int its = row + 8 * (group == 0 ? i : H + i) + lane % 4 * 2 + odd;
          if (its >= t.m) continue;
          *reinterpret_cast<uint32_t*>(p.out + its * p.ld_out + c) = low;
          *reinterpret_cast<uint32_t*>(p.out + its * p.ld_out + c + 8) = high;
        }
      }
    }
    named_barrier(kAll, kConsumers);  // the exchange is free again, everything is stored
  }
  if (threadIdx.x == 0) head::add_done(t.counter);
  stamp(t, index, 3);
}

}  // namespace vla::cuda::prefix
