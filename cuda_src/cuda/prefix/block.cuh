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
        inverse(exchange + t.exchange),
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

// Bytes of global memory, a multiple of 16, on their way to the second-level cache.
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
#if VLA_SM90
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
  (void)from, (void)bytes;
#endif
}
__device__ __forceinline__ void release(const Block& b, int slot, int count) {
#if VLA_SM90
  if (threadIdx.x % 32 == 0)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(b.empty(slot)), "r"(count) : "memory");
#else
  (void)b, (void)slot, (void)count;
#endif
}

// What a lane has copied into a stage: `copies` times `bytes`, `step` apart in global memory.
struct Job {
  const std::byte* from;
  int64_t step;
  int bytes, copies;
  uint32_t at;  // where in the slot
};
__device__ __forceinline__ Job weights_job(const Phase& p, const Tile& at, int stage) {
  return {reinterpret_cast<const std::byte*>(p.w + weights_at(p, at, stage)), 0,
          chunks_of_stage(p, at, stage) * tile_rows(p) * kChunkBytes, is_product(p) ? 1 : 0, 0};
}
__device__ __forceinline__ Job x_job(const Table& t, const Phase& p, const Tile& at, int stage) {
  Job j;
  if (p.kind == Kind::kAttention) {
    if (stage == 0) {  // queries
      j.from = reinterpret_cast<const std::byte*>(
          p.x + (static_cast<int64_t>(at.column) * p.x_rows + at.row) * kChunk);
      j.bytes = 64 * kChunkBytes, j.copies = 1, j.step = 0;
    } else {  // keys and values of a warpgroup
      const int64_t row = static_cast<int64_t>(2 * (at.column / t.heads_per_key) + stage - 1) * t.key_rows;
      j.from = reinterpret_cast<const std::byte*>(t.k + row * kChunk);
      j.bytes = t.key_rows * kChunkBytes, j.copies = 2,
      j.step = (t.v - t.k) * static_cast<int64_t>(sizeof(Bits));
    }
    j.at = 0;
    return j;
  }
  const int64_t chunk = at.first + stage * p.stage_chunks;
  j.from = reinterpret_cast<const std::byte*>(p.x + (chunk * p.x_rows + at.row) * kChunk);
  j.step = static_cast<int64_t>(p.x_rows) * kChunkBytes, j.bytes = p.rows * kChunkBytes;
  j.copies = chunks_of_stage(p, at, stage), j.at = x_in_slot(p);
  return j;
}
__device__ __forceinline__ void expect(const Block& b, const Job& j, int slot) {
  if (j.copies > 0) {
    barrier_expect(b.full(slot), j.bytes * j.copies);
  } else {
    barrier_arrive(b.full(slot));
  }
}
__device__ __forceinline__ void copy(const Table& t, const Block& b, const Job& j, int slot) {
  const uint32_t to = b.ring + slot * t.slot + j.at;
#pragma unroll 1
  for (int c = 0; c < j.copies; ++c) bulk_load(to + c * j.bytes, j.from + c * j.step, j.bytes, b.full(slot));
}

// A lane for each of a tile's stages: this one's slot and what goes there. Stages [first, first + slots) may
// be asked for when those before them have been: parities know no more.
struct Lane {
  int slot, parity, stages;
  Job job;
  // Has `then` done when the stage's slot has room.
  template <typename Then>
  __device__ __forceinline__ void batch(const Table& t, const Block& b, int first, Watch& w,
                                        const Then& then) const {
    const int lane = threadIdx.x % 32;
    bool left = lane >= first && lane < min(first + t.slots, stages);
    unsigned tries = 0;
    int64_t since = 0;
#pragma unroll 1
    while (__any_sync(0xffffffffu, left)) {
      if (left && (w.over || head::try_wait(b.empty(slot), parity ^ 1))) {
        then();
        left = false;
      } else if (left) {
        head::enough(w, tries, since, kForRoom, slot, 0);
      }
    }
  }
  __device__ __forceinline__ void batches(const Table& t, const Block& b, int first, Watch& w) const {
#pragma unroll 1
    for (; first < stages; first += t.slots) {
      batch(t, b, first, w, [&] { expect(b, job, slot), copy(t, b, job, slot); });
    }
  }
};
// The lane's part of a tile; the ring moves on.
__device__ __forceinline__ Lane lane_of(const Table& t, const Phase& p, const Tile& at, Ring& ring) {
  const int lane = threadIdx.x % 32, slot = lane % t.slots, stages = stages_of(p, at);
  const Lane l{slot, ring.parity(slot, lane / t.slots), stages, {}};
  ring.use(stages, t.slots);
  return l;
}

