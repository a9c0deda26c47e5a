// A block of the persistent head: its shared memory, the weight ring's two ends, the loader.
//
// Shared memory: [x, or keys | values | queries; sums that arrive at the end][exchange][weight ring][key
// blocks][barriers]. The first two change hands between phases only: what a sibling or the copy engine puts
// there in phase g comes after the barrier between blocks, so after everything that this block did in phase g
// - 1. The keys of the prefix are earlier: they wait for this block's own products (free_x), and no sibling
// writes where they go. Where qkv is joined to its attention, keys, values and queries have a part of the
// exchange for themselves: nothing but another such pair uses it, and between two pairs there is a barrier.
#pragma once

#include "multiply.cuh"
#include "watch.cuh"

namespace vla::cuda::head {

struct Block {
  uint32_t base, ring, barriers;
  int cta, rank, cluster_number;

  __device__ __forceinline__ Block(const Table& t, uint32_t base)
      : base(base),
        ring(base + t.x_bytes + kExchange),
        barriers(ring + t.slots * t.stage + kKeyBlocks),
        cta(blockIdx.x),
        rank(blockIdx.x % kCluster),
        cluster_number(blockIdx.x / kCluster) {}
  __device__ __forceinline__ uint32_t exchange() const { return ring - kExchange; }
  __device__ __forceinline__ uint32_t key_blocks() const { return barriers - kKeyBlocks; }
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 8 * (kMaxSlots + slot); }
  __device__ __forceinline__ uint32_t x_full() const { return barriers + 8 * (2 * kMaxSlots); }
  __device__ __forceinline__ uint32_t keys(int fresh) const { return x_full() + 8 * (1 + fresh); }
  __device__ __forceinline__ uint32_t free_x() const { return x_full() + 8 * 3; }
  // 0: in attention; 2: in a split phase
  __device__ __forceinline__ uint32_t sums(int which) const { return x_full() + 8 * (4 + which); }

  __device__ __forceinline__ void init(const Table& t) const {
    for (int i = 0; i < t.slots; ++i) barrier_init(full(i), 1), barrier_init(empty(i), 4);
    barrier_init(x_full(), 1), barrier_init(keys(0), 1), barrier_init(keys(1), 1),
        barrier_init(free_x(), kConsumers / 32);
    for (int i = 0; i < 3; ++i) barrier_init(sums(i), 1);
    barrier_init_fence();
  }
};

// A place in the weight ring.
struct Slot {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void skip(int count, int slots) {
    slot += count;
    while (slot >= slots) slot -= slots, parity ^= 1;
  }
  // `count` at most `slots`: without a branch
  __device__ __forceinline__ void advance(int count, int slots) {
    slot += count;
    const int over = slot >= slots;
    slot -= over ? slots : 0, parity ^= over;
  }
};

// Whether a block's warps have a part in a phase; else the loader says that it is done. As is_busy, but for
// what is left out for timing: nothing waits for x or sums then.
__device__ __forceinline__ bool takes_part(const Table& t, const Phase& p, int cta) {
  if (!is_busy(p, cta, t.rows) || t.parts == 2) return false;
  return (t.parts & 8) || !is_split(p) || share_of(p, cta).count() > 0;
}

// Where a stage of a phase's weights begins for a block and how long it is: none (0 bytes) from the last on.
struct Stage {
  const std::byte* from;
  int bytes;
};
__device__ __forceinline__ Stage stage_of(const Phase& p, const Share& s, int stage) {
  const int chunk = p.tile_rows * kChunkBytes, first = s.first + stage * p.stage_chunks;
  return {reinterpret_cast<const std::byte*>(p.w) + (static_cast<int64_t>(s.tile) * p.chunks + first) * chunk,
          max(min(p.stage_chunks, s.last - first), 0) * chunk};
}

