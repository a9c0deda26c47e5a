// The product of many rows on Hopper, of bf16 or E4M3.
//
// c (m, n) = a (m, k) w (n, k)^T in tiles of 64 * GROUPS rows and COLUMNS packed columns. One warp keeps a
// ring of slices of 128 bytes of k filled by the copy engine; GROUPS warpgroups multiply (wgmma), each 64
// rows, and finish their sums from registers. Without SPLIT a block takes tile after tile, so that the ring
// is full again when the sums are stored. With SPLIT the blocks of a cluster share the k of one tile; their
// sums meet in shared memory and are added in the order of the blocks, each block finishing its share of the
// tile.
//
// Of E4M3 the matrix unit keeps some 14 bits of a sum. PROMOTE: after so many slices the sums are added to
// others in float32 registers and begin anew (0: never); as many registers again, so for narrow tiles only.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>

#include "product.cuh"
#include "tensor_map.h"
#include "wgmma_e4m3.cuh"

namespace vla::cuda::sm90 {

// What differs between the operands' types; a slice's bytes, and with them ring, swizzle and descriptors, do
// not.
template <typename E>
struct Operand;
template <>
struct Operand<bf16> {
  using Product = cuda::Product;
  static cudaError_t map(CUtensorMap* map, const void* base, int rows, int cols, int64_t ld, int box_rows) {
    return tensor_map(map, static_cast<const bf16*>(base), rows, cols, ld, box_rows);
  }
  template <int N>
  static __device__ __forceinline__ void multiply(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
    wgmma<N>(c, a, b, add);
  }
};
template <>
struct Operand<e4m3> {
  using Product = QuantisedProduct;
  static cudaError_t map(CUtensorMap* map, const void* base, int rows, int cols, int64_t ld, int box_rows) {
    return tensor_map_bytes(map, base, rows, cols, ld, box_rows);
  }
  template <int N>
  static __device__ __forceinline__ void multiply(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
    wgmma_e4m3<N>(c, a, b, add);
  }
};

template <typename E>
constexpr int kSlice = 128 / static_cast<int>(sizeof(E));  // of k: the width of the swizzle
constexpr int kSharedBytes = 227 * 1024;

struct Grid {
  int tiles_m = 0, tiles_n = 0;
  int slices = 0;       // of k
  bool halves = false;  // a copy brings 32 rows of w of each half of a head, not COLUMNS
};

template <typename E, int GROUPS, int COLUMNS, bool SPLIT>
struct Shape {
  static constexpr int kRows = 64 * GROUPS;
  static constexpr int kThreads = 128 * (GROUPS + 1);
  static constexpr int kBytesA = kRows * 128, kBytesW = COLUMNS * 128;
  static constexpr int kStage = kStaging * 4 * GROUPS;  // to store from
  // Floats that a tile's columns have: biases and, of E4M3, scales. Room for those of two tiles where a block
  // takes several.
  static constexpr int kUnits = (COLUMNS + 63) / 64;  // the last may be half of one
  static constexpr int kPerTile = 64 * kUnits * (std::is_same_v<E, e4m3> ? 2 : 1);
  static constexpr int kTurns = SPLIT && std::is_same_v<E, e4m3> ? 1 : 2;
  static constexpr int kBarriers = 8 * 18;
  static constexpr int kExtra = kBarriers + kTurns * kPerTile * 4 + (SPLIT ? 0 : kStage);
  static constexpr int kFit = (kSharedBytes - kExtra) / (kBytesA + kBytesW);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kRing = kStages * (kBytesA + kBytesW), kShared = kRing + kExtra;
  static constexpr int kStageAt = kShared - kStage;
  // With SPLIT a tile's sums are dealt out to the blocks by pieces, of a warp's 16 rows and a unit's columns.
  // What a block gets, from all, takes the ring's place, and then the staging that of what has been read.
  static constexpr int kPiece = 16 * 64 * 4, kPieces = 4 * GROUPS * kUnits;
  static_assert(!SPLIT || (kPieces + 7) * kPiece <= kRing);  // by up to 8 blocks
  // Columns of one wgmma: the assembler refuses 256 with as few registers as four warpgroups start with.
  static constexpr int kWide = GROUPS > 2 && COLUMNS > 192 ? COLUMNS / 2 : COLUMNS;
  // Registers of a thread that multiplies; the others give theirs away. 255: none are moved.
  static constexpr int kRegisters = GROUPS == 3 ? 160 : GROUPS == 1 ? 255 : 240;
  // Of a thread of the others: what a block starts with (168 for each of 384 threads, 128 of 512) has to do
  // for all, or those that multiply wait for ever.
  static constexpr int kRegistersLeft = GROUPS == 3 ? 32 : 24;
  static_assert(GROUPS == 1 ||
                128 * (GROUPS * kRegisters + kRegistersLeft) <= kThreads * (GROUPS == 3 ? 128 : 168));
};

// Until all blocks of the cluster are here; what they wrote need not be seen.
__device__ __forceinline__ void meet() {
  cluster_arrive_relaxed();
  cluster_wait();
}

// The columns of a tile, for finish().
template <int COLUMNS>
__device__ __forceinline__ auto columns_of_tile(int tile_n) {
  if constexpr (COLUMNS % 64) {
    return Span{tile_n * COLUMNS, COLUMNS};
  } else {
    return tile_n * (COLUMNS / 64);
  }
}

// Whether slice i is added to sums in the matrix unit, or begins some.
template <int PROMOTE>
__device__ __forceinline__ bool continues(int i, int slice0) {
  if constexpr (PROMOTE == 0) {
    return i > slice0;
  } else {
    return (i - slice0) % PROMOTE > 0;
  }
}

template <typename E, int GROUPS, int COLUMNS, bool SPLIT, int PROMOTE, ProductKind KIND>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    product_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_w,
                   const __grid_constant__ OfKind<typename Operand<E>::Product, KIND> p, const Grid g) {
#if VLA_SM90A
  using S = Shape<E, GROUPS, COLUMNS, SPLIT>;
  constexpr int kStages = S::kStages;
  constexpr bool kScaled = std::is_same_v<E, e4m3>;
  extern __shared__ __align__(1024) uint8_t shared[];
  float* const columns = reinterpret_cast<float*>(shared + S::kRing + S::kBarriers);
  const uint32_t ring = smem_address(shared);
  const uint32_t full = ring + S::kRing, empty = full + 64;
  [[maybe_unused]] const uint32_t received = empty + 64;  // sums, from all blocks of the cluster
  const int group = threadIdx.x / 128;                    // the last one loads
  const int blocks = SPLIT ? 1 : gridDim.x;
  const int rank = SPLIT ? static_cast<int>(cluster_rank()) : 0;
  const int split = SPLIT ? gridDim.x / (g.tiles_m * g.tiles_n) : 1;
  const int first = SPLIT ? blockIdx.x / split : blockIdx.x;
  const int tiles = SPLIT ? first + 1 : g.tiles_m * g.tiles_n;
  const int slice0 = SPLIT ? g.slices * rank / split : 0;
  const int slice1 = SPLIT ? g.slices * (rank + 1) / split : g.slices;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * GROUPS);  // a warp arrives once
    }
    if constexpr (SPLIT) barrier_init(received, 1);
    barrier_init_fence();
    if constexpr (SPLIT) {
      int bytes = 0;
      for (int piece = rank; piece < S::kPieces; piece += split) {
        const bool half = COLUMNS % 64 && piece >= S::kPieces - 4 * GROUPS;
        bytes += split * (half ? S::kPiece / 2 : S::kPiece);
      }
      barrier_expect(received, bytes);
    }
  }
  __syncthreads();
  pdl_trigger();

  if (group == GROUPS) {
    if constexpr (S::kRegisters < 255) registers_down<S::kRegistersLeft>();
    if (threadIdx.x == GROUPS * 128) {
      tma_prefetch_map(&map_a);
      tma_prefetch_map(&map_w);
      // Where a tile begins is found once for all its slices: the divisions take as long as loading one.
      int row = 0, column = 0;
      struct {
        int head, row;
      } units[COLUMNS / 64 + 1];  // where a rotated tile's units begin
      const auto begin = [&](int tile) {
        row = tile % g.tiles_m * S::kRows;
        column = tile / g.tiles_m;
        if (g.halves) {
#pragma unroll
          for (int u = 0; u < COLUMNS / 64; ++u) {
            const int at = columns_of(p, column * (COLUMNS / 64) + u).first;
            units[u] = {at / p.head_dim, at % p.head_dim};
          }
        }
        column *= COLUMNS;
      };
      const auto load_a = [&](int s, int slice) {
        const uint32_t to = ring + s * (S::kBytesA + S::kBytesW);
        tma_load(to, &map_a, full + 8 * s, slice * kSlice<E>, row);
      };
      const auto load_w = [&](int s, int slice) {
        const uint32_t to = ring + s * (S::kBytesA + S::kBytesW) + S::kBytesA;
        barrier_expect(full + 8 * s, S::kBytesA + S::kBytesW);
        if (!g.halves) {
          tma_load(to, &map_w, full + 8 * s, slice * kSlice<E>, column);
          return;
        }
#pragma unroll
        for (int u = 0; u < COLUMNS / 64; ++u) {
          tma_load4(to + u * 8192, &map_w, full + 8 * s, slice * kSlice<E>, units[u].row, units[u].head);
        }
      };
      // Weights do not depend on what ran before: the first of them are asked for before the wait.
      const int early = min(kStages, first < tiles ? slice1 - slice0 : 0);
      begin(first);
#pragma unroll 1
      for (int i = 0; i < early; ++i) load_w(i, slice0 + i);
      pdl_wait();
#pragma unroll 1
      for (int i = 0; i < early; ++i) load_a(i, slice0 + i);
      int s = early % kStages, parity = early == kStages ? 0 : 1;
      for (int tile = first; tile < tiles; tile += blocks) {
        if (tile != first) begin(tile);
#pragma unroll 1
        for (int i = tile == first ? slice0 + early : slice0; i < slice1; ++i) {
          barrier_wait(empty + 8 * s, parity);
          load_w(s, i);
          load_a(s, i);
          if (++s == kStages) s = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
    if constexpr (SPLIT) meet();
  } else {
    if constexpr (S::kRegisters < 255) registers_up<S::kRegisters>();
    pdl_wait();
    const auto release = [&](int stage) {
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * stage);
    };
    int s = 0, parity = 0, turn = 0;
    const int thread = threadIdx.x & 127;
    const uint32_t staging = ring + S::kStageAt + threadIdx.x / 32 * kStaging;
    for (int tile = first; tile < tiles; tile += blocks) {
      const int row0 = tile % g.tiles_m * S::kRows + group * 64 + thread / 32 * 16;
      const auto unit = columns_of_tile<COLUMNS>(tile / g.tiles_m);
      float my_bias = 0.0f;  // read now, needed when the sums are there
      if (p.has_bias && threadIdx.x < COLUMNS) my_bias = bias_in_tile(p, unit, threadIdx.x);
      [[maybe_unused]] float my_scale = 0.0f;
      if constexpr (kScaled) {
        if (threadIdx.x < COLUMNS) my_scale = scale_in_tile(p, unit, threadIdx.x);
      }
      constexpr bool kEarly = COLUMNS <= 64;  // few sums leave registers for what their end reads
      Ahead ahead;
      if constexpr (!SPLIT && kEarly) ahead = look_ahead(p, row0, unit);
      float c[COLUMNS / 2];
      [[maybe_unused]] float total[PROMOTE ? COLUMNS / 2 : 1];
      if constexpr (PROMOTE > 0) {
#pragma unroll
        for (int e = 0; e < COLUMNS / 2; ++e) total[e] = 0.0f;
      }
      int before = 0;
      for (int i = slice0; i < slice1; ++i) {
        barrier_wait(full + 8 * s, parity);
        const uint32_t stage = ring + s * (S::kBytesA + S::kBytesW);
        const uint64_t a = wgmma_tile(stage + group * 64 * 128), w = wgmma_tile(stage + S::kBytesA);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // 32 bytes of k each
#pragma unroll
          for (int h = 0; h < COLUMNS / S::kWide; ++h) {
            Operand<E>::template multiply<S::kWide>(
                *reinterpret_cast<float (*)[S::kWide / 2]>(c + h * (S::kWide / 2)), a + 2 * j,
                w + 2 * j + h * S::kWide * 8, continues<PROMOTE>(i, slice0) || j > 0);
          }
        }
        wgmma_commit();
        if (continues<PROMOTE>(i, slice0)) {
          wgmma_wait<1>();
          release(before);
        }
        before = s;
        if (++s == kStages) s = 0, parity ^= 1;
        if constexpr (PROMOTE > 0) {
          if ((i + 1 - slice0) % PROMOTE == 0 || i + 1 == slice1) {
            wgmma_wait<0>();
            release(before);
#pragma unroll
            for (int e = 0; e < COLUMNS / 2; ++e) {  // volatile: not before the wait
              asm volatile("add.f32 %0, %0, %1;" : "+f"(total[e]) : "f"(c[e]));
            }
          }
        }
      }
      if constexpr (PROMOTE > 0) {
#pragma unroll
        for (int e = 0; e < COLUMNS / 2; ++e) c[e] = total[e];
      }
      if constexpr (!SPLIT && !kEarly) ahead = look_ahead(p, row0, unit);
      if constexpr (PROMOTE == 0) {
        wgmma_wait<0>();
        release(before);
      }
      const float* const tile_bias = p.has_bias ? columns + turn * S::kPerTile : nullptr;
      [[maybe_unused]] const float* tile_scale = nullptr;
      if constexpr (kScaled) tile_scale = columns + turn * S::kPerTile + COLUMNS;
      if (kScaled || p.has_bias) {
        if (threadIdx.x < COLUMNS) columns[turn * S::kPerTile + threadIdx.x] = my_bias;
        if constexpr (kScaled) {
          if (threadIdx.x < COLUMNS) columns[turn * S::kPerTile + COLUMNS + threadIdx.x] = my_scale;
        }
        if (!SPLIT) named_barrier(1, 128 * GROUPS);
        turn ^= 1;
      }
      if constexpr (!SPLIT) {
        // A loop, not unrolled, where the end of a unit is long: this code runs once a tile, and fetching it
        // would take longer than running it. The sums of the next unit move to where those of this one were.
        constexpr int kUnroll = KIND == ProductKind::kGated ? S::kUnits : 1;
#pragma unroll kUnroll
        for (int u = 0; u < S::kUnits; ++u) {
          const Ahead now = ahead;
          if (u + 1 < S::kUnits) ahead = look_ahead(p, row0, unit + u + 1);
          if (first_column(unit + u) < p.n) {
            finish(p, row0, unit + u, c, c + 16,
                   {tile_bias ? tile_bias + 64 * u : nullptr, tile_scale + 64 * u}, now, staging);
          }
#pragma unroll
          for (int i = 0; i + 32 < COLUMNS / 2; ++i) c[i] = c[i + 32];
        }
      } else {
        named_barrier(1, 128 * GROUPS);
        meet();  // nobody reads the rings any more
        const int warp = threadIdx.x / 32;
#pragma unroll
        for (int u = 0; u < S::kUnits; ++u) {
          const int piece = u * 4 * GROUPS + warp, owner = piece % split;
          const uint32_t there = cluster_address(received, owner);
          const uint32_t to = cluster_address(
              ring + (piece / split * split + rank) * S::kPiece + threadIdx.x % 32 * 16, owner);
#pragma unroll
          for (int i = 0; i < 8 && u * 64 + i * 8 < COLUMNS; ++i)
            give4(to + i * 512, there, c + 32 * u + 4 * i);
        }
      }
    }
    if constexpr (SPLIT) {
      for (int mine = threadIdx.x / 32; mine * split + rank < S::kPieces; mine += 4 * GROUPS) {
        const int piece = mine * split + rank, u = piece / (4 * GROUPS);
        const int row0 = first % g.tiles_m * S::kRows + piece % (4 * GROUPS) * 16;
        const auto unit = columns_of_tile<COLUMNS>(first / g.tiles_m) + u;
        const uint32_t at = ring + mine * split * S::kPiece;
        const Ahead ahead = look_ahead(p, row0, unit);
        barrier_wait(received, 0);
        float c[32] = {};
        for (int r = 0; r < split; ++r) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (i >= 4 && !whole(unit)) break;
            const float4 v = *reinterpret_cast<const float4*>(shared + (mine * split + r) * S::kPiece +
                                                              i * 512 + threadIdx.x % 32 * 16);
            c[4 * i] += v.x;
            c[4 * i + 1] += v.y;
            c[4 * i + 2] += v.z;
            c[4 * i + 3] += v.w;
          }
        }
        __syncwarp();
        if (first_column(unit) < p.n) {
          finish(p, row0, unit, c, c + 16,
                 {p.has_bias ? columns + 64 * u : nullptr, columns + COLUMNS + 64 * u}, ahead, at);
        }
      }
    }
  }
