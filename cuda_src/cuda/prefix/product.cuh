// Products of the persistent prefix: y^T (64 columns, N rows) = W x^T a tile, 128 columns where gated.
//
// A thread has columns c and c + 8 of a tile's 64 (of W's packed rows) of two neighbouring rows of x in each
// unit of 8 rows. The warpgroups take the stages of k in turn and hand each other half of the units; where k
// is split, so do the blocks of a pair. The hidden state stays in float32 in the registers of the threads
// that finish it; what goes to memory is the state times the weight of the norm that reads it, and the rows'
// sums of squares, by which the next product's sums are scaled.
#pragma once

#include "ends.cuh"

namespace vla::cuda::prefix {

// acc (64 rows of W, N rows of x) += W x^T over a tile's chunks: every other stage, or all of them where
// kWide, when either warpgroup has its own 64 rows of W.
//
// Either warpgroup waits for all stages and releases all, also those that it makes nothing of: a barrier
// knows the parity of its phase only, and where the slots are odd in number the next stage in a slot is the
// other's.
template <int N, bool kWide>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Table& t, const Block& b, int chunks,
                                         int per_stage, uint32_t x_at, Ring& ring_state, int group,
                                         Watch& w) {
  const int slots = head::kept(t.slots), bytes = head::kept(t.slot >> 4),
            stages = divide_up(chunks, per_stage);
  const uint32_t ring = head::kept(head::tile_low(b.ring));
  const int own = kWide ? group * (64 * kChunkBytes >> 4) : 0;  // this warpgroup's rows
  int before = -1;
  unsigned parities = ring_state.parities;
  ring_state.use(stages, slots);
  int slot = 0;
  bool there = stages > 0 && head::try_wait(b.full(0), parities & 1);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const int now = slot;
    if (!__all_sync(0xffffffffu, there)) head::wait_on(b.full(now), parities >> now & 1, w, kForStage, now);
    parities ^= 1u << now;
    if (++slot == slots) slot = 0;
    // asked now, used after this stage's products are on their way
    there = stage + 1 < stages && head::try_wait(b.full(slot), parities >> slot & 1);
    if (!kWide && stage % 2 != group) {
      release(b, now, 1);
      continue;
    }
    uint32_t rows = ring + now * bytes + own, x = ring + now * bytes + x_at;
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
    if (!kWide && stage + slots < stages) {  // the slot is waited for: at once
      wgmma_wait<0>();
      if (before >= 0) release(b, before, 1);
      release(b, now, 1);
      before = -1;
      continue;
    }
    wgmma_wait<1>();  // the stage before has been read
    if (before >= 0) release(b, before, 1);
    before = now;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // read no earlier
  if (before >= 0) release(b, before, 1);
}

// Hands over the sums of what others finish and adds theirs: mine[i] of unit i of the first warpgroup, H + i
// of the second (of those of this block, kUnits). The sums of a pair are added as (group 0 + group 1) of one
// block + those of the other: the same bits whoever adds. `between` runs before the warpgroups meet.
template <int N, int kSplit, int kUnits, int H, typename Between>
__device__ __forceinline__ void exchange(float (&mine)[H][4], const float (&acc)[N / 2], const Block& b,
                                         int group, Carried& state, Watch& w, const Between& between) {
  const uint32_t thread = threadIdx.x % kGroup * 16;
  const bool high = kSplit == kPair && b.rank == 1;
  const auto own = [&](int unit, int e) {  // of the units that this block finishes
    return high ? acc[4 * ((kSplit - 1) * kUnits + unit) + e] : acc[4 * unit + e];
  };
  if constexpr (kSplit == kPair) {
    const uint32_t there = cluster_address(b.exchange, b.rank ^ 1),
                   sums = cluster_address(b.sums(), b.rank ^ 1);
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
      head::wait_on(b.full(0), state.ring.parities & 1, w, kForStage, 0);
      squares.ask(t, at.row);
    }
    stamp(t, index, 1);
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
    multiply<N, kGated>(acc, t, b, head::kept(at.chunks()), head::kept(p.stage_chunks),
                        head::kept(x_in_slot(p) >> 4), state.ring, group, w);
    stamp(t, index, 2);
    if constexpr (kGated) {
      squares.leave(b, p.mean, p.eps);
      named_barrier(kAll, kConsumers);
      const Activation act = activation(head::kept(p.act));
      const int c = at.column * 64 + group * 32 + warp * 8 + lane / 4 - odd;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float2 inverse = inverse_of(b, u);
        const float* z = acc + 4 * u;
        const uint32_t both = pair_columns(activate(z[0] * inverse.x, act) * (z[2] * inverse.x),
                                           activate(z[1] * inverse.y, act) * (z[3] * inverse.y));
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
          const uint32_t low = pair_columns(mine[i][0], mine[i][1]),
                         high = pair_columns(mine[i][2], mine[i][3]);
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
