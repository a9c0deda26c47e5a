// Attention of many queries on Hopper for wide heads that share their keys, as those of a large prefix do.
//
// out = softmax(q k^T / sqrt(d) + mask) v as in attention_sm90.cu, for as many blocks as there are
// multiprocessors: reading keys and values, which every block does, takes as long as multiplying. A tile is
// 72 rows of queries, the heads that share a key head being rows too, and belongs to a cluster of two blocks,
// each of which has half of the keys. The products are turned round: scores are keys x queries, sums columns
// of v x queries, so that the matrix unit's 64 rows are keys, then columns of v, and a tile of queries may
// have any multiple of 8. Four warpgroups: each has 64 keys (the first up to 32 more, the rest), then 64
// columns of v. All scores of a block are there before the first is used, so nothing is rescaled. At the end
// each block of the cluster is given the other's sums for some of the queries and finishes those.
#include <cudaTypedefs.h>

#include <climits>
#include <cmath>

#include "attention.cuh"
#include "tensor_map.h"
#include "wgmma_registers.cuh"

namespace vla::cuda {
namespace pairs {

constexpr int kRows = 72, kColumns = 256, kGroups = 4, kThreads = 128 * kGroups;
constexpr int kBlocks = kRows / 8, kValues = kRows / 2;  // of 8 queries; sums of a thread
constexpr int kUnit = 32, kTileKeys = 64, kTiles = 5;    // keys are dealt out by units; the last tile is one
constexpr int kMostUnits = 2 * kTiles - 1;               // of a block
constexpr int kOwn = (kBlocks + 1) / 2;                  // of the 8-query blocks, finished by the first block
constexpr int kBoxQ = kRows * 128, kBox = kTileKeys * 128;  // bytes of 64 columns
constexpr int kSlot = kColumns / 64 * kBox;                 // a tile of keys or values
constexpr int kTileP = kRows * 128;                         // weights of 64 keys
constexpr int kPadded = kColumns + 4;                       // floats of a finished row

// Shared memory. Queries, later the other block's sums; weights; four slots of keys and values, later what is
// finished; the small things.
constexpr int kSumsBytes = kOwn * kThreads * 16;
constexpr int kWeightsAt = kSumsBytes, kSlotsAt = kWeightsAt + kTiles * kTileP;
constexpr int kSmallAt = kSlotsAt + 4 * kSlot;
static_assert(kColumns / 64 * kBoxQ <= kSumsBytes && kOwn * 8 * kPadded * 4 <= 4 * kSlot);
static_assert(kSlotsAt % 1024 == 0 && kSlot <= kTiles * kTileP);
struct Small {
  uint64_t keys[kTiles], values[kGroups], queries[kColumns / 64], rest[kGroups], received;  // barriers
  int64_t out_at[kRows];                                                                    // -1: no such row
  float2 theirs[kRows];  // the other block's maximum and total of each row
  float2 share[kRows];   // what both blocks' sums are multiplied by
  int top[kRows], seen[kRows], least_seen;
  float totals[4 * kGroups][kRows];
};
constexpr int kShared = kSmallAt + static_cast<int>(sizeof(Small));
static_assert(kShared <= 227 * 1024);

struct Maps {
  CUtensorMap q, k, v, k_unit, v_unit;
};

// c (64, 72) (+)= a (64, 16) b (72, 16)^T, both in shared memory; TURNED: a is stored (16, 64).
template <int TURNED>
__device__ __forceinline__ void wgmma_72(float (&c)[kValues], uint64_t a, uint64_t b, bool add) {
  VLA_MATRIX_UNIT(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %38, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {" VLA_NAMES_36
      "}, %36, %37, p, 1, 1, %39, 0;\n}\n" : VLA_SUMS_36 : "l"(a),
      "l"(b), "r"(static_cast<int>(add)), "n"(TURNED));
  (void)c, (void)a, (void)b, (void)add;
}
// Stores matrices of 8 x 8 turned round; lane l names the row (l mod 8) of matrix l / 8.
__device__ __forceinline__ void store_turned_x4(uint32_t address, const uint32_t (&r)[4]) {
#if VLA_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  (void)address, (void)r;
#endif
}
__device__ __forceinline__ void store_turned_x2(uint32_t address, uint32_t r0, uint32_t r1) {
#if VLA_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r0),
               "r"(r1)
               : "memory");
#else
  (void)address, (void)r0, (void)r1;
#endif
}
__device__ __forceinline__ void fence_before_copies_and_products() {
#if VLA_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Floats as integers of the same order.
__device__ __forceinline__ int ordered(float v) {
  const int bits = __float_as_int(v);
  return bits < 0 ? bits ^ INT_MAX : bits;
}
__device__ __forceinline__ float from_ordered(int v) { return __int_as_float(v < 0 ? v ^ INT_MAX : v); }

// Column i of a thread's 18 (two of each 8-query block) as a row of the tile of queries.
__device__ __forceinline__ int query_of(int i) { return i / 2 * 8 + 2 * (threadIdx.x & 3) + (i & 1); }

// Combines the columns of the eight lanes that have the same ones, and hands each column to one of them.
template <typename F, typename G>
__device__ __forceinline__ void combine_columns(float (&v)[kValues / 2], float neutral, const F& two,
                                                const G& take) {
  const int lane = threadIdx.x & 31;
  int first = 0;
  float a[9], b[5], c[3];
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    const bool high = lane & 16;
    const float other = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + 9], 16);
    a[i] = two(high ? v[i + 9] : v[i], other);
  }
  first += lane & 16 ? 9 : 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const bool high = lane & 8;
    const float upper = i + 5 < 9 ? a[i + 5 < 9 ? i + 5 : 0] : neutral;
    const float other = __shfl_xor_sync(0xffffffffu, high ? a[i] : upper, 8);
    b[i] = two(high ? upper : a[i], other);
  }
  first += lane & 8 ? 5 : 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const bool high = lane & 4;
    const float upper = i + 3 < 5 ? b[i + 3 < 5 ? i + 3 : 0] : neutral;
    const float other = __shfl_xor_sync(0xffffffffu, high ? b[i] : upper, 4);
    c[i] = two(high ? upper : b[i], other);
  }
  first += lane & 4 ? 3 : 0;
  const int most = lane & 4 ? (lane & 8 ? 1 : 2) : 3;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i < most) take(query_of(first + i), c[i]);
  }
}

