// The product of many rows on Hopper.
//
// c (m, n) = a (m, k) w (n, k)^T in tiles of 64 * GROUPS rows and COLUMNS packed columns. One warp keeps a
// ring of slices of 64 of k filled by the copy engine; GROUPS warpgroups multiply (wgmma), each 64 rows, and
// finish their sums from registers. Without SPLIT a block takes tile after tile, so that the ring is full
// again when the sums are stored. PAIR = 2: two blocks with neighbouring columns load half of a's slice each,
// for both. With SPLIT the blocks of a cluster share the k of one tile; their sums meet in shared memory and
// are added in the order of the blocks, each block finishing its share of the tile.
#include <algorithm>
#include <array>
#include <atomic>

#include "product.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace vla::cuda {
namespace {

constexpr int kSlice = 64;  // of k: 128 bytes, the width of the swizzle
constexpr int kSharedBytes = 227 * 1024;

struct Grid {
  int tiles_m = 0, tiles_n = 0;  // tiles_n: of all columns, or of pairs of tiles with PAIR = 2
  int slices = 0;                // of k
  int box = 0;                   // rows of w that one copy brings: COLUMNS, or 32
};

template <int GROUPS, int COLUMNS>
struct Shape {
  static constexpr int kRows = 64 * GROUPS;
  static constexpr int kBytesA = kRows * 128, kBytesW = COLUMNS * 128;
  static constexpr int kExtra = 8 * 16 + 2 * COLUMNS * 4;  // barriers, and the biases of two tiles
  static constexpr int kFit = (kSharedBytes - kExtra) / (kBytesA + kBytesW);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kRing = kStages * (kBytesA + kBytesW), kShared = kRing + kExtra;
  static constexpr int kThreads = 128 * (GROUPS + 1);
  // Columns of one wgmma: the assembler refuses 256 with as few registers as four warpgroups start with.
  static constexpr int kWide = GROUPS > 2 && COLUMNS > 192 ? COLUMNS / 2 : COLUMNS;
  // Whether there are registers to read a residual ahead of its unit.
  static constexpr bool kAhead = GROUPS < 3 || COLUMNS < 256;
  // Registers of a thread that multiplies; the others give theirs away.
  static constexpr int kRegisters = GROUPS == 4 ? 112 : GROUPS == 3 ? 160 : GROUPS == 2 ? 240 : 255;
};

__device__ __forceinline__ void meet() {
  cluster_arrive();
  cluster_wait();
}

template <int GROUPS, int COLUMNS, int PAIR, bool SPLIT>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    product_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_w,
                   const __grid_constant__ Product p, const Grid g) {
#if VLA_SM90A
  using S = Shape<GROUPS, COLUMNS>;
  constexpr int kStages = S::kStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  float* const bias = reinterpret_cast<float*>(shared + S::kRing + 8 * 16);
  const uint32_t ring = smem_address(shared);
  const uint32_t full = ring + S::kRing, empty = full + 64;
  const int group = threadIdx.x / 128;  // the last one loads
  const int blocks = SPLIT ? 1 : gridDim.x / PAIR;
  const int rank = PAIR > 1 || SPLIT ? static_cast<int>(cluster_rank()) : 0;
  const int split = SPLIT ? gridDim.x / (g.tiles_m * g.tiles_n) : 1;
  const int first = SPLIT ? blockIdx.x / split : blockIdx.x / PAIR;
  const int tiles = SPLIT ? first + 1 : g.tiles_m * g.tiles_n;
  const int slice0 = SPLIT ? g.slices * rank / split : 0;
  const int slice1 = SPLIT ? g.slices * (rank + 1) / split : g.slices;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * GROUPS * PAIR);  // a warp arrives once
    }
    barrier_init_fence();
  }
  if constexpr (PAIR > 1) {
    meet();
  } else {
    __syncthreads();
  }
  pdl_trigger();

  if (group == GROUPS) {
    if constexpr (GROUPS > 1) registers_down<24>();
    if (threadIdx.x == GROUPS * 128) {
      tma_prefetch_map(&map_a);
      tma_prefetch_map(&map_w);
      const auto load_a = [&](int s, int tile, int slice) {
        const int row = tile % g.tiles_m * S::kRows;
        const uint32_t to = ring + s * (S::kBytesA + S::kBytesW);
        if constexpr (PAIR > 1) {
          constexpr int kPart = S::kRows / PAIR;
          tma_multicast(to + rank * kPart * 128, &map_a, full + 8 * s, slice * kSlice, row + rank * kPart,
                        (1 << PAIR) - 1);
        } else {
          tma_load(to, &map_a, full + 8 * s, slice * kSlice, row);
        }
      };
      const auto load_w = [&](int s, int tile, int slice) {
        const int column = tile / g.tiles_m * PAIR + (PAIR > 1 ? rank : 0);
        const uint32_t to = ring + s * (S::kBytesA + S::kBytesW) + S::kBytesA;
        barrier_expect(full + 8 * s, S::kBytesA + S::kBytesW);
        if (g.box == COLUMNS) {
          tma_load(to, &map_w, full + 8 * s, slice * kSlice, column * COLUMNS);
          return;
        }
        for (int u = 0; u < COLUMNS / 64; ++u) {
          const Columns c = columns_of(p, column * (COLUMNS / 64) + u);
          tma_load(to + u * 8192, &map_w, full + 8 * s, slice * kSlice, c.first);
          tma_load(to + u * 8192 + 4096, &map_w, full + 8 * s, slice * kSlice, c.second);
        }
      };
      // Weights do not depend on what ran before: the first of them are asked for before the wait.
      const int early = min(kStages, first < tiles ? slice1 - slice0 : 0);
      for (int i = 0; i < early; ++i) load_w(i, first, slice0 + i);
      pdl_wait();
      for (int i = 0; i < early; ++i) load_a(i, first, slice0 + i);
      int s = early % kStages, parity = early == kStages ? 0 : 1;
      for (int tile = first; tile < tiles; tile += blocks) {
        for (int i = tile == first ? slice0 + early : slice0; i < slice1; ++i) {
          barrier_wait(empty + 8 * s, parity);
          load_w(s, tile, i);
          load_a(s, tile, i);
          if (++s == kStages) s = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
    if constexpr (SPLIT) meet();
    if constexpr (SPLIT || PAIR > 1) meet();  // nobody leaves while others read its memory or write to it
  } else {
    if constexpr (S::kRegisters < 255) registers_up<S::kRegisters>();
    pdl_wait();
    const auto release = [&](int stage) {
      const uint32_t lane = threadIdx.x & 31;
      if (lane < PAIR) {
        if constexpr (PAIR > 1) {
          barrier_arrive_at(empty + 8 * stage, lane);
        } else {
          barrier_arrive(empty + 8 * stage);
        }
      }
    };
    int s = 0, parity = 0, turn = 0;
    const int thread = threadIdx.x & 127;
    const int row_in_tile = group * 64 + thread / 32 * 16 + thread % 32 / 4;
    for (int tile = first; tile < tiles; tile += blocks) {
      const int row = tile % g.tiles_m * S::kRows + row_in_tile;
      const int unit = (tile / g.tiles_m * PAIR + (PAIR > 1 ? rank : 0)) * (COLUMNS / 64);
      float my_bias = 0.0f;  // read now, needed when the sums are there
      if (p.has_bias && threadIdx.x < COLUMNS) my_bias = bias_in_tile(p, unit, threadIdx.x);
      Ahead ahead;
      float c[COLUMNS / 2];
      int before = 0;
      for (int i = slice0; i < slice1; ++i) {
        barrier_wait(full + 8 * s, parity);
        const uint32_t stage = ring + s * (S::kBytesA + S::kBytesW);
        const uint64_t a = wgmma_tile(stage + group * 64 * 128), w = wgmma_tile(stage + S::kBytesA);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kSlice / 16; ++j) {
#pragma unroll
          for (int h = 0; h < COLUMNS / S::kWide; ++h) {
            wgmma<S::kWide>(*reinterpret_cast<float (*)[S::kWide / 2]>(c + h * (S::kWide / 2)), a + 2 * j,
                            w + 2 * j + h * S::kWide * 8, i > slice0 || j > 0);
          }
        }
        wgmma_commit();
        if (i > slice0) {
          wgmma_wait<1>();
          release(before);
        }
        before = s;
        if (++s == kStages) s = 0, parity ^= 1;
      }
      if (!SPLIT && S::kAhead) ahead = look_ahead(p, row, unit);
      wgmma_wait<0>();
      release(before);
      const float* const tile_bias = p.has_bias ? bias + turn * COLUMNS : nullptr;
      if (p.has_bias) {
        if (threadIdx.x < COLUMNS) bias[turn * COLUMNS + threadIdx.x] = my_bias;
        if (!SPLIT) named_barrier(1, 128 * GROUPS);
        turn ^= 1;
      }
      if constexpr (!SPLIT) {
        // A loop, not unrolled: this code runs once a tile, and fetching it would take longer than running
        // it. The sums of the next unit move to where those of this one were.
#pragma unroll 1
        for (int u = 0; u < COLUMNS / 64; ++u) {
          if (!S::kAhead) ahead = look_ahead(p, row, unit + u);
          const Ahead now = ahead;
          if (S::kAhead && u + 1 < COLUMNS / 64) ahead = look_ahead(p, row, unit + u + 1);
          if (64 * (unit + u) < p.n)
            finish(p, row, unit + u, c, c + 16, tile_bias ? tile_bias + 64 * u : nullptr, now);
#pragma unroll
          for (int i = 0; i + 32 < COLUMNS / 2; ++i) c[i] = c[i + 32];
        }
      } else {
        named_barrier(1, 128 * GROUPS);  // the ring is read by nobody any more
        float4* to = reinterpret_cast<float4*>(shared);
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; ++i) {
          to[(group * (COLUMNS / 8) + i) * 128 + thread] =
              make_float4(c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]);
        }
      }
    }
    if constexpr (SPLIT) {
      meet();
      constexpr int kUnits = COLUMNS / 64;
      for (int item = rank * GROUPS + group; item < GROUPS * kUnits; item += split * GROUPS) {
        const int from = item / kUnits, u = item % kUnits;
        const int row = first % g.tiles_m * S::kRows + from * 64 + thread / 32 * 16 + thread % 32 / 4;
        const int unit = first / g.tiles_m * kUnits + u;
        const uint32_t at = ring + ((from * (COLUMNS / 8) + u * 8) * 128 + thread) * 16;
        const Ahead ahead = look_ahead(p, row, unit);
        float c[32] = {};
        for (int r = 0; r < split; ++r) {
          const uint32_t there = cluster_address(at, r);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float4 v = cluster_load4(there + i * 2048);
            c[4 * i] += v.x;
            c[4 * i + 1] += v.y;
            c[4 * i + 2] += v.z;
            c[4 * i + 3] += v.w;
          }
        }
        if (64 * unit < p.n) {
          finish(p, row, unit, c, c + 16, p.has_bias ? bias + 64 * u : nullptr, ahead);
        }
      }
    }
    if constexpr (SPLIT || PAIR > 1) meet();
  }