// By a whole warp, as wait_on(), but in place: a call there would cost the warps that multiply their uniform
// registers.
__device__ __forceinline__ void wait_here(uint32_t barrier, int parity, Watch& w, unsigned what,
                                          unsigned detail) {
  bool left = true;
  unsigned tries = 0;
  int64_t since = 0;
#pragma unroll 1
  while (__any_sync(0xffffffffu, left)) {
    if (left && (w.over || try_wait(barrier, parity))) {
      left = false;
    } else if (left) {
      enough(w, tries, since, what, detail, 0);
    }
  }
}

// A warp: this block's weights into the ring in the order of the table, as far ahead as it has room, a lane a
// stage. What comes after attention waits for attention's keys: all of the ring is free then, and what is
// asked for while other warps say that q, k and v are done makes their fence wait (by 0.8 us in pi0.5, for
// weights that are needed 5 us later). Where qkv is joined keys come before it, and tell nothing.
__device__ __forceinline__ void feed(const Table& t, const Block& b, Watch& w) {
  const int lane = threadIdx.x % 32;
  Slot begin;  // the phase's first stage
  int keys_parity = 0;
#pragma unroll 1
  for (int step = 0; step < t.steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < t.phases; ++i) {
      const Phase& p = t.phase[i];
      const Share s = share_of(p, b.cta);
      if (p.kind == Kind::kAttention && !p.joined && (t.parts & 4) && is_busy(p, b.cta, t.rows)) {
        w.phase = 1 + step * t.phases + i;
        wait_here(b.keys(0), keys_parity, w, kForKeys, 0);
        keys_parity ^= 1;
      }
      if (s.count() == 0) continue;
      w.phase = 1 + step * t.phases + i;
      const int stages = divide_up(s.count(), p.stage_chunks);
      Slot at = begin;
      at.skip(lane, t.slots);
      const Stage stage = stage_of(p, s, lane);
      // (a stage may be asked for when that before it in the same slot has been: parities know no more)
#pragma unroll 1
      for (int first = 0; first < stages; first += t.slots) {
        bool left = lane >= first && lane < min(first + t.slots, stages);
        unsigned tries = 0;
        int64_t since = 0;
#pragma unroll 1
        while (__any_sync(0xffffffffu, left)) {
          if (left && (w.over || try_wait(b.empty(at.slot), at.parity ^ 1))) {
            barrier_expect(b.full(at.slot), stage.bytes);
            copy_once(b.ring + at.slot * t.stage, stage.from, stage.bytes, b.full(at.slot));
            left = false;
          } else if (left) {
            enough(w, tries, since, kForSlot, at.slot, 0);
          }
        }
      }
      begin.skip(stages, t.slots);
    }
  }
}

// A lane's copy: `bytes` of `from`, 0 for none.
struct Copy {
  uint32_t to;
  const std::byte* from;
  int bytes;
  // Found before the wait that comes next: the table's answers are some hundred cycles away.
  __device__ __forceinline__ void keep() { asm volatile("" : "+r"(to), "+l"(from), "+r"(bytes)); }
};
// A lane's part of this block's share of `chunks` chunks of `rows` rows.
__device__ __forceinline__ Copy shared_copy(const Block& b, uint32_t to, const Bits* from, int chunks,
                                            int rows) {
  const int i = b.rank + kCluster * (threadIdx.x % 32), two = pieces_of(rows) - 1;
  const int c = i >> two, part = i & two, row = c * rows + piece_first(rows, part);
  return {to + row * kChunkBytes, reinterpret_cast<const std::byte*>(from + row * kChunk),
          c < chunks ? piece_rows(rows, part) * kChunkBytes : 0};
}
static_assert(2 * kMaxChunks <= 32 * kCluster, "a lane has a piece at most");