template <bool E4M3>
__global__ void __launch_bounds__(kThreads, 1)
    attention_pairs_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Queries p) {
#if VLA_SM90A
  extern __shared__ __align__(1024) uint8_t shared[];
  Small& small = *reinterpret_cast<Small*>(shared + kSmallAt);
  const uint32_t base = smem_address(shared), weights = base + kWeightsAt;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, group = warp / 4;
  const int rank = static_cast<int>(cluster_rank()), other = rank ^ 1;
  const int kv_head = blockIdx.y, batch = blockIdx.z;
  const int rows = kRows / p.group, row0 = blockIdx.x / 2 * rows;  // of queries, before the heads are rows
  const int all_units = ceil_div(p.n, kUnit), first_units = (all_units + 1) / 2;
  const int units = rank ? all_units - first_units : first_units;
  const int key0 = rank * first_units * kUnit, key1 = min(p.n, key0 + units * kUnit);
  const int first = rank ? kOwn : 0, own = rank ? kBlocks - kOwn : kOwn;  // 8-query blocks to finish
  const auto slot_of_keys = [&](int tile) {                               // the last: where weights will be
    return tile < kGroups ? base + kSlotsAt + tile * kSlot : weights;
  };
  const auto slot_of_values = [&](int tile) { return base + kSlotsAt + (tile + 1) % 4 * kSlot; };

  if (threadIdx.x == 0) {
    for (uint64_t& barrier : small.keys) barrier_init(smem_address(&barrier), 1);
    for (uint64_t& barrier : small.values) barrier_init(smem_address(&barrier), 1);
    for (uint64_t& barrier : small.queries) barrier_init(smem_address(&barrier), 1);
    for (uint64_t& barrier : small.rest) barrier_init(smem_address(&barrier), 1);
    barrier_init(smem_address(&small.received), 1);
    barrier_init_fence();
    small.least_seen = INT_MAX;
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.k_unit, &maps.v_unit})
      tma_prefetch_map(map);
  }
  __syncthreads();
  pdl_trigger();
  pdl_wait();

  // One thread of each warpgroup loads: of the queries and of the last tile, a quarter of the columns; of the
  // others, a whole tile.
  const bool loads = threadIdx.x % 128 == 0;
  const auto load_box = [&](uint32_t to, const CUtensorMap* map, uint32_t barrier, int c, int tile) {
    tma_load3(to + c * kBox, map, barrier, c * 64, kv_head, batch * p.n + key0 + tile * kTileKeys);
  };
  const auto load = [&](int tile, bool values) {
    if (2 * tile >= units) return;
    const bool whole = 2 * tile + 1 < units;
    const uint32_t to = values ? slot_of_values(tile) : slot_of_keys(tile);
    const uint32_t barrier = smem_address(values ? &small.values[tile] : &small.keys[tile]);
    const CUtensorMap* map = whole ? values ? &maps.v : &maps.k : values ? &maps.v_unit : &maps.k_unit;
    barrier_expect(barrier, whole ? kSlot : kSlot / 2);
    for (int c = 0; c < kColumns / 64; ++c) load_box(to, map, barrier, c, tile);
  };
  if (loads) {
    const uint32_t queries = smem_address(&small.queries[group]),
                   rest = smem_address(&small.keys[kTiles - 1]);
    barrier_expect(queries, kBoxQ);
    tma_load3(base + group * kBoxQ, &maps.q, queries, group * 64, kv_head * p.group, batch * p.m + row0);
    load(group, false);
    if (units == kMostUnits) {
      if (group == 0) barrier_expect(rest, kSlot / 2);
      load_box(slot_of_keys(kTiles - 1), &maps.k_unit, rest, group, kTiles - 1);
    }
    if (group == 0) barrier_expect(smem_address(&small.received), own * kThreads * 16 + kRows * 8);
  }
  __syncwarp();
  if (threadIdx.x < kRows) {
    const int row = row0 + static_cast<int>(threadIdx.x) / p.group, head = threadIdx.x % p.group;
    const int seen = p.q_block ? p.q_block[min(row, p.m - 1) * p.ld_q_block] : 0;
    small.seen[threadIdx.x] = seen;
    atomicMin(&small.least_seen, seen);
    small.top[threadIdx.x] = ordered(-INFINITY);
    small.out_at[threadIdx.x] = row < p.m ? (static_cast<int64_t>(batch) * p.m + row) * p.ldo +
                                                (kv_head * p.group + head) * p.head_dim
                                          : -1;
  }
  // This thread's keys of a tile: k and k + 8. What no query sees has the largest number.
  const int k = warp % 4 * 16 + lane / 4;
  int blocks[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = key0 + (group + 4 * t) * kTileKeys + k + 8 * h;
      blocks[t][h] = key >= key1 ? INT_MAX : p.k_block ? p.k_block[key * p.ld_k_block] : 0;
    }
  }

  __syncthreads();

  // Scores, and each query's largest. Slots that have been read take values.
  float s[2][kValues], column[kValues / 2];
  const auto score = [&](float (&to)[kValues], int tile) {
    barrier_wait(smem_address(&small.keys[tile]), 0);
#pragma unroll
    for (int kk = 0; kk < kColumns / 16; ++kk) {
      if (kk % 4 == 0) {
        barrier_wait(smem_address(&small.queries[kk / 4]), 0);
        wgmma_fence();
      }
      wgmma_72<0>(to, wgmma_tile(slot_of_keys(tile) + kk / 4 * kBox + kk % 4 * 32),
                  wgmma_tile(base + kk / 4 * kBoxQ + kk % 4 * 32), kk > 0);
    }
    wgmma_commit();
  };
  const auto scored = [&](float (&to)[kValues]) {
    wgmma_wait<0>();
#pragma unroll
    for (float& v : to) asm volatile("" : "+f"(v));
  };
  const auto find_top = [&](float (&v)[kValues], const int (&block)[2]) {
    const int least = small.least_seen;
    const bool hidden = __any_sync(0xffffffffu, block[0] > least || block[1] > least);
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      float& x = v[i / 2 * 4 + i % 2];
      float& y = v[i / 2 * 4 + 2 + i % 2];
      if (hidden) {
        const int seen = small.seen[query_of(i)];
        x = block[0] <= seen ? x : -INFINITY;
        y = block[1] <= seen ? y : -INFINITY;
      }
      column[i] = fmaxf(column[i], fmaxf(x, y));
    }
  };
  const bool has_tile = 2 * group < units, has_rest = group == 0 && units == kMostUnits;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) column[i] = -INFINITY;
  if (has_tile) {
    score(s[0], group);
    scored(s[0]);
  }
  named_barrier(1 + group, 128);
  const auto load_next = [&] {  // where the tile was
    if (loads) load((group + kGroups - 1) % kGroups, true);
    __syncwarp();
  };
  if (has_rest) {
    score(s[1], kTiles - 1);
    load_next();
    find_top(s[0], blocks[0]);
    scored(s[1]);
    find_top(s[1], blocks[1]);
  } else {
    load_next();
    find_top(s[0], blocks[0]);
  }
  cluster_arrive_relaxed();  // this warp has done with the queries: the other block may write there
  combine_columns(
      column, -INFINITY, [](float a, float b) { return fmaxf(a, b); },
      [&](int query, float v) { atomicMax(&small.top[query], ordered(v)); });
  __syncthreads();

  // Weights, as bf16 rows of queries for the matrix unit.
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) column[i] = 0.0f;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int tile = group + 4 * t;
    if ((t == 1 && !has_rest) || tile * kTileKeys + warp % 4 * 16 >= units * kUnit) break;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float top = from_ordered(small.top[query_of(i)]);
      const float shift = top == -INFINITY ? 0.0f : top * p.scale;  // nothing seen: all weights become 0
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& e = s[t][i / 2 * 4 + 2 * h + i % 2];
        e = exp2_fast(e * p.scale - shift);
        column[i] += e;
      }
    }
    const int piece = warp % 4 * 2 + (lane >> 3 & 1), row = lane & 7;
    const uint32_t to = weights + tile * kTileP + row * 128 + ((piece ^ row) << 4);
    const auto pair = [&](int i) { return pack2(s[t][2 * i], s[t][2 * i + 1]); };