#endif
}

template <typename E, int GROUPS, int COLUMNS, bool SPLIT, int PROMOTE>
cudaError_t run(const typename Operand<E>::Product& p, const Tile& tile, const Launch& at) {
  using S = Shape<E, GROUPS, COLUMNS, SPLIT>;
  static_assert(COLUMNS % S::kWide == 0 && S::kRegisters <= 255 && S::kStages >= 3);
  // A thread reads at most one bias and one scale.
  static_assert(COLUMNS <= 128 * GROUPS);
  static_assert(COLUMNS % 64 == 0 || (COLUMNS % 32 == 0 && std::is_same_v<E, bf16>));
  if (COLUMNS % 64 && in_pairs(p)) return cudaErrorInvalidValue;
  Grid g;
  g.tiles_m = ceil_div(p.m, S::kRows);
  g.tiles_n = ceil_div(p.n, COLUMNS);
  g.slices = ceil_div(p.k, kSlice<E>);
  g.halves = p.rotate && p.head_dim > 64;
  CUtensorMap map_a, map_w;
  cudaError_t error = Operand<E>::map(&map_a, p.a, p.m, p.k, p.lda, S::kRows);
  if (error != cudaSuccess) return error;
  error = g.halves ? tensor_map_halves(&map_w, p.w, p.n, p.k, p.ldw * sizeof(E), sizeof(E), p.head_dim)
                   : Operand<E>::map(&map_w, p.w, p.n, p.k, p.ldw, COLUMNS);
  if (error != cudaSuccess) return error;
  const int work = g.tiles_m * g.tiles_n;
  const int grid = SPLIT ? work * tile.split : std::min(work, at.sms);
  const auto launch = [&]<ProductKind KIND>() {
    const OfKind<typename Operand<E>::Product, KIND> of_kind = {p};
    return launch_kernel(product_kernel<E, GROUPS, COLUMNS, SPLIT, PROMOTE, KIND>, dim3(grid),
                         dim3(S::kThreads), S::kShared, at, SPLIT ? tile.split : 1, map_a, map_w, of_kind, g);
  };
  if (p.kind == ProductKind::kQkv) return launch.template operator()<ProductKind::kQkv>();
  if constexpr (COLUMNS % 64 == 0) {
    if (p.kind == ProductKind::kGated) return launch.template operator()<ProductKind::kGated>();
  }
  return launch.template operator()<ProductKind::kLinear>();
}

