// A block of the persistent head: its shared memory, the weight ring's two ends, the loader.
//
// Shared memory: [x, or keys | values | queries, with room to receive sums at the end][weight ring][key
// blocks] [barriers]. x's part changes hands between phases only: what a sibling or the copy engine puts
// there in phase g comes after the barrier between blocks, so after everything that this block did in phase g
// - 1. The keys of the prefix are earlier: they wait for this block's own products (free_x), and no sibling
// writes where they go.
#pragma once

#include "multiply.cuh"
#include "watch.cuh"

namespace vla::cuda::head {

struct Block {
  uint32_t base, ring, barriers;
  int cta, rank, cluster_number;

  __device__ __forceinline__ Block(const Table& t, uint32_t base, int cluster)
      : base(base),
        ring(base + t.x_bytes),
        barriers(ring + t.slots * t.stage + kKeyBlocks),
        cta(blockIdx.x),
        rank(blockIdx.x % cluster),
        cluster_number(blockIdx.x / cluster) {}
  __device__ __forceinline__ uint32_t key_blocks(int group) const {
    return barriers - kKeyBlocks + group * kMaxKeys * 4;
  }
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 8 * (kMaxSlots + slot); }
  __device__ __forceinline__ uint32_t x_full(int chunk) const {
    return barriers + 8 * (2 * kMaxSlots + chunk);
  }
  __device__ __forceinline__ uint32_t keys(int fresh) const { return x_full(kMaxChunks + fresh); }
  __device__ __forceinline__ uint32_t free_x() const { return x_full(kMaxChunks + 2); }
  __device__ __forceinline__ uint32_t sums(int group) const { return x_full(kMaxChunks + 3 + group); }

  __device__ __forceinline__ void init(const Table& t) const {
    for (int i = 0; i < t.slots; ++i) barrier_init(full(i), 1), barrier_init(empty(i), 4);
    for (int i = 0; i < kMaxChunks; ++i) barrier_init(x_full(i), 1);
    barrier_init(keys(0), 1), barrier_init(keys(1), 1), barrier_init(free_x(), 4);
    barrier_init(sums(0), 1), barrier_init(sums(1), 1);
    barrier_init_fence();
  }
};

// A place in the weight ring.
struct Slot {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void next(const Table& t) {
    if (++slot == t.slots) slot = 0, parity ^= 1;
  }
};

// Whether a block's warps have a part in a phase; else the loader says that it is done. As is_busy, but for
// what is left out for timing: nothing waits for x or sums then.
template <int C>
__device__ __forceinline__ bool takes_part(const Table& t, const Phase& p, int cta) {
  if (!is_busy(p, cta, t.rows, C) || t.parts == 2) return false;
  return (t.parts & 8) || !is_split(p) || share_of(p, cta, C).count() > 0;
}

// One thread: this block's weights, in the order of the table, as far ahead as the ring has room.
template <int C>
__device__ __forceinline__ void feed(const Table& t, const Block& b, Watch& w) {
  Slot at;
#pragma unroll 1
  for (int step = 0; step < t.steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < t.phases; ++i) {
      const Phase& p = t.phase[i];
      const Share s = share_of(p, b.cta, C);
      if (s.count() == 0) continue;
      w.phase = 1 + step * t.phases + i;
      const int chunk = p.tile_rows * kChunkBytes;
      const auto* from = reinterpret_cast<const std::byte*>(p.w) +
                         (static_cast<int64_t>(s.tile) * p.chunks + s.first) * chunk;
#pragma unroll 1
      for (int c = s.first; c < s.last; c += p.stage_chunks) {
        const int bytes = min(p.stage_chunks, s.last - c) * chunk;
        wait_on(b.empty(at.slot), at.parity ^ 1, w, kForSlot, at.slot);
        barrier_expect(b.full(at.slot), bytes);
        copy_once(b.ring + at.slot * t.stage, from, bytes, b.full(at.slot));
        from += bytes;
        at.next(t);
      }
    }
  }
}