#pragma unroll
    for (int i = 0; i + 1 < kBlocks; i += 2) {
      store_turned_x4(to + (i + lane / 16) * 1024,
                      {pair(2 * i), pair(2 * i + 1), pair(2 * i + 2), pair(2 * i + 3)});
    }
    store_turned_x2(to + (kBlocks - 1) * 1024, pair(2 * kBlocks - 2), pair(2 * kBlocks - 1));
  }
  fence_before_copies_and_products();
  __syncthreads();

  // Sums: this warpgroup's 64 columns of v. The weights' own are added up meanwhile.
  const auto add_up = [&] {
    combine_columns(
        column, 0.0f, [](float a, float b) { return a + b; },
        [&](int query, float v) { small.totals[warp][query] = v; });
  };
  float o[kValues];
#pragma unroll
  for (float& v : o) v = 0.0f;
  wgmma_fence();
  for (int tile = 0; 2 * tile < units; ++tile) {
    barrier_wait(smem_address(tile < kGroups ? &small.values[tile] : &small.rest[group]), 0);
    wgmma_fence();
    const uint32_t v = slot_of_values(tile) + group * kBox;
    const uint64_t w = wgmma_tile(weights + tile * kTileP);
    const auto add = [&](int kk) {  // 16 keys
      wgmma_72<1>(o, wgmma_tile_of_rows(v + kk * 2048, kBox), w + 2 * kk, true);
    };
    add(0);
    add(1);
    if (2 * tile + 1 < units) {
      wgmma_fence();
      add(2);
      add(3);
    }
    wgmma_commit();
    if (tile == kTiles - 2) add_up();
    if (tile == 1 && units == kMostUnits) {
      // The last tile has no slot but that of the first, of which a warpgroup reads the columns that it
      // loads.
      wgmma_wait<1>();
      named_barrier(1 + group, 128);
      if (loads) {
        const uint32_t rest = smem_address(&small.rest[group]);
        barrier_expect(rest, kBox / 2);
        load_box(slot_of_values(kTiles - 1), &maps.v_unit, rest, group, kTiles - 1);
      }
      __syncwarp();
    }
  }
  if (units <= 2 * (kTiles - 2)) add_up();
  wgmma_wait<0>();