// A lane's chunk of a block's keys and values, from row `first` on: all of the keys, the columns of the
// values that the cluster wants. k, v: of one kind, `rows` a block.
__device__ __forceinline__ Copy key_copy(const Block& b, const Phase& p, const HeadTask& task, const Bits* k,
                                         const Bits* v, int rows, int first) {
  const AttentionPart& a = p.attention;
  const int lane = threadIdx.x % 32, bytes = rows * kChunkBytes;
  const bool key = lane < p.chunks;
  const int c = key ? lane : task.column + lane - p.chunks;
  return {b.base + a.at + (lane * key_rows(a) + first) * kChunkBytes,
          reinterpret_cast<const std::byte*>(key ? k : v) +
              (static_cast<int64_t>(task.key_head * kCluster + b.rank) * p.chunks + c) * bytes,
          lane < p.chunks + a.columns ? bytes : 0};
}
// By a whole warp: the prefix's keys and values of a block, of attention p.
__device__ __forceinline__ void load_prefix(const Block& b, const Phase& p, const HeadTask& task) {
  const AttentionPart& a = p.attention;
  if (threadIdx.x % 32 == 0) barrier_expect(b.keys(0), (p.chunks + a.columns) * a.prefix_rows * kChunkBytes);
  __syncwarp();
  const Copy old = key_copy(b, p, task, a.packed_k, a.packed_v, a.prefix_rows, 0);
  if (old.bytes > 0) bulk_load(old.to, old.from, old.bytes, b.keys(0));
}

// A warp: waits for the other blocks, then has copied what the phase reads.
__device__ __forceinline__ void load(const Table& t, const Block& b, Watch& w) {
  const int lane = threadIdx.x % 32;
  const bool copies = t.parts & 4;
  int free_parity = 0;
#pragma unroll 1
  for (int step = 0; step < t.steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < t.phases; ++i) {
      const unsigned g = 1 + step * t.phases + i;
      const Phase& p = t.phase[i];
      const bool busy = is_busy(p, b.cta, t.rows), attends = p.kind == Kind::kAttention;
      w.phase = g;
      if (p.joined && attends) continue;  // all that it reads came with the phase before
      if (p.joined && busy) {
        const Phase& next = t.phase[i + 1];
        if (copies) load_prefix(b, next, head_task(next, t.m, b.cluster_number));
        if (lane == 0 && (t.parts & 8)) barrier_expect(b.keys(1), joined_received(next.attention, t.rows));
      }
      Copy x{0, nullptr, 0}, own{0, nullptr, 0};  // to all of the cluster; to this block
      int expected = 0, idle = !takes_part(t, p, b.cta);
      if (attends && busy && copies) {
        const AttentionPart& a = p.attention;
        const HeadTask task = head_task(p, t.m, b.cluster_number);
        const int copied = p.chunks + a.columns, queries = p.chunks * p.stack.rows;  // rows of 128 bytes
        if (takes_part(t, t.phase[i - 1], b.cta)) {  // the queries' products, which read x
          wait_on(b.free_x(), free_parity, w, kForFreeX, 0);
          free_parity ^= 1;
        }
        load_prefix(b, p, task);
        own = key_copy(b, p, task, a.fresh_k, a.fresh_v, a.fresh_rows, a.prefix_rows);
        x = shared_copy(b, b.base + a.at + queries_at(p), p.x + task.tile * queries * kChunk, p.chunks,
                        p.stack.rows);
        expected = (copied * a.fresh_rows + queries) * kChunkBytes;
      } else if (!attends && copies) {
        const int chunks = arriving(p, b.cta), bytes = t.rows * kChunkBytes;
        expected = chunks * bytes;
        if (is_spread(p)) {
          x = shared_copy(b, b.base, p.x, chunks, t.rows);
        } else if (lane < chunks) {
          own = {b.base + lane * bytes,
                 reinterpret_cast<const std::byte*>(p.x) +
                     static_cast<int64_t>(share_of(p, b.cta).first + lane) * bytes,
                 bytes};
        }
      }
      const uint32_t barrier = attends ? b.keys(1) : b.x_full();
      x.keep(), own.keep();
      asm volatile("" : "+r"(expected), "+r"(idle));
      wait_for_blocks(t, g, w);
      __syncwarp();
      if (lane == 0 && expected > 0) barrier_expect(barrier, expected);
      __syncwarp();
      if (x.bytes > 0) copy_to_all(x.to, x.from, x.bytes, barrier, (1 << kCluster) - 1);
      if (own.bytes > 0) bulk_load(own.to, own.from, own.bytes, barrier);
      if (t.stamps && b.cta == 0 && lane == 0) t.stamps[(g - 1) * 4] = clock64();
      if (lane == 0 && idle) {
        if (p.joined) report_joined(t);
        report_done(t);
      }
    }
  }
}

