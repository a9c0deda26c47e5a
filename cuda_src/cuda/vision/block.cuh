// A block of the persistent vision encoder: its shared memory, and the two warps that fill the ring.
//
// A stage of the ring has 64 columns of a tile's rows of x and of its weights, or a part of what an item of
// attention reads, and one barrier for both. The weights never change, so the feeder asks for them as soon as
// there is room, ahead of the barrier between blocks; the loader asks for x behind it.
#pragma once

#include "../head/block.cuh"
#include "layout.h"

namespace vla::cuda::vision {

using head::Watch;

constexpr int kAll = 1;  // the named barrier of all consumers

// Kinds of waits in a report beside head::Waiting's: detail is a slot.
constexpr unsigned kForStage = 16, kForRoom = 17, kForPair = 18;

struct Params {
  CUtensorMap w[kProducts * kMaxLayers];
  CUtensorMap x, a, h, heads, qkv_out, h_out;
  CUtensorMap x_out[kPair], last_out[kPair];  // by rank of the block
  Table t;
};
static_assert(sizeof(Params) <= 32764, "a kernel's parameters");

template <typename S>
struct Block {
  uint32_t ring, meeting, terms, barriers;
  int cta, rank;

  __device__ __forceinline__ explicit Block(uint32_t base)
      : ring(base),
        meeting(base + S::kSlots * S::kSlotBytes),
        terms(meeting + Of<S>::kMeeting),
        barriers(terms + Of<S>::kTermBytes),
        cta(blockIdx.x),
        rank(blockIdx.x % kPair) {}
  __device__ __forceinline__ uint32_t slot(int i) const { return ring + i * S::kSlotBytes; }
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 8 * (S::kSlots + slot); }
  __device__ __forceinline__ uint32_t sums() const { return barriers + 8 * (2 * S::kSlots); }
  __device__ __forceinline__ uint32_t room() const {
    return barriers + 8 * (2 * S::kSlots + 1);
  }  // at the other block

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < S::kSlots; ++i) barrier_init(full(i), 2), barrier_init(empty(i), 4 * S::kGroups);
    barrier_init(sums(), 1), barrier_init(room(), 1);
    barrier_init_fence();
  }
  // By a warp that has read all that it needs of a slot.
  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty(slot));
  }
};

template <typename S>
__device__ __forceinline__ constexpr int columns_of(Kind k) {
  return k == Kind::kQkv ? S::kQkv : k == Kind::kFc1 ? S::kFc1 : S::kState;
}

__device__ __forceinline__ unsigned number_of(int layer, int kind) {
  return static_cast<unsigned>(1 + layer * kKinds + kind);
}

// A warp: this block's weights.
template <typename S>
__device__ __forceinline__ void feed(const Params& p, const Block<S>& b, Watch& w) {
  const bool leads = threadIdx.x % 32 == 0;
  const Table& t = p.t;
  Place at;
#pragma unroll 1
  for (int layer = 0; layer < t.layers; ++layer) {
#pragma unroll 1
    for (int i = 0; i < kKinds; ++i) {
      const Kind kind = static_cast<Kind>(i);
      const int tiles = tiles_of(t, kind), step = tile_step(t, kind), columns = columns_of<S>(kind);
      const CUtensorMap* const map = &p.w[layer * kProducts + product_of(kind)];
      w.phase = number_of(layer, i);
      if (leads && kind != Kind::kAttention) tma_prefetch_map(map);
#pragma unroll 1
      for (int tile = first_tile(kind, b.cta); tile < tiles; tile += step) {
        const Tile its = tile_at(t, kind, tile, b.cta);
        const int stages = stages_of(kind, its);
#pragma unroll 1
        for (int s = 0; s < stages; ++s, at.next<S>()) {
          head::wait_on(b.empty(at.slot), at.parity ^ 1, w, kForRoom, at.slot);
          if (!leads) continue;
          if (kind == Kind::kAttention) {
            barrier_arrive(b.full(at.slot));
          } else {
            barrier_expect(b.full(at.slot), columns * kChunkBytes);
            tma_load(b.slot(at.slot) + Of<S>::kBytesOfX, map, b.full(at.slot), (its.first + s) * kChunk,
                     its.column * columns);
          }
        }
      }
    }
  }
}