#pragma unroll
  for (float& v : o) asm volatile("" : "+f"(v));

  // Each block gets the other's sums for its queries, as the same thread has them.
  cluster_wait();
  const uint32_t received = cluster_address(smem_address(&small.received), other);
  const uint32_t there = cluster_address(base + threadIdx.x * 16, other);
  if (rank == 0) {
#pragma unroll
    for (int i = kOwn; i < kBlocks; ++i) give4(there + (i - kOwn) * kThreads * 16, received, o + 4 * i);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) give4(there + i * kThreads * 16, received, o + 4 * i);
  }
  __syncthreads();
  const int query = threadIdx.x;
  if (query < kRows) {
    float2 mine = {from_ordered(small.top[query]), 0.0f};
    if (mine.x != -INFINITY) mine.x *= p.scale;
#pragma unroll
    for (int w = 0; w < 4 * kGroups; ++w) mine.y += small.totals[w][query];
    give2(cluster_address(smem_address(&small.theirs[query]), other), received, mine);
    barrier_wait(smem_address(&small.received), 0);
    const float2 theirs = small.theirs[query];
    const float high = fmaxf(mine.x, theirs.x), shift = high == -INFINITY ? 0.0f : high;
    const float x = exp2_fast(mine.x - shift), y = exp2_fast(theirs.x - shift);
    const float total = x * mine.y + y * theirs.y;
    const float share = total > 0.0f ? (E4M3 ? p.out_inverse : 1.0f) / total : 0.0f;
    small.share[query] = {x * share, y * share};
  }
  barrier_wait(smem_address(&small.received), 0);
  __syncthreads();
  float* const finished = reinterpret_cast<float*>(shared + kSlotsAt);
  const auto finish = [&](int i, int to) {
    const float4 more = *reinterpret_cast<const float4*>(shared + (to * kThreads + threadIdx.x) * 16);
    const int query = to * 8 + 2 * (lane & 3);
    const float2 s0 = small.share[first * 8 + query], s1 = small.share[first * 8 + query + 1];
    float* const at = finished + query * kPadded + group * 64 + warp % 4 * 16 + lane / 4;
    at[0] = o[4 * i] * s0.x + more.x * s0.y;
    at[kPadded] = o[4 * i + 1] * s1.x + more.y * s1.y;
    at[8] = o[4 * i + 2] * s0.x + more.z * s0.y;
    at[kPadded + 8] = o[4 * i + 3] * s1.x + more.w * s1.y;
  };
  if (rank == 0) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) finish(i, i);
  } else {
#pragma unroll
    for (int i = kOwn; i < kBlocks; ++i) finish(i, i - kOwn);
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < ceil_div(kOwn * 8, 4 * kGroups); ++turn) {
    const int i = turn * 4 * kGroups + warp;
    const int64_t at = i < own * 8 ? small.out_at[first * 8 + i] + 8 * lane : -1;
    if (at < 8 * lane || 8 * lane >= p.head_dim) continue;
    const float* const from = finished + i * kPadded + 8 * lane;
    const float4 x = *reinterpret_cast<const float4*>(from), y = *reinterpret_cast<const float4*>(from + 4);
    if constexpr (E4M3) {
      const uint2 v = {pack_e4m3(x.x, x.y) | pack_e4m3(x.z, x.w) << 16,
                       pack_e4m3(y.x, y.y) | pack_e4m3(y.z, y.w) << 16};
      *reinterpret_cast<uint2*>(static_cast<e4m3*>(p.out) + at) = v;
    } else {
      const uint4 v = {pack2(x.x, x.y), pack2(x.z, x.w), pack2(y.x, y.y), pack2(y.z, y.w)};
      *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + at) = v;
    }
  }