// What the warps of a group carry through the loop.
struct Carried {
  Slot weights;  // where the next phase's begin
  int x_parity = 0, sums_parity = 0, split_parity = 0, keys_parity = 0;
  float residual[4] = {};  // of the piece that this thread finishes in every split phase
};

// The end of a phase: `threads` threads have written what others will read. Named barriers: 1 is the first
// warpgroup's, 2 the same in attention, 4 is that of both.
__device__ __forceinline__ void finish(const Table& t, unsigned g, int threads) {
  named_barrier(threads == kGroup ? 1 : 4, threads);
  if (threadIdx.x == 0) {
    report_done(t);
    if (t.stamps && blockIdx.x == 0) t.stamps[(g - 1) * 4 + 3] = clock64();
  }
}
__device__ __forceinline__ void stamp(const Table& t, unsigned g, int what) {
  if (t.stamps && blockIdx.x == 0 && threadIdx.x == 0) t.stamps[(g - 1) * 4 + what] = clock64();
}

// The same number in all lanes, kept in a register from here on: the compiler would rather ask the table
// again where it is used, and each answer is some hundred cycles away.
__device__ __forceinline__ int kept(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// wgmma_tile of an address of shared memory as a low word, which counts in 16 bytes, and the high word.
__device__ __forceinline__ uint32_t tile_low(uint32_t address) { return 0x10000u | address >> 4; }
__device__ __forceinline__ uint64_t tile_of(uint32_t low) { return uint64_t{0x40000040} << 32 | low; }

// What a phase's products need to know, asked before x is there.
struct Shape {
  int count, per_stage, stages, slots, stage, x_step;  // stage and step in 16 bytes
  uint32_t x, ring;                                    // tile_low of where they begin
  Slot at;                                             // of the warpgroup's first stage
};
// `group`: of the warpgroups that take the stages in turn.
__device__ __forceinline__ Shape shape_of(const Table& t, const Phase& p, const Block& b, const Share& s,
                                          int group, Carried& state) {
  Shape h;
  h.count = kept(s.count()), h.per_stage = kept(p.stage_chunks), h.slots = kept(t.slots);
  h.stage = kept(t.stage >> 4), h.x_step = kept(t.rows * kChunkBytes >> 4);
  h.x = kept(tile_low(b.base)), h.ring = kept(tile_low(b.ring));
  h.stages = divide_up(h.count, h.per_stage);
  h.at = state.weights;
  h.at.skip(group, h.slots);
  state.weights.skip(h.stages, h.slots);
  return h;
}

// acc (64 rows of x, N columns of y) += x W^T over stages `first`, `first` + kStep, ...
template <int N, int kStep>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Table& t, const Block& b, Shape h,
                                         int first, Watch& w) {
  const bool weights = t.parts & 1;
  int before = -1;
  bool there = !weights || (first < h.stages && ask(b.full(h.at.slot), h.at.parity));
#pragma unroll 1
  for (int stage = first; stage < h.stages; stage += kStep) {
    const Slot at = h.at;
    if (!__all_sync(0xffffffffu, there)) {
      if (before >= 0) {  // its slot is wanted for weights that are still to come
        wgmma_wait<0>();
        if (threadIdx.x % 32 == 0) barrier_arrive(b.empty(before));
        before = -1;
      }
      wait_on(b.full(at.slot), at.parity, w, kForWeights, at.slot);
    }
    const int chunk = stage * h.per_stage;
    uint32_t rows = h.ring + at.slot * h.stage, x = h.x + chunk * h.x_step;
    int left = min(h.per_stage, h.count - chunk);
#pragma unroll 1
    do {
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) multiply_add<N>(acc, tile_of(x + 2 * kk), tile_of(rows + 2 * kk));
      wgmma_commit();
      x += h.x_step, rows += N * kChunkBytes >> 4;
    } while (--left > 0);
    // asked while these products are on their way, used after them
    h.at.advance(kStep, h.slots);
    there = !weights || (stage + kStep < h.stages && ask(b.full(h.at.slot), h.at.parity));
    // all but the last chunk's have been read by this warp's part of the matrix unit, so the stage before has
    wgmma_wait<1>();
    if (before >= 0 && weights && threadIdx.x % 32 == 0) barrier_arrive(b.empty(before));
    before = at.slot;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");  // read no earlier
  if (before >= 0 && weights && threadIdx.x % 32 == 0) barrier_arrive(b.empty(before));
}