// How many clusters of `size` blocks the device holds at once: its multiprocessors come in groups that a
// cluster does not cross.
template <typename E, int GROUPS, int COLUMNS, bool SPLIT, int PROMOTE>
int clusters(int size) {
  using S = Shape<E, GROUPS, COLUMNS, SPLIT>;
  static std::array<std::atomic<int>, 9> known{};  // plus one; 0: not asked yet
  if (known[size] == 0) {
    const auto kernel = product_kernel<E, GROUPS, COLUMNS, SPLIT, PROMOTE, ProductKind::kLinear>;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = S::kShared;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared) !=
            cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
      cudaGetLastError();
      count = 0;
    }
    known[size] = count + 1;
  }
  return known[size] - 1;
}

template <typename E>
struct Entry {
  int groups, columns;
  bool split;
  cudaError_t (*run)(const typename Operand<E>::Product&, const Tile&, const Launch&);
  int (*clusters)(int);
};
template <typename E, int GROUPS, int COLUMNS, bool SPLIT, int PROMOTE = 0>
constexpr Entry<E> entry() {
  return {GROUPS, COLUMNS, SPLIT, run<E, GROUPS, COLUMNS, SPLIT, PROMOTE>,
          clusters<E, GROUPS, COLUMNS, SPLIT, PROMOTE>};
}