#endif
}

int clusters_of(const Queries& p) { return ceil_div(p.m, kRows / p.group) * (p.heads / p.group) * p.batch; }

}  // namespace pairs

bool fits_attention_pairs(const Queries& p, int sms) {
  using namespace pairs;
  return p.head_dim > 128 && p.head_dim <= kColumns && kRows % p.group == 0 &&
         ceil_div(p.n, kUnit) <= 2 * kMostUnits && 2 * clusters_of(p) <= sms;
}

cudaError_t attention_pairs_sm90(const Queries& p, const Launch& at) {
  using namespace pairs;
  Maps maps;
  const int kv_heads = p.heads / p.group;
  cudaError_t error =
      tensor_map_heads(&maps.q, p.q, p.batch * p.m, p.heads, p.head_dim, p.ldq, kRows / p.group, p.group);
  const auto map = [&](CUtensorMap* to, const bf16* from, int64_t ld, int keys) {
    if (error == cudaSuccess)
      error = tensor_map_heads(to, from, p.batch * p.n, kv_heads, p.head_dim, ld, keys);
  };
  map(&maps.k, p.k, p.ldk, kTileKeys);
  map(&maps.v, p.v, p.ldv, kTileKeys);
  map(&maps.k_unit, p.k, p.ldk, kUnit);
  map(&maps.v_unit, p.v, p.ldv, kUnit);
  if (error != cudaSuccess) return error;
  const dim3 grid(2 * ceil_div(p.m, kRows / p.group), kv_heads, p.batch);
  return launch_kernel(p.out_inverse != 0.0f ? attention_pairs_kernel<true> : attention_pairs_kernel<false>,
                       grid, dim3(kThreads), kShared, at, 2, maps, p);
}

}  // namespace vla::cuda
