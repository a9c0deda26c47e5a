// Products of the persistent vision encoder. A warpgroup has 64 rows of a tile: a thread rows r and r + 8 of
// its warp's 16, and of each unit of 8 columns two neighbouring ones.
//
// A norm before a product is taken into its end: the left operand is x gamma, and
//   norm(x) W^T + bias = (x gamma W^T - mean (gamma W^T)) / deviation + (bias + beta W^T),
// mean and deviation from the sums and sums of squares that whoever wrote x has left. Products into the
// hidden state have their k split over the blocks of a pair, which give each other half of the columns of
// their sums; the hidden state itself is float32, in memory that only the block that finishes it reads again.
#pragma once

#include "../head/multiply.cuh"
#include "ends.cuh"

namespace vla::cuda::vision {

// acc (64 rows, N columns) += x W^T over a tile's stages. Every warpgroup waits for every stage.
template <typename S, int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Block<S>& b, int stages, Place& at,
                                         int group, Watch& w) {
  const uint32_t ring = head::kept(head::tile_low(b.ring)), own = group * (64 * kChunkBytes >> 4);
  int before = -1;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    head::wait_on(b.full(at.slot), at.parity, w, kForStage, at.slot);
    const uint32_t x = ring + at.slot * (S::kSlotBytes >> 4), columns = x + (Of<S>::kBytesOfX >> 4);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk)
      head::multiply_add<N>(acc, head::tile_of(x + own + 2 * kk), head::tile_of(columns + 2 * kk));
    wgmma_commit();
    wgmma_wait<1>();  // the stage before has been read
    if (before >= 0) b.release(before);
    before = at.slot;
    at.next<S>();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // read no earlier
  if (before >= 0) b.release(before);
}

// q, k and v, and fc1: a product behind a norm.
template <typename S, Kind kKind, int N>
__device__ __forceinline__ void normed_phase(const Params& p, const Block<S>& b, int layer, Carried& carried,
                                             Watch& w) {
  constexpr int kUnits = N / 8;
  const Table& t = p.t;
  const int group = warp_index() / 4, warp = warp_index(), lane = threadIdx.x % 32;
  const int tiles = tiles_of(t, kKind), columns = kKind == Kind::kQkv ? 3 * t.width : t.mlp;
  const unsigned number = number_of(layer, static_cast<int>(kKind));
  if (first_tile(kKind, b.cta) >= tiles) return;
#pragma unroll 1
  for (int tile = first_tile(kKind, b.cta); tile < tiles; tile += t.ctas) {
    const Tile at = tile_at(t, kKind, tile, b.cta);
    // (gelu works with halves)
    fetch_terms<S, N>(b, t.layer[layer].terms[product_of(kKind)], at.column * N, columns,
                      kKind == Kind::kFc1 ? 0.5f : 1.0f);
    head::wait_on(b.full(carried.at.slot), carried.at.parity, w, kForStage, carried.at.slot);
    Moments<S::kParts> moments;
    const int row = at.row * Of<S>::kRows + warp * 16;
    moments.ask(t, row + lane / 4);
    stamp(t, number, 1);
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
    multiply<S, N>(acc, b, head::kept(at.count), carried.at, group, w);
    stamp(t, number, 2);
    moments.sum_up(t);
    named_barrier(kAll, Of<S>::kConsumers);  // the terms are there
    stamp(t, number, 3);
    const uint32_t to = b.meeting + warp * (16 * N * 2);
    float inverse[2], shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = moments.inverse[h] * (kKind == Kind::kFc1 ? 0.5f : 1.0f);
      shift[h] = -moments.mean[h] * inverse[h];
    }
    const auto end = [&](int u, int i, int h) {  // unit u, whose sums are number i
      const float4 term = terms_of(b, u);
      float v[2] = {acc[4 * i + 2 * h] * inverse[h] + (shift[h] * term.x + term.y),
                    acc[4 * i + 2 * h + 1] * inverse[h] + (shift[h] * term.z + term.w)};
      if constexpr (kKind == Kind::kFc1) {
#pragma unroll
        for (float& e : v)  // x = 2 e: e + e tanh(x (0.79788 + 0.035677 x^2))
          e += e * tanh_fast(e * (2 * 0.7978845608028654f + 8 * 0.035677408136300125f * (e * e)));
      }
      return pack2(v[0], v[1]);
    };
    // A loop, not unrolled: this code runs once a tile, and fetching it would take longer than running it.
    // The sums of the next units move to where those of these were.
    constexpr int kStep = kUnits > 20 ? 8 : 6;
#pragma unroll 1
    for (int u = 0; u < kUnits; u += kStep) {
#pragma unroll
      for (int i = 0; i < kStep; i += 2) {
        if (u + i + 1 < kUnits) {
          store_units(to + staged_at<N>(lane % 16, u + i + lane / 16), end(u + i, i, 0), end(u + i, i, 1),
                      end(u + i + 1, i + 1, 0), end(u + i + 1, i + 1, 1));
        } else if (kUnits % 2 != 0 && u + i < kUnits) {
          store_unit(to + staged_at<N>(lane % 16, u + i), end(u + i, i, 0), end(u + i, i, 1));
        }
      }
#pragma unroll
      for (int i = 0; i + 4 * kStep < N / 2; ++i) acc[i] = acc[i + 4 * kStep];
    }
    stamp(t, number, 4);
#if VLA_SM90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
    if (lane == 0) {
      const CUtensorMap* const map = kKind == Kind::kQkv ? &p.qkv_out : &p.h_out;
      if constexpr (N % 64 != 0) {
        tma_store(map, to, at.column * N, row);
      } else {
#pragma unroll
        for (int box = 0; box < N / 64; ++box)
          tma_store(map, to + box * (16 * kChunkBytes), at.column * N + box * 64, row);
      }
      stores_done();
    }
    __syncwarp();
    stamp(t, number, 5);
    end_tile<S>();
  }
  end_phase(t, number);
}

