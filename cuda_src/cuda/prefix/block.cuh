// A block of the persistent prefix: its shared memory, and the two warps that fill the ring.
//
// A stage of the ring has weights and the rows of x that go with them, and one barrier for both. The weights
// never change, so the feeder asks for them as soon as there is room, ahead of the barrier between blocks;
// the loader asks for x behind it. A block that has the tile of another keeps to the same order of stages, so
// ring positions are counted by everyone alike.
#pragma once

#include "../head/block.cuh"
#include "layout.h"

namespace vla::cuda::prefix {

using head::Slot;
using head::Watch;

constexpr int kReleases = kConsumers / 32;  // of a slot: 1 a warp; 2 where one warpgroup only knows of it
constexpr int kAll = 1;                     // the named barrier of all consumers

// Kinds of waits in a report beside head::Waiting's: detail is a slot.
constexpr unsigned kForStage = 16, kForRoom = 17, kForPair = 18;

struct Block {
  uint32_t ring, exchange, inverse, key_blocks, barriers;
  int cta, rank;

  __device__ __forceinline__ Block(const Table& t, uint32_t base)
      : ring(base),
        exchange(base + t.slots * t.slot),
        inverse(exchange + kExchange),
        key_blocks(inverse + kInverseBytes),
        barriers(key_blocks + kKeyBlockBytes),
        cta(blockIdx.x),
        rank(blockIdx.x % kPair) {}
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 8 * (kMaxSlots + slot); }
  __device__ __forceinline__ uint32_t sums() const { return barriers + 8 * (2 * kMaxSlots); }

  __device__ __forceinline__ void init(const Table& t) const {
    for (int i = 0; i < t.slots; ++i) barrier_init(full(i), 2), barrier_init(empty(i), kReleases);
    barrier_init(sums(), 1);
    barrier_init_fence();
  }
};

__device__ __forceinline__ void release(const Block& b, int slot, int count) {
#if VLA_SM90
  if (threadIdx.x % 32 == 0)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(b.empty(slot)), "r"(count) : "memory");
#else
  (void)b, (void)slot, (void)count;
#endif
}

// A lane for each of `stages` stages from `begin` on: `fill(stage, slot)` when the slot has room.
template <typename Fill>
__device__ __forceinline__ void fill_stages(const Table& t, const Block& b, Slot& begin, int stages, Watch& w,
                                            const Fill& fill) {
  const int lane = threadIdx.x % 32;
  Slot at = begin;
  at.skip(lane, t.slots);
  // (a stage may be asked for when that before it in the same slot has been: parities know no more)
#pragma unroll 1
  for (int first = 0; first < stages; first += t.slots) {
    bool left = lane >= first && lane < min(first + t.slots, stages);
    unsigned tries = 0;
    int64_t since = 0;
#pragma unroll 1
    while (__any_sync(0xffffffffu, left)) {
      if (left && (w.over || head::try_wait(b.empty(at.slot), at.parity ^ 1))) {
        fill(lane, at.slot);
        left = false;
      } else if (left) {
        head::enough(w, tries, since, kForRoom, at.slot, 0);
      }
    }
  }
  begin.skip(stages, t.slots);
}

// A warp: this block's weights.
__device__ __forceinline__ void feed(const Table& t, const Block& b, Watch& w) {
  Slot begin;
#pragma unroll 1
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    w.phase = i;
#pragma unroll 1
    for (int tile = first_tile(p, b.cta); tile < tiles_of(p); tile += p.ctas) {
      const Tile at = tile_at(p, tile, b.cta);
      fill_stages(t, b, begin, stages_of(p, at), w, [&](int stage, int slot) {
        if (!is_product(p)) {
          barrier_arrive(b.full(slot));
          return;
        }
        const int bytes = chunks_of_stage(p, at, stage) * tile_rows(p) * kChunkBytes;
        barrier_expect(b.full(slot), bytes);
        bulk_load(b.ring + slot * t.slot, p.w + weights_at(p, at, stage), bytes, b.full(slot));
      });
    }
  }
}

// A warp: waits for the other blocks, then has copied what the phase reads of what they have written.
__device__ __forceinline__ void load(const Table& t, const Block& b, Watch& w) {
  Slot begin;
  bool busy = false;  // in a phase of this group
#pragma unroll 1
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    w.phase = i;
    if (i == 0 || t.phase[i - 1].group != p.group) {
      head::wait_for_count(t.counter, static_cast<unsigned>(p.group) * t.ctas, w);
      __syncwarp();
      busy = false;
    }
    if (t.stamps && b.cta == 0 && threadIdx.x % 32 == 0) t.stamps[i * 4] = clock64();
    busy = busy || takes_part(p, b.cta);
#pragma unroll 1
    for (int tile = first_tile(p, b.cta); tile < tiles_of(p); tile += p.ctas) {
      const Tile at = tile_at(p, tile, b.cta);
      fill_stages(t, b, begin, stages_of(p, at), w, [&](int stage, int slot) {
        const uint32_t to = b.ring + slot * t.slot, full = b.full(slot);
        if (p.kind == Kind::kAttention) {
          // queries; keys of either warpgroup; values
          const int kv = at.column / t.heads_per_key, half = (stage - 1) % 2;
          const Bits* from = stage == 0 ? p.x + (static_cast<int64_t>(at.column) * p.x_rows + at.row) * kChunk
                                        : (stage <= 2 ? t.k : t.v) +
                                              static_cast<int64_t>(2 * kv + half) * t.key_rows * kChunk;
          const int bytes = (stage == 0 ? 64 : t.key_rows) * kChunkBytes;
          barrier_expect(full, bytes);
          bulk_load(to, from, bytes, full);
          return;
        }
        const int chunks = chunks_of_stage(p, at, stage), bytes = p.rows * kChunkBytes;
        const Bits* from =
            p.x + (static_cast<int64_t>(at.first + stage * p.stage_chunks) * p.x_rows + at.row) * kChunk;
        barrier_expect(full, chunks * bytes);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c)
          bulk_load(to + kWeightBytes + c * bytes, from + static_cast<int64_t>(c) * p.x_rows * kChunk, bytes,
                    full);
      });
    }
    const bool last = i + 1 == t.phases || t.phase[i + 1].group != p.group;
    if (last && !busy && threadIdx.x % 32 == 0) head::add_done(t.counter);
  }
}

// What the consumers carry from phase to phase.
struct Carried {
  Slot at;  // of the next tile's first stage
  int sums_parity = 0;
  float state[2][4] = {};  // the hidden state: units that this thread finishes, see exchange()
};

__device__ __forceinline__ void stamp(const Table& t, int phase, int what) {
  if (t.stamps && blockIdx.x == 0 && threadIdx.x == 0) t.stamps[phase * 4 + what] = clock64();
}

}  // namespace vla::cuda::prefix
