// Products of few rows on Hopper: y (m, n) = norm(x) W^T and what the operation does with it, m <= 64.
//
// The weights' fragments (pack.cu) are the matrix unit's left operand in registers, 64 rows a warpgroup; x is
// the right one, in shared memory as the copy engine left it: N rows, m padded to 16, 56 or 64. A thread
// block has 64 * G columns of y and one part of k, a cluster all of k. One warp feeds: weights in stages of
// 64 columns, the first of them before pdl_wait(), so that reading W never stops between kernels, then x. Two
// warpgroups multiply: with G = 2 each its own 64 columns of y, with G = 1 each half of every stage.
//
// RMS norm needs no pass over x: rstd is a factor of the sums, the norm's weight a factor of W's fragments
// (the product rounded to bf16), its bias a constant of y, `shift` = bias W^T, made when the plan is. The
// sums of squares of x's rows come from the kernel that wrote x (`squares_out` here), or from row_squares.
// Each row of y is finished by one block of the cluster: the others send it their sums, in shared memory, by
// rank.
#include "../large/tensor_map.h"
#include "epilogue.cuh"
#include "wgmma_rows.cuh"

namespace vla::cuda::small {

namespace {

constexpr int kStageTiles = 4;                    // k tiles of a stage: 64 columns, one swizzled box of x
[[maybe_unused]] constexpr int kFeeder = kWarps;  // the warp that feeds
constexpr int kAllThreads = kThreads + 32;
constexpr int kMaxStages = 32;  // of k
constexpr int kSumPitch = 68;   // floats from one row of a warpgroup's sums to the next

// Shared memory of a block. Small enough for two blocks a multiprocessor: the next kernel's weights arrive
// while this one ends. What the other blocks send takes the place of x, the warpgroups' sums that of the
// weights.
struct Room {
  int stages, slots;  // stages of k of this block; how many of them fit in the ring
  int ring, scale, rstd, barriers, bytes;
};
constexpr int kHalfOfShared = 107 * 1024;

template <int N>
__host__ __device__ Room room_of(int g, int own, int split, int tiles) {
  Room r;
  r.stages = ceil_div(tiles, kStageTiles);
  const int x = r.stages * N * 128, received = split * own * 64 * g * 4;
  r.ring = round_up(x > received ? x : received, 1024);
  const int stage = g * 2 * kStageTiles * 1024, sums = 2 * N * kSumPitch * 4;
  r.slots = (kHalfOfShared - r.ring) / stage;
  if (r.slots < 2) r.slots = 2;
  if (r.slots > r.stages) r.slots = r.stages;
  r.scale = r.ring + (r.slots * stage > sums ? r.slots * stage : sums);
  r.rstd = r.scale + r.stages * kStageTiles * 16 * 4;
  r.barriers = r.rstd + 64 * 4;
  r.bytes = r.barriers + (3 * kMaxStages + 1) * 8 + 1024;  // 1024: to align x
  return r;
}

// Two bf16 weights times two factors, rounded once.
[[maybe_unused]] __device__ __forceinline__ uint32_t times2(uint32_t w, float2 factor) {
  const float2 v = unpack2(w);
  return pack2(v.x * factor.x, v.y * factor.y);
}

// 1 / sqrt(mean(x^2) + eps) of this block's rows, from the parts of their sums of squares.
[[maybe_unused]] __device__ __forceinline__ void row_scales(const Args& a, float* rstd, int rank, int warp,
                                                            int lane) {
  const int rows = min(a.own, a.m - rank * a.own);
#pragma unroll 1
  for (int local = warp; local < rows; local += kWarps) {
    const float* parts = a.squares_in + (rank * a.own + local) * kSquareParts;
    float sum = lane < a.square_parts ? parts[lane] : 0.0f;
    if (lane + 32 < a.square_parts) sum += parts[lane + 32];
    sum = warp_sum(sum);
    if (lane == 0) rstd[local] = rsqrtf(sum / static_cast<float>(a.k) + a.eps);
  }
}

[[maybe_unused]] __device__ __forceinline__ void stage_scale(const Args& a, float* scale, int first,
                                                             int count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int col = first + i;
    scale[i] = col < a.k ? (a.norm_weight != nullptr ? a.norm_weight[col] + a.plus : 1.0f) : 0.0f;
  }
}

// Finishes this block's rows; see epilogue.cuh for what a thread has.
template <Mode kMode, int WN>
__device__ __forceinline__ void finish_rows(const Args& a, const float* received, const float* rstd, int rank,
                                            int column, const Place& place, const Ahead& ahead) {
  constexpr int kColumns = 32 * WN;
  const int rows = min(a.own, a.m - rank * a.own), n = place.n;
  const Part& p = a.part[place.part < 0 ? 0 : place.part];
  const auto sum_of = [&](int local, int c) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < kMaxCluster; ++r) {
      if (r < a.split) {
        const float2 v = *reinterpret_cast<const float2*>(received + (r * a.own + local) * kColumns + c);
        sum.x += v.x, sum.y += v.y;
      }
    }
    return sum;
  };
  const bool scaled = a.norm == NormKind::kRms;
  int turn = 0;