// Both warpgroups have sums of all rows, each over its own chunks. Now the first gets all sums of rows r, the
// second of rows r + 8: mine[4 u ...] of unit u of 16 columns, as acc[8 u], acc[8 u + 1], acc[8 u + 4],
// acc[8 u + 5] are those of row r.
template <int N>
__device__ __forceinline__ void swap_rows(float (&mine)[N / 4], const float (&acc)[N / 2], const Block& b,
                                          int group) {
  const uint32_t to = b.exchange() + (threadIdx.x ^ kGroup) * 16, from = b.exchange() + threadIdx.x * 16;
#pragma unroll
  for (int u = 0; u < N / 16; ++u) {
    const float* a = acc + 8 * u;
    const float4 other =
        group == 0 ? make_float4(a[2], a[3], a[6], a[7]) : make_float4(a[0], a[1], a[4], a[5]);
    store4(to + u * kConsumers * 16, other.x, other.y, other.z, other.w);
  }
  named_barrier(4, kConsumers);
#pragma unroll
  for (int u = 0; u < N / 16; ++u) {
    const float* a = acc + 8 * u;
    const float4 v = load4(from + u * kConsumers * 16);
    // the first warpgroup's sums first: the same bits whichever group adds
    mine[4 * u] = group == 0 ? a[0] + v.x : v.x + a[2];
    mine[4 * u + 1] = group == 0 ? a[1] + v.y : v.y + a[3];
    mine[4 * u + 2] = group == 0 ? a[4] + v.z : v.z + a[6];
    mine[4 * u + 3] = group == 0 ? a[5] + v.w : v.w + a[7];
  }
}

// 1 / rms of row `row`, from the parts of its sum of squares; all 4 lanes of a quad ask for the same row.
struct Squares {
  float4 a, b;
};
__device__ __forceinline__ Squares read_squares(const float* squares, int row) {
  const float4* at = reinterpret_cast<const float4*>(squares + row * kSquareParts) + threadIdx.x % 4 * 2;
  return {__ldcg(at), __ldcg(at + 1)};
}
__device__ __forceinline__ float inverse_rms(const Squares& s, float mean, float eps) {
  float sum = ((s.a.x + s.a.y) + (s.a.z + s.a.w)) + ((s.b.x + s.b.y) + (s.b.z + s.b.w));
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return rsqrtf(sum * mean + eps);
}
// common.cuh's activations with a quick division: two units in the last place of float32, far below
// bfloat16's.
__device__ __forceinline__ float quick_act(float x, int act) {
  if (act == static_cast<int>(Act::kNone)) return x;
  const float u = act == static_cast<int>(Act::kSilu) ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-u));
}
// The same without a branch: x / (1 + 2^(x (linear + cubic x^2))).
struct Activation {
  float linear, cubic;
  bool none;
  __device__ __forceinline__ explicit Activation(int act)
      : linear(act == static_cast<int>(Act::kSilu) ? -1.4426950408889634f : -2.302208198140622f),
        cubic(act == static_cast<int>(Act::kSilu) ? 0.0f : -0.10294324f),
        none(act == static_cast<int>(Act::kNone)) {}
  __device__ __forceinline__ float operator()(float x) const;
};
__device__ __forceinline__ float quick_exp2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Activation::operator()(float x) const {
  const float y = __fdividef(x, 1.0f + quick_exp2(x * (linear + cubic * x * x)));
  return none ? x : y;
}

}  // namespace vla::cuda::head