template <typename E, size_t N>
const Entry<E>* find(const Entry<E> (&entries)[N], const Tile& tile) {
  if (tile.split < 1 || tile.split > 8) return nullptr;
  for (const Entry<E>& e : entries) {
    if (e.groups == tile.groups && e.columns == tile.columns && e.split == (tile.split > 1)) return &e;
  }
  return nullptr;
}

// The tile with the least time by a count of cycles, whose constants were fitted to 489 timings of 17
// products in bf16 on an H200: for each of them it names the fastest tile measured, or one within 1 % of it
// (docs/performance.md, "Vision and prefix"). The matrix unit does 64 x 256 x 32 bytes in 128 cycles, at best
// seven eighths of the time; all multiprocessors together are fed some 7.3 KB, and each 64 bytes, a cycle;
// starting, filling the ring and storing cost by the tile, storing by the number too, merging by the parts.
// In E4M3 a slice is as many bytes and as many cycles, of twice the k.
template <typename E, size_t N>
Tile choose(const Entry<E> (&entries)[N], const Product& p, int sms) {
  const int slices = ceil_div(p.k, kSlice<E>);
  Tile best;
  double least = 0;
  for (const Entry<E>& e : entries) {
    if (e.columns % 64 && in_pairs(p)) continue;
    for (int split = e.split ? 2 : 1; split <= (e.split ? 8 : 1) && split <= slices; ++split) {
      const int blocks = ceil_div(p.m, 64 * e.groups) * ceil_div(p.n, e.columns) * split;
      const int room = split > 1 ? e.clusters(split) * split : sms;
      if (room == 0) continue;
      const double size = 64.0 * e.groups * e.columns, bytes = (64.0 * e.groups + e.columns) * 128;
      const double slice =
          std::max({1.143 * size * 64 / 2048, bytes * std::min(blocks, room) / 7295, bytes / 64.4});
      const double merge = split > 1 ? 1100 * split + 0.1 * size : 0.0;
      const double time =
          ceil_div(blocks, room) * (ceil_div(slices, split) * slice + 0.09 * size + 5142) + merge;
      if (best.groups == 0 || time < least) {
        least = time;
        best = {e.groups, e.columns, split};
      }
    }
  }
  return best;
}

}  // namespace vla::cuda::sm90