// An item of attention: queries [row, row + 64) of a head, the keys of their camera.
struct Item {
  int head, row, camera;
};
template <typename S>
__device__ __forceinline__ Item item_at(const Table& t, int item) {
  constexpr int kTiles = S::kKeys / kQueries;
  const int head = item / kTiles % t.heads, camera = item / kTiles / t.heads;
  return {head, (camera * kTiles + item % kTiles) * kQueries, camera};
}
// Queries, or half of the keys or values: boxes of 64 rows and 64 columns, one behind another; by columns,
// then rows.
template <typename S>
__device__ __forceinline__ int bytes_of_item(int stage) {
  return (S::kHead + 63) / 64 * (stage == 0 ? kQueries : S::kKeys / 2) * kChunkBytes;
}
template <typename S>
__device__ __forceinline__ void load_item(const Params& p, const Block<S>& b, int tile, int stage, int slot) {
  const Item item = item_at<S>(p.t, tile);
  const int part = stage == 0 ? 0 : 1 + (stage - 1) / 2;  // of the heads: q, k, v
  const int row = stage == 0 ? item.row : item.camera * S::kKeys + (stage - 1) % 2 * (S::kKeys / 2);
  const int rows = stage == 0 ? kQueries : S::kKeys / 2;
  uint32_t to = b.slot(slot);
  for (int c = 0; c < S::kHead; c += 64)
    for (int r = 0; r < rows; r += 64, to += 64 * kChunkBytes)
      tma_load3(to, &p.heads, b.full(slot), c, part * p.t.heads + item.head, row + r);
}

// A warp: waits for the other blocks, then has copied what the phase reads of what they have written. Room
// for it is found, and announced, before.
template <typename S>
__device__ __forceinline__ void load(const Params& p, const Block<S>& b, Watch& w) {
  const bool leads = threadIdx.x % 32 == 0;
  const Table& t = p.t;
  Place at;
#pragma unroll 1
  for (int layer = 0; layer < t.layers; ++layer) {
#pragma unroll 1
    for (int i = 0; i < kKinds; ++i) {
      const Kind kind = static_cast<Kind>(i);
      const int tiles = tiles_of(t, kind), step = tile_step(t, kind), first = first_tile(kind, b.cta);
      const CUtensorMap* const map = kind == Kind::kOut ? &p.a : kind == Kind::kFc2 ? &p.h : &p.x;
      w.phase = number_of(layer, i);
      if (first >= tiles) continue;
      const auto want = static_cast<unsigned>(done_before(t, layer, kind));
#pragma unroll 1
      for (int tile = first; tile < tiles; tile += step) {
        const Tile its = tile_at(t, kind, tile, b.cta);
        const bool attends = kind == Kind::kAttention;
        const int stages = stages_of(kind, its);
        const auto room = [&](int s, const Place& place) {
          head::wait_on(b.empty(place.slot), place.parity ^ 1, w, kForRoom, place.slot);
          if (leads) barrier_expect(b.full(place.slot), attends ? bytes_of_item<S>(s) : Of<S>::kBytesOfX);
        };
        const auto fill = [&](int s, const Place& place) {
          if (!leads) return;
          if (attends) {
            load_item<S>(p, b, tile, s, place.slot);
          } else {
            tma_load(b.slot(place.slot), map, b.full(place.slot), (its.first + s) * kChunk,
                     its.row * Of<S>::kRows);
          }
        };
        int s = 0;
        if (tile == first) {
          const int early = min(stages, S::kSlots);
          Place ahead = at;
#pragma unroll 1
          for (int e = 0; e < early; ++e, ahead.next<S>()) room(e, ahead);
          head::wait_for_count(t.counter, want, w);
          __syncwarp();
          if (t.stamps && b.cta == 0 && leads) t.stamps[number_of(layer, i) * kStamps] = clock64();
#pragma unroll 1
          for (; s < early; ++s, at.next<S>()) fill(s, at);
        }
#pragma unroll 1
        for (; s < stages; ++s, at.next<S>()) room(s, at), fill(s, at);
      }
    }
  }
}

// What the consumers carry from phase to phase.
struct Carried {
  Place at;
  int exchanges = 0;  // tiles of the hidden state
};

__device__ __forceinline__ void stamp(const Table& t, unsigned phase, int what) {
  if (t.stamps && blockIdx.x == 0 && threadIdx.x == 0) t.stamps[phase * kStamps + what] = clock64();
}

}  // namespace vla::cuda::vision