// The hidden state as it comes.
template <typename S>
__device__ __forceinline__ void prepare(const Params& p, const Block<S>& b) {
  const Table& t = p.t;
  const int warp = warp_index(), lane = threadIdx.x % 32, tiles = tiles_of(t, Kind::kPrepare);
  if (first_tile(Kind::kPrepare, b.cta) >= tiles) return;
#pragma unroll 1
  for (int tile = first_tile(Kind::kPrepare, b.cta); tile < tiles; tile += t.ctas / kPair) {
    const Tile at = tile_at(t, Kind::kPrepare, tile, b.cta);
    fetch_terms<S, S::kState>(b, t.first_terms, at.column * S::kState, t.width);
    named_barrier(kAll, Of<S>::kConsumers);
    float z[Of<S>::kOwned][4];
    float4 terms[Of<S>::kOwned];
    const int row0 = at.row * Of<S>::kRows + warp * 16, row = row0 + lane / 4;
#pragma unroll
    for (int i = 0; i < Of<S>::kOwned; ++i) {
      const int unit = min(b.rank * Of<S>::kOwned + i, Of<S>::kUnits - 1);
      terms[i] = terms_of(b, unit);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t from =
            min(row + 8 * h, t.rows - 1) * t.ld_first + at.column * S::kState + unit * 8 + lane % 4 * 2;
        const float2 v = unpack2(*reinterpret_cast<const uint32_t*>(t.first + from));
        z[i][2 * h] = v.x, z[i][2 * h + 1] = v.y;
      }
    }
    leave_state<S>(p, b, z, terms, row0, at.column,
                   state_at<S>(tile, b.rank, warp / 4, 0, threadIdx.x % kGroup), false);
    end_tile<S>();
  }
  end_phase(t, 0);
}