// A warp: waits for the other blocks, then has copied what the phase reads.
template <int C>
__device__ __forceinline__ void load(const Table& t, const Block& b, Watch& w) {
  const int lane = threadIdx.x % 32;
  const int piece_count = pieces_of(t.rows);
  const bool copies = t.parts & 4;
  // `chunks` chunks of `from`, this block's share of them to all of the cluster; chunk c counts for barrier
  // `barrier` + 8 c, or all for `barrier`
  const auto spread = [&](uint32_t to, const Bits* from, int chunks, uint32_t barrier, int each) {
#pragma unroll 1
    for (int i = b.rank + C * lane; i < chunks * piece_count; i += C * 32) {
      const int c = i / piece_count, part = i % piece_count, row = c * t.rows + piece_first(t.rows, part);
      copy_to_all(to + row * kChunkBytes, from + row * kChunk, piece_rows(t.rows, part) * kChunkBytes,
                  barrier + each * c, (1 << C) - 1);
    }
  };
  int free_parity = 0;
#pragma unroll 1
  for (int step = 0; step < t.steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < t.phases; ++i) {
      const unsigned g = 1 + step * t.phases + i;
      const Phase& p = t.phase[i];
      const bool busy = is_busy(p, b.cta, t.rows, C);
      w.phase = g;
      if (p.kind == Kind::kAttention) {
        const AttentionPart& a = p.attention;
        const HeadTask task = head_task(p, b.cluster_number);
        const int kv = task.head / a.heads_per_key, copied = p.chunks + a.columns;
        const int prefix = a.prefix_rows * kChunkBytes, fresh = a.fresh_rows * kChunkBytes;
        const int each = key_rows(a) * kChunkBytes;
        // keys and values, or the columns of them that the cluster wants, of one kind: a lane copies a chunk
        const auto copy_keys = [&](const Bits* k, const Bits* v, int bytes, int at, uint32_t barrier) {
          if (lane >= copied || bytes == 0) return;
          const bool key = lane < p.chunks;
          const int c = key ? lane : task.column + lane - p.chunks;
          const auto* from = reinterpret_cast<const std::byte*>(key ? k : v) +
                             (static_cast<int64_t>(kv * C + b.rank) * p.chunks + c) * bytes;
          bulk_load(b.base + lane * each + at, from, bytes, barrier);
        };
        if (busy && copies) {
          wait_on(b.free_x(), free_parity, w, kForFreeX, 0);
          free_parity ^= 1;
          if (lane == 0) barrier_expect(b.keys(0), copied * prefix);
          __syncwarp();
          copy_keys(a.packed_k, a.packed_v, prefix, 0, b.keys(0));
        }
        wait_for_blocks(t, g, w);
        __syncwarp();
        if (busy && copies) {
          if (lane == 0) barrier_expect(b.keys(1), copied * fresh + p.chunks * t.rows * kChunkBytes);
          __syncwarp();
          spread(b.base + queries_at(p), p.x + static_cast<int64_t>(task.head) * p.chunks * t.rows * kChunk,
                 p.chunks, b.keys(1), 0);
          copy_keys(a.fresh_k, a.fresh_v, fresh, prefix, b.keys(1));
        }
      } else {
        wait_for_blocks(t, g, w);
        __syncwarp();
        const int slots = copies ? arriving(p, b.cta, C) : 0;
        if (lane < slots) barrier_expect(b.x_full(lane), t.rows * kChunkBytes);
        __syncwarp();
        if (slots > 0 && is_spread(p)) {
          spread(b.base, p.x, slots, b.x_full(0), 8);
        } else if (lane < slots) {
          const int c = share_of(p, b.cta, C).first + lane;
          bulk_load(b.base + lane * t.rows * kChunkBytes, p.x + static_cast<int64_t>(c) * t.rows * kChunk,
                    t.rows * kChunkBytes, b.x_full(lane));
        }
      }
      if (t.stamps && b.cta == 0 && lane == 0) t.stamps[(g - 1) * 4] = clock64();
      if (lane == 0 && !takes_part<C>(t, p, b.cta)) report_done(t, g);
    }
  }
}