#endif
}

template <int GROUPS, int COLUMNS, int PAIR, bool SPLIT>
cudaError_t run(const Product& p, const Tile& tile, const Launch& at) {
  using S = Shape<GROUPS, COLUMNS>;
  Grid g;
  g.tiles_m = ceil_div(p.m, S::kRows);
  g.tiles_n = ceil_div(p.n, COLUMNS * PAIR);
  g.slices = ceil_div(p.k, kSlice);
  g.box = p.rotate && p.head_dim > 64 ? 32 : COLUMNS;
  CUtensorMap map_a, map_w;
  cudaError_t error = tensor_map(&map_a, p.a, p.m, p.k, p.lda, S::kRows / PAIR);
  if (error != cudaSuccess) return error;
  error = tensor_map(&map_w, p.w, p.n, p.k, p.ldw, g.box);
  if (error != cudaSuccess) return error;
  const int work = g.tiles_m * g.tiles_n;
  const int grid = SPLIT ? work * tile.split : (work < at.sms / PAIR ? work : at.sms / PAIR) * PAIR;
  return launch_kernel(product_kernel<GROUPS, COLUMNS, PAIR, SPLIT>, dim3(grid), dim3(S::kThreads),
                       S::kShared, at, SPLIT ? tile.split : PAIR, map_a, map_w, p, g);
}