#pragma unroll 1
  for (int local = place.first; local < rows; local += place.step, ++turn) {
    const int row = rank * a.own + local;
    const float factor = scaled ? rstd[local] : 1.0f;
    float2 y = sum_of(local, place.column);
    y.x = y.x * factor + ahead.shift[0], y.y = y.y * factor + ahead.shift[1];
    float squares = 0.0f;
    if (kMode == Mode::kLinear && place.part >= 0) {
      y.x = activate(a.scale * (y.x + ahead.v[0]), a.act) * ahead.v[2];
      y.y = activate(a.scale * (y.y + ahead.v[1]), a.act) * ahead.v[3];
      if (ahead.residual) {
        const uint32_t raw = turn < 2
                                 ? __float_as_uint(turn == 0 ? ahead.v[4] : ahead.v[5])
                                 : *reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(a.residual) +
                                                                      (a.row0 + row) * a.ld_residual + n);
        const float2 r = unpack2(raw);
        y.x += r.x, y.y += r.y;
      } else if (a.residual != nullptr) {
        const int64_t at = (a.row0 + row) % a.residual_rows * a.ld_residual + n;
        y.x += load_as_float(a.residual, at, a.residual_f32);
        if (place.second) y.y += load_as_float(a.residual, at + 1, a.residual_f32);
      }
      put(p.out, row * p.ld + n, y, place.second, a.out_f32);
      const float2 kept = unpack2(pack2(y.x, y.y));
      squares = kept.x * kept.x + (place.second ? kept.y * kept.y : 0.0f);
    } else if (kMode == Mode::kGated && place.part >= 0) {
      float2 up = sum_of(local, place.column + 16);
      up.x = up.x * factor + ahead.shift[2], up.y = up.y * factor + ahead.shift[3];
      put(p.out, row * p.ld + n, make_float2(activate(y.x, a.act) * up.x, activate(y.y, a.act) * up.y),
          place.second, a.out_f32);
    } else if (kMode == Mode::kEuler && place.part >= 0) {
      euler_value(a, p, row, n, y.x);
      if (place.second) euler_value(a, p, row, n + 1, y.y);
    } else if (kMode == Mode::kQkv && place.part >= 0) {
      if (p.bias != nullptr) y.x += p.bias[n], y.y += place.second ? p.bias[n + 1] : 0.0f;
      if (a.half > 0) {
        const int d2 = 32 * a.half;  // half of a head
        float2 h2 = sum_of(local, place.column + 32);
        h2.x = h2.x * factor + ahead.shift[2], h2.y = h2.y * factor + ahead.shift[3];
        if (p.bias != nullptr) h2.x += p.bias[n + d2], h2.y += p.bias[n + d2 + 1];
        if (place.part < a.rotate) {
          float cx = ahead.v[0], cy = ahead.v[1], sx = ahead.v[2], sy = ahead.v[3];
          if (turn == 1) cx = ahead.v[4], cy = ahead.v[5], sx = ahead.v[6], sy = ahead.v[7];
          if (turn > 1) read_rope(a, n, row, cx, cy, sx, sy);
          const float2 h1 = y;
          y = make_float2(h1.x * cx - h2.x * sx, h1.y * cy - h2.y * sy);
          h2 = make_float2(h2.x * cx + h1.x * sx, h2.y * cy + h1.y * sy);
        }
        put(p.out, row * p.ld + n + d2, h2, true, a.out_f32);
      }
      put(p.out, row * p.ld + n, y, place.second, a.out_f32);
    }
    if (kMode == Mode::kLinear && a.squares_out != nullptr) {
      // a warp has 64 columns of one row
      squares = warp_sum(squares);
      const int part = column * (WN / 2) + (WN == 4 ? threadIdx.x / 32 % 2 : 0);
      if (threadIdx.x % 32 == 0) a.squares_out[row * kSquareParts + part] = squares;
    }
  }
}