// A warp: this block's weights.
__device__ __forceinline__ void feed(const Table& t, const Block& b, Watch& w) {
  const int lane = threadIdx.x % 32;
  Ring ring;
#pragma unroll 1
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    w.phase = i;
#pragma unroll 1
    for (int tile = first_tile(p, b.cta); tile < tiles_of(p); tile += p.ctas) {
      const Tile at = tile_at(p, tile, b.cta);
      Lane l = lane_of(t, p, at, ring);
      l.job = weights_job(p, at, lane);
      // what has no room yet comes as far as the second-level cache: once for all rows
      if (lane >= t.slots && lane < l.stages && l.job.copies > 0 && at.row / p.rows == lane % p.row_tiles)
        prefetch(l.job.from, l.job.bytes);
      l.batches(t, b, 0, w);
    }
  }
}

// A warp: waits for the other blocks, then has copied what the phase reads of what they have written. All
// that can be done before is: what is asked for, and the room for it.
__device__ __forceinline__ void load(const Table& t, const Block& b, Watch& w) {
  const int lane = threadIdx.x % 32;
  Ring ring;
  bool busy = false;  // in a phase of this group
#pragma unroll 1
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    w.phase = i;
    const int first = first_tile(p, b.cta), tiles = tiles_of(p), group = p.group;
    Lane l{};
    bool shared = false;
    int offset = 0, bytes = 0;  // of the rows that this block has copied for both
    if (first < tiles) {
      const Tile at = tile_at(p, first, b.cta);
      l = lane_of(t, p, at, ring);
      l.job = x_job(t, p, at, lane);
      l.batch(t, b, 0, w, [&] { expect(b, l.job, l.slot); });
      shared = shares_x(p, b.cta);
      const int half = half_rows(p.rows) * kChunkBytes;
      offset = b.rank * half, bytes = b.rank == 0 ? half : l.job.bytes - half;
    }
    if (i == 0 || t.phase[i - 1].group != group) {
      head::wait_for_count(t.counter, static_cast<unsigned>(group) * t.ctas, w);
      __syncwarp();
      busy = false;
    }
    if (lane < min(t.slots, l.stages)) {
      // (the other block is done with all before, so its slots are free, and its barriers wait for this)
      if (shared) {
        const uint32_t to = b.ring + l.slot * t.slot + l.job.at + offset;
#pragma unroll 1
        for (int c = 0; c < l.job.copies; ++c)
          head::copy_to_all(to + c * l.job.bytes, l.job.from + c * l.job.step + offset, bytes, b.full(l.slot),
                            3);
      } else {
        copy(t, b, l.job, l.slot);
      }
    }
    __syncwarp();
    if (t.stamps && b.cta == 0 && lane == 0) t.stamps[i * 4] = clock64();
    busy = busy || first < tiles;
    l.batches(t, b, t.slots, w);
#pragma unroll 1
    for (int tile = first + p.ctas; tile < tiles; tile += p.ctas) {
      const Tile at = tile_at(p, tile, b.cta);
      l = lane_of(t, p, at, ring);
      l.job = x_job(t, p, at, lane);
      l.batches(t, b, 0, w);
    }
    const bool last = i + 1 == t.phases || t.phase[i + 1].group != group;
    if (last && !busy && lane == 0) head::add_done(t.counter);
  }
}

// What the consumers carry from phase to phase.
struct Carried {
  Ring ring;
  int sums_parity = 0;
  float state[2][4] = {};  // the hidden state: units that this thread finishes, see exchange()
};

__device__ __forceinline__ void stamp(const Table& t, int phase, int what) {
  if (t.stamps && blockIdx.x == 0 && threadIdx.x == 0) t.stamps[phase * 4 + what] = clock64();
}

}  // namespace vla::cuda::prefix