// How many clusters of `size` blocks the device holds at once: its multiprocessors come in groups that a
// cluster does not cross.
template <int GROUPS, int COLUMNS, int PAIR, bool SPLIT>
int clusters(int size) {
  using S = Shape<GROUPS, COLUMNS>;
  static std::array<std::atomic<int>, 9> known{};  // plus one; 0: not asked yet
  if (known[size] == 0) {
    const auto kernel = product_kernel<GROUPS, COLUMNS, PAIR, SPLIT>;
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

struct Entry {
  int groups, columns, pair;
  bool split;
  cudaError_t (*run)(const Product&, const Tile&, const Launch&);
  int (*clusters)(int);
};
template <int GROUPS, int COLUMNS, int PAIR, bool SPLIT>
constexpr Entry entry() {
  return {GROUPS,
          COLUMNS,
          PAIR,
          SPLIT,
          run<GROUPS, COLUMNS, PAIR, SPLIT>,
          clusters<GROUPS, COLUMNS, PAIR, SPLIT>};
}
constexpr Entry kEntries[] = {
    entry<3, 256, 1, true>(),  entry<3, 192, 1, false>(), entry<3, 128, 1, false>(), entry<3, 128, 1, true>(),
    entry<3, 64, 1, false>(),  entry<3, 64, 1, true>(),   entry<2, 256, 1, false>(), entry<2, 256, 1, true>(),
    entry<2, 192, 1, false>(), entry<2, 128, 1, false>(), entry<2, 128, 1, true>(),  entry<2, 64, 1, false>(),
    entry<2, 64, 1, true>(),   entry<1, 64, 1, false>(),  entry<1, 64, 1, true>(),
};

const Entry* find(const Tile& tile) {
  for (const Entry& e : kEntries) {
    if (e.groups == tile.groups && e.columns == tile.columns && e.pair == tile.pair &&
        e.split == (tile.split > 1)) {
      return &e;
    }
  }
  return nullptr;
}

}  // namespace

bool has_tile_sm90(const Tile& tile) { return tile.split >= 1 && tile.split <= 8 && find(tile) != nullptr; }

cudaError_t product_sm90(const Product& p, const Tile& tile, const Launch& at) {
  const Entry* e = find(tile);
  return e ? e->run(p, tile, at) : cudaErrorInvalidValue;
}

// The tile with the least time by a count of cycles, whose six constants were fitted to 540 timings of 17
// products on an H200 (docs/performance.md, "Vision and prefix"): it names the fastest tile of each of
// the 17. The matrix unit does 64 x 256 x 16 in 128 cycles; all multiprocessors together read some 7.5 KB,
// and each 59 bytes, a cycle from the second-level cache; storing costs by the number, starting and filling
// the ring by the tile.
Tile choose_tile_sm90(const Product& p, int sms) {
  const int slices = ceil_div(p.k, kSlice);
  Tile best;
  double least = 0;
  for (const Entry& e : kEntries) {
    for (int split = e.split ? 2 : 1; split <= (e.split ? 8 : 1) && split <= slices; ++split) {
      const int cluster = e.split ? split : e.pair;
      const int blocks = ceil_div(p.m, 64 * e.groups) * ceil_div(p.n, e.columns * e.pair) * e.pair * split;
      const int room = cluster > 1 ? e.clusters(cluster) * cluster : sms;
      if (room == 0) continue;
      const int active = blocks < room ? blocks : room;
      const double size = 64.0 * e.groups * e.columns, bytes = (64.0 * e.groups / e.pair + e.columns) * 128.0;
      const double slice = std::max({0.958 * size * kSlice / 2048, bytes * active / 7461, bytes / 59});
      const double merge = split > 1 ? 3718 + 0.119 * size : 0.0;
      const double time =
          ceil_div(blocks, room) * (ceil_div(slices, split) * slice + 0.288 * size + 4184) + merge;
      if (best.groups == 0 || time < least) {
        least = time;
        best = {e.groups, e.columns, e.pair, split};
      }
    }
  }
  return best;
}

}  // namespace vla::cuda