// What the warps of a group carry through the loop.
struct Carried {
  Slot weights;
  unsigned x_parity = 0;  // a bit a chunk
  int sums_parity = 0, keys_parity = 0;
  float residual[4] = {};  // of the piece that this thread finishes in every split phase
};

// The end of a phase: `threads` threads have written what others will read. Named barriers: 1 is the first
// warpgroup's here, 2 and 3 are the warpgroups' own in attention, 4 is that of both.
__device__ __forceinline__ void finish(const Table& t, unsigned g, int threads) {
  proxy_fence();
  named_barrier(threads == kGroup ? 1 : 4, threads);
  if (threadIdx.x == 0) {
    report_done(t, g);
    if (t.stamps && blockIdx.x == 0) t.stamps[(g - 1) * 4 + 3] = clock64();
  }
}
__device__ __forceinline__ void stamp(const Table& t, unsigned g, int what) {
  if (t.stamps && blockIdx.x == 0 && threadIdx.x == 0) t.stamps[(g - 1) * 4 + what] = clock64();
}

// acc (64 rows of x, N columns of y) += x W^T over this block's chunks, at least one. One warpgroup.
template <int N>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Table& t, const Block& b, const Phase& p,
                                         const Share& s, Carried& state, Watch& w) {
  const bool weights = t.parts & 1, copies = t.parts & 4;
  const int chunk_bytes = p.tile_rows * kChunkBytes, x_bytes = t.rows * kChunkBytes;
  int before = -1, c = s.first;
#pragma unroll 1
  do {
    if (weights)
      wait_on(b.full(state.weights.slot), state.weights.parity, w, kForWeights, state.weights.slot);
    const uint32_t here = b.ring + state.weights.slot * t.stage;
    const int begin = c, end = min(c + p.stage_chunks, s.last);
#pragma unroll 1
    do {
      const int slot = c - s.first;
      if (copies) wait_on(b.x_full(slot), state.x_parity >> slot & 1, w, kForX, slot);
      wgmma_fence();
      const uint64_t x = wgmma_tile(b.base + slot * x_bytes),
                     rows = wgmma_tile(here + (c - begin) * chunk_bytes);
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) multiply_add<N>(acc, x + 2 * kk, rows + 2 * kk);
      wgmma_commit();
    } while (++c < end);
    // all but the last chunk's have been read by this warp's part of the matrix unit, so the stage before has
    wgmma_wait<1>();
    if (before >= 0 && weights && threadIdx.x % 32 == 0) barrier_arrive(b.empty(before));
    before = state.weights.slot;
    state.weights.next(t);
  } while (c < s.last);
  wgmma_wait<0>();
  if (before >= 0 && weights && threadIdx.x % 32 == 0) barrier_arrive(b.empty(before));
}

// 1 / rms of row `row`, from the parts of its sum of squares; all 4 lanes of a quad ask for the same row.
struct Squares {
  float4 a, b;
};
__device__ __forceinline__ Squares read_squares(const Phase& p, int row) {
  const float4* at = reinterpret_cast<const float4*>(p.squares_in + row * kSquareParts) + threadIdx.x % 4 * 2;
  return {__ldcg(at), __ldcg(at + 1)};
}
__device__ __forceinline__ float inverse_rms(const Phase& p, const Squares& s) {
  float sum = ((s.a.x + s.a.y) + (s.a.z + s.a.w)) + ((s.b.x + s.b.y) + (s.b.z + s.b.w));
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return rsqrtf(sum / p.k + p.eps);
}
// common.cuh's activations with a quick division: two units in the last place of float32, far below
// bfloat16's.
__device__ __forceinline__ float quick_act(float x, int act) {
  if (act == static_cast<int>(Act::kNone)) return x;
  const float u = act == static_cast<int>(Act::kSilu) ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-u));
}
__device__ __forceinline__ float quick_exp2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace vla::cuda::head