template <int N, int G, Mode kMode>
__global__ void __launch_bounds__(kAllThreads, 2)
    product_sm90(const __grid_constant__ Args a, const __grid_constant__ CUtensorMap x_map) {
#if VLA_SM90A
  extern __shared__ std::byte raw_smem[];
  std::byte* smem = raw_smem + (1024 - (smem_address(raw_smem) & 1023) & 1023);
  constexpr int WN = 2 * G;
  const Room room = room_of<N>(G, a.own, a.split, a.tiles);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int rank = block_rank(), column = cluster_index();
  const int tile0 = rank * a.tiles, tiles = max(0, min(a.tiles, a.k_tiles - tile0));
  const int stages = ceil_div(tiles, kStageTiles);
  const uint32_t base = smem_address(smem);
  const uint32_t w_full = base + room.barriers, w_empty = w_full + kMaxStages * 8,
                 x_full = w_empty + kMaxStages * 8;
  const uint32_t sums_full = x_full + kMaxStages * 8;
  constexpr int kStageBytes = WN * kStageTiles * 1024;

  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < room.slots; ++i) {
      barrier_init(w_full + 8 * i, 1);
      barrier_init(w_empty + 8 * i, kWarps);
    }
#pragma unroll 1
    for (int i = 0; i < stages; ++i) barrier_init(x_full + 8 * i, 1);
    barrier_init(sums_full, 1);
    barrier_init_fence();
    const int rows = max(0, min(a.own, a.m - rank * a.own));
    barrier_expect(sums_full, a.split * rows * 32 * WN * 4);
  }
  __syncthreads();

  if (warp == kFeeder) {
    if (lane == 0) {
      int block_at[WN], count = 0;
#pragma unroll
      for (int i = 0; i < WN; ++i) {
        block_at[i] = block_of<WN>(a, column, i);
        if (block_at[i] < a.blocks) ++count;
      }
      const auto feed = [&](int stage, int slot) {
        const int in = min(kStageTiles, tiles - stage * kStageTiles);
        barrier_expect(w_full + 8 * slot, count * in * 1024);
#pragma unroll
        for (int i = 0; i < WN; ++i) {
          if (block_at[i] >= a.blocks) continue;
          const uint4* from =
              a.w + (static_cast<int64_t>(block_at[i]) * a.k_tiles + tile0 + stage * kStageTiles) * 64;
          bulk_load(base + room.ring + slot * kStageBytes + i * kStageTiles * 1024, from, in * 1024,
                    w_full + 8 * slot);
        }
      };
      const int first = min(stages, room.slots);
#pragma unroll 1
      for (int s = 0; s < first; ++s) feed(s, s);
      tma_prefetch_map(&x_map);
      pdl_trigger();
      pdl_wait();
#pragma unroll 1
      for (int s = 0; s < stages; ++s) {
        barrier_expect(x_full + 8 * s, N * 128);
        tma_load(base + s * N * 128, &x_map, x_full + 8 * s, (tile0 + s * kStageTiles) * 16, 0);
      }
#pragma unroll 1
      for (int s = first, slot = 0, parity = 0; s < stages; ++s) {
        wait_for(w_empty + 8 * slot, parity);
        feed(s, slot);
        if (++slot == room.slots) slot = 0, parity ^= 1;
      }
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    return;
  }

  const int group = warp / 4;
  float* scale = reinterpret_cast<float*>(smem + room.scale);
  float* rstd = reinterpret_cast<float*>(smem + room.rstd);
  const bool scaled = a.norm == NormKind::kRms;
  const Place place = place_of<WN>(a, kMode, column);
  if (scaled && a.norm_constant) stage_scale(a, scale, tile0 * 16, stages * kStageTiles * 16);
  pdl_trigger();
  pdl_wait();
  if (scaled && !a.norm_constant) stage_scale(a, scale, tile0 * 16, stages * kStageTiles * 16);
  const Ahead ahead = look_ahead(a, kMode, place, rank);
  if (scaled) named_barrier(1, kThreads);

  // acc (64 rows of W, N rows of x) of this warpgroup
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
  constexpr int kMine = G == 2 ? kStageTiles : kStageTiles / 2;  // tiles of a stage that this warpgroup takes
  const int tile_in_stage = G == 2 ? 0 : group * kMine;
  // of this warp's 16 rows: block (of 32), then half of it
  const std::byte* w_smem = smem + room.ring +
                            ((G == 2 ? 2 * group : 0) + warp % 4 / 2) * kStageTiles * 1024 + warp % 2 * 512 +
                            lane * 16;
  const float2* scale2 = reinterpret_cast<const float2*>(scale) + lane % 4;
  const bool there = block_of<WN>(a, column, (G == 2 ? 2 * group : 0) + warp % 4 / 2) < a.blocks;
  uint32_t w[2][kMine][4];
  int slot = 0, parity = 0;
  const auto multiply = [&](int stage, uint32_t (&f)[kMine][4]) {
    wait_for(w_full + 8 * slot, parity);
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int t = tile_in_stage + j;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (there && stage * kStageTiles + t < tiles) {
        v = *reinterpret_cast<const uint4*>(w_smem + slot * kStageBytes + t * 1024);
      }
      f[j][0] = v.x, f[j][1] = v.y, f[j][2] = v.z, f[j][3] = v.w;
      if (scaled) {
        const float2 low = scale2[(stage * kStageTiles + t) * 8],
                     high = scale2[(stage * kStageTiles + t) * 8 + 4];
        f[j][0] = times2(f[j][0], low), f[j][1] = times2(f[j][1], low);
        f[j][2] = times2(f[j][2], high), f[j][3] = times2(f[j][3], high);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(w_empty + 8 * slot);
    if (++slot == room.slots) slot = 0, parity ^= 1;
    wait_for(x_full + 8 * stage, 0);
    wgmma_fence();
    const uint64_t x = wgmma_tile(base + stage * N * 128);
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      if (stage * kStageTiles + tile_in_stage + j < tiles)
        wgmma_rows<N>(acc, f[j], x + 2 * (tile_in_stage + j));
    }
    wgmma_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < stages; stage += 2) {
    if (stage > 0) wgmma_wait<1>();
    multiply(stage, w[0]);
    if (stage + 1 < stages) {
      if (stage > 0) wgmma_wait<1>();
      multiply(stage + 1, w[1]);
    }
  }
  wgmma_wait<0>();

  // sums of the warpgroup: [row of x][64 rows of W]. The others may send over x once all of the cluster are
  // done with it
  cluster_arrive();
  named_barrier(1, kThreads);
  float* sums = reinterpret_cast<float*>(smem + room.ring) + group * N * kSumPitch;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    float* at = sums + (8 * i + lane % 4 * 2) * kSumPitch + warp % 4 * 16 + lane / 4;
    at[0] = acc[4 * i], at[kSumPitch] = acc[4 * i + 1], at[8] = acc[4 * i + 2],
    at[kSumPitch + 8] = acc[4 * i + 3];
  }
  named_barrier(1, kThreads);
  cluster_wait();
  {
    const float* all = reinterpret_cast<const float*>(smem + room.ring);
    const int quad = threadIdx.x % 16, half = G == 2 ? threadIdx.x / 16 % 2 : 0;
    constexpr int kRowsAtOnce = kThreads / (16 * G);
#pragma unroll
    for (int i = 0; i < ceil_div(N, kRowsAtOnce); ++i) {
      const int row = threadIdx.x / (16 * G) + i * kRowsAtOnce;
      if (row < a.m) {
        float4 v = *reinterpret_cast<const float4*>(all + (half * N + row) * kSumPitch + 4 * quad);
        if (G == 1) {
          const float4 other = *reinterpret_cast<const float4*>(all + (N + row) * kSumPitch + 4 * quad);
          v.x += other.x, v.y += other.y, v.z += other.z, v.w += other.w;
        }
        const int owner = row * a.own_inverse >> 16, local = row - owner * a.own;
        const int at = ((rank * a.own + local) * 32 * WN + 64 * half + 4 * quad) * 4;
        if (a.split > 1) {
          send4(cluster_address(base + at, owner), cluster_address(sums_full, owner), v);
        } else {
          *reinterpret_cast<float4*>(smem + at) = v;
        }
      }
    }
  }
  if (rank * a.own < a.m) {
    if (scaled) row_scales(a, rstd, rank, warp, lane);  // while the sums are on their way
    named_barrier(1, kThreads);
    if (a.split > 1) wait_for(sums_full, 0);
    finish_rows<kMode, WN>(a, reinterpret_cast<const float*>(smem), rstd, rank, column, place, ahead);
  }