// out and fc2: hidden state + x W^T + bias, the hidden state from here on.
template <typename S>
__device__ __forceinline__ void state_phase(const Params& p, const Block<S>& b, int layer, Kind kind,
                                            Carried& carried, Watch& w) {
  constexpr int N = S::kState, kOwned = Of<S>::kOwned, kUnits = Of<S>::kUnits;
  const Table& t = p.t;
  const int group = warp_index() / 4, thread = threadIdx.x % kGroup, tiles = tiles_of(t, kind);
  const unsigned number = number_of(layer, static_cast<int>(kind));
  if (first_tile(kind, b.cta) >= tiles) return;
  const bool last = kind == Kind::kFc2 && layer + 1 == t.layers;
#pragma unroll 1
  for (int tile = first_tile(kind, b.cta); tile < tiles; tile += t.ctas / kPair) {
    const Tile at = tile_at(t, kind, tile, b.cta);
    const int parity = carried.exchanges & 1;
    const uint32_t sums = b.sums(), room = b.meeting;
    const int receives = b.rank == 0 ? kOwned : kUnits - kOwned;
    if (threadIdx.x == 0) barrier_expect(sums, receives * S::kGroups * kGroup * 16);
    fetch_terms<S, N>(b, t.layer[layer].terms[product_of(kind)], at.column * N, t.width);
    // What comes behind the products is known before: no more of it than need be is left to their end.
    const int row = head::kept(at.row * Of<S>::kRows + warp_index() * 16), column = head::kept(at.column);
    const int64_t its_state = state_at<S>(tile, b.rank, group, 0, thread);
    float4 state[kOwned];  // (this block's own, written phases ago)
#pragma unroll
    for (int i = 0; i < kOwned; ++i)
      state[i] = *reinterpret_cast<const float4*>(t.state + its_state + i * kGroup * 4);
    if (t.stamps) {
      head::wait_on(b.full(carried.at.slot), carried.at.parity, w, kForStage, carried.at.slot);
      stamp(t, number, 1);
    }
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
    multiply<S, N>(acc, b, head::kept(at.count), carried.at, group, w);
    stamp(t, number, 2);
    const bool second = b.rank == 1;
    const auto mine = [&](int i, int e) {
      const int other = kOwned + i < kUnits ? kOwned + i : 0;
      return second ? acc[4 * other + e] : acc[4 * i + e];
    };
    // the other block has read what it was sent before
    if (carried.exchanges++ > 0) head::wait_on(b.room(), parity ^ 1, w, kForPair, 1);
    const uint32_t there = cluster_address(room, b.rank ^ 1), told = cluster_address(sums, b.rank ^ 1);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int other = kOwned + i < kUnits ? kOwned + i : 0;
      if (!second && kOwned + i >= kUnits) continue;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = second ? acc[4 * i + e] : acc[4 * other + e];
      send4(there + ((group * kOwned + i) * kGroup + thread) * 16, told, make_float4(v[0], v[1], v[2], v[3]));
    }
    named_barrier(kAll, Of<S>::kConsumers);  // the terms are there
    stamp(t, number, 3);
    head::wait_on(sums, parity, w, kForPair, 0);
    stamp(t, number, 4);
    float z[kOwned][4];
    float4 terms[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int unit = min(b.rank * kOwned + i, kUnits - 1);
      const float4 received = load4(room + ((group * kOwned + i) * kGroup + thread) * 16);
      const float4 term = terms[i] = terms_of(b, unit);
      z[i][0] = mine(i, 0) + received.x + term.x + state[i].x;
      z[i][1] = mine(i, 1) + received.y + term.z + state[i].y;
      z[i][2] = mine(i, 2) + received.z + term.x + state[i].z;
      z[i][3] = mine(i, 3) + received.w + term.z + state[i].w;
    }
    leave_state<S>(p, b, z, terms, row, column, its_state, last);
    stamp(t, number, 5);
    end_tile<S>();
    if (threadIdx.x == 0) arrive_there(b.room(), b.rank ^ 1);
  }
  end_phase(t, number);
}

}  // namespace vla::cuda::vision