#endif
}

// squares (rows, kSquareParts): the first of each row's parts is the sum of x^2 over the row, k columns of
// bf16.
__global__ void __launch_bounds__(256) row_squares(const bf16* x, int64_t ld, int m, int k, float* squares) {
  pdl_trigger();
  pdl_wait();
  const int row = blockIdx.x;
  __shared__ float parts[8];
  float sum = 0.0f;
  for (int c = threadIdx.x; c < k; c += 256) {
    const float v = __bfloat162float(x[row * ld + c]);
    sum += v * v;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 8; ++i) sum += parts[i];
    squares[row * kSquareParts] = sum;
  }
}

int rows_of_x(const Args& a) { return a.m <= 16 ? 16 : a.m <= 56 ? 56 : 64; }

template <int N, int G, Mode kMode>
cudaError_t run_as(const Args& a, const CUtensorMap& map, const Launch& at) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.blocks, 2 * G) * a.split));
  return launch_kernel(product_sm90<N, G, kMode>, grid, kAllThreads,
                       room_of<N>(G, a.own, a.split, a.tiles).bytes, at, a.split, a, map);
}

template <int N>
cudaError_t run_rows(const Args& a, const CUtensorMap& map, const Launch& at) {
  const bool two = a.wn == 4;
  switch (a.mode) {
    case Mode::kLinear:
      return two ? run_as<N, 2, Mode::kLinear>(a, map, at) : run_as<N, 1, Mode::kLinear>(a, map, at);
    case Mode::kGated:
      return two ? run_as<N, 2, Mode::kGated>(a, map, at) : run_as<N, 1, Mode::kGated>(a, map, at);
    case Mode::kQkv:
      return two ? run_as<N, 2, Mode::kQkv>(a, map, at) : run_as<N, 1, Mode::kQkv>(a, map, at);
    default:
      return run_as<N, 1, Mode::kEuler>(a, map, at);
  }
}

}  // namespace

bool fits_sm90(const Args& a, const Launch& at) {
  if (at.arch != 90 || !a.x_whole || a.m > kSmallRows || a.norm == NormKind::kLayer) return false;
  return a.norm == NormKind::kNone ||
         (at.squares != nullptr && (a.norm_bias == nullptr || a.shift != nullptr));
}

bool set_split_sm90(Args& a, int g, int split) {
  a.wn = 2 * g, a.split = split, a.tiles = ceil_div(a.k_tiles, split);
  a.own = ceil_div(a.m, split), a.own_inverse = ceil_div(65536, a.own);
  if (ceil_div(a.k_tiles, a.tiles) != split || ceil_div(a.tiles, kStageTiles) > kMaxStages) return false;
  if (a.mode == Mode::kEuler && g == 2) return false;
  return room_of<64>(g, a.own, split, a.tiles).bytes <= 227 * 1024;
}

bool choose_split_sm90(Args& a, const Launch& at) {
  // What a sweep of all splits in place was best with on an H200: 64 columns a block; clusters of 8 where
  // that makes at most three blocks for two multiprocessors, else two blocks each, else (some 40 columns of
  // blocks) four.
  const int columns = ceil_div(a.blocks, 2);
  int split = columns * kMaxCluster * 2 <= at.sms * 3 + at.sms / 4 ? kMaxCluster
              : columns < at.sms / 2 - 6                           ? 4
                                                                   : 2 * at.sms / columns;
  if (split > kMaxCluster) split = kMaxCluster;
  for (; split > 1; --split) {
    if (set_split_sm90(a, 1, split)) return true;
  }
  return set_split_sm90(a, 1, 1) || set_split_sm90(a, 2, 1);
}

cudaError_t run_product_sm90(Args& a, const Launch& at) {
  Launch here = at;
  if (a.norm == NormKind::kRms && a.squares_in == nullptr) {
    const cudaError_t error = launch_kernel(row_squares, a.m, 256, 0, at, 1, static_cast<const bf16*>(a.x),
                                            a.ldx, a.m, a.k, at.squares);
    if (error != cudaSuccess) return error;
    a.squares_in = at.squares, a.square_parts = 1;
    here.pdl = true;
  }
  const int n = rows_of_x(a);
  CUtensorMap map;
  const cudaError_t error = tensor_map(&map, static_cast<const bf16*>(a.x), a.m, a.k, a.ldx, n);
  if (error != cudaSuccess) return error;
  return n == 16   ? run_rows<16>(a, map, here)
         : n == 56 ? run_rows<56>(a, map, here)
                   : run_rows<64>(a, map, here);
}

}  // namespace vla::cuda::small
