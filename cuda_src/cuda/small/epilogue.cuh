// How the partial sums of a product become an operation's output. Latency counts here: a thread keeps its
// columns, so that it can read what goes with them while x is on its way, and nothing is divided by what is
// not a power of two.
#pragma once

#include "product.cuh"

namespace vla::cuda::small {

// The block of 32 rows of W that warp `along_n` of thread block column `column` multiplies by.
template <int WN>
__device__ __forceinline__ int block_of(const Args& a, int column, int along_n) {
  if (a.half == 0) return column * WN + along_n;
  const int pair = column * (WN / 2) + along_n / 2;
  return ((pair >> a.half_shift) << (a.half_shift + 1)) + (pair & (a.half - 1)) + (along_n & 1) * a.half;
}

// Adds up the warps that share columns and sends each row's sums to the block of the cluster that finishes
// it. The norm's bias (row m, if any) goes to all of them.
template <int MT, int WN>
__device__ __forceinline__ void send(const Args& a, const Shape& s, std::byte* smem,
                                     const float (&squares)[MT], int rank, int warp, int lane) {
  constexpr int kWk = kWarps / WN, kColumns = 32 * WN, kRowsAtOnce = kThreads / (8 * WN);
  const float* partial = reinterpret_cast<const float*>(smem + s.partial);
  const uint32_t received = smem_address(smem + s.received);
  const int rows = a.m + (a.norm == NormKind::kRms && a.norm_bias != nullptr ? 1 : 0);
  const int quad = threadIdx.x % 8, along_n = threadIdx.x / 8 % WN;
#pragma unroll
  for (int i = 0; i < ceil_div(8 * MT, kRowsAtOnce); ++i) {
    const int row = threadIdx.x / (8 * WN) + i * kRowsAtOnce;
    if (row >= rows) break;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kWk; ++j) {
      const float4 v =
          *reinterpret_cast<const float4*>(partial + ((along_n + j * WN) * s.rows + row) * kPitch + 4 * quad);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int column = 32 * along_n + 4 * quad;
    if (row < a.m) {
      const int owner = row * a.own_inverse >> 16, local = row - owner * a.own;
      const uint32_t at = received + ((rank * (a.own + 1) + local) * kColumns + column) * 4;
      cluster_store4(cluster_address(at, owner), sum);
    } else {
      const uint32_t at = received + ((rank * (a.own + 1) + a.own) * kColumns + column) * 4;
      for (int r = 0; r < a.split; ++r) cluster_store4(cluster_address(at, r), sum);
    }
  }
  if (a.norm == NormKind::kRms) {
    float sum[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) sum[i] = warp_sum(squares[i]);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int row = warp + kWarps * i;
      if (lane == i && row < a.m) {
        const int owner = row * a.own_inverse >> 16, local = row - owner * a.own;
        cluster_store(cluster_address(smem_address(smem + s.squares) + (rank * a.own + local) * 4, owner),
                      sum[i]);
      }
    }
  }
}

// The columns a thread finishes: n and n + 1 of a part (of h1 and h2 where heads are rotated; of G and U
// where they are gated), in rows first, first + step, ... of its block's.
struct Place {
  int part = -1, n = 0, column = 0;  // part -1: none; column: of the thread block
  int packed = 0;                    // row of the packed W
  int first = 0, step = 0;
  bool second = false;  // n + 1 is a column, too
};

template <int WN>
__device__ __forceinline__ Place place_of(const Args& a, Mode mode, int column) {
  const int pair_bits = mode == Mode::kGated ? 3 : 4;
  constexpr int kWnBits = WN == 1 ? 0 : WN == 2 ? 1 : 2;
  const int block_bits = a.half > 0 ? kWnBits - 1 : kWnBits;
  const int c = (threadIdx.x & ((1 << pair_bits) - 1)) * 2;
  int along_n = (threadIdx.x >> pair_bits) & ((1 << block_bits) - 1);
  if (a.half > 0) along_n *= 2;
  Place p;
  p.first = threadIdx.x >> (pair_bits + block_bits);
  p.step = kThreads >> (pair_bits + block_bits);
  p.column = 32 * along_n + c;
  const int block = block_of<WN>(a, column, along_n);
  if (block >= a.blocks) return p;
  p.packed = 32 * block + c;
  const int part = a.parts > 2 && block >= a.part[2].first   ? 2
                   : a.parts > 1 && block >= a.part[1].first ? 1
                                                             : 0;
  p.n = mode == Mode::kGated ? 16 * block + c : 32 * (block - a.part[part].first) + c;
  if (p.n < a.part[part].n) p.part = part;
  p.second = p.n + 1 < a.part[part].n;
  return p;
}

// What goes with a thread's columns and its first two rows, read long before it is needed.
//   linear: bias 0-1, gate 2-3, residual of the first rows 4, 5 (two bf16 each)
//   qkv, rotated: cos 0-1, sin 2-3 of the first row, 4-7 of the second
//   shift: those of the two columns and of the two that go with them (h2, U)
struct Ahead {
  float v[8];
  float shift[4] = {};
  bool residual = false;
};

__device__ __forceinline__ void read_rope(const Args& a, int n, int row, float& cx, float& cy, float& sx,
                                          float& sy) {
  const int d2 = 32 * a.half;
  const float* table =
      a.rope + table_row(a.positions[row * a.ld_positions], a.rope_rows) * a.ld_rope + (n & (d2 - 1));
  cx = table[0], cy = table[1], sx = table[d2], sy = table[d2 + 1];
}

__device__ __forceinline__ Ahead look_ahead(const Args& a, Mode mode, const Place& p, int rank) {
  Ahead ahead;
  if (p.part < 0) return ahead;
  if (a.shift != nullptr) {
    ahead.shift[0] = a.shift[p.packed], ahead.shift[1] = a.shift[p.packed + 1];
    const int with = mode == Mode::kGated ? 16 : mode == Mode::kQkv ? 32 * a.half : 0;
    if (with > 0) ahead.shift[2] = a.shift[p.packed + with], ahead.shift[3] = a.shift[p.packed + with + 1];
  }
  const int rows = min(a.own, a.m - rank * a.own), row = rank * a.own + p.first;
  if (mode == Mode::kLinear) {
    const float* bias = a.part[0].bias;
    ahead.v[0] = bias ? bias[p.n] : 0.0f;
    ahead.v[1] = bias && p.second ? bias[p.n + 1] : 0.0f;
    ahead.v[2] = a.gate ? a.gate[p.n] : 1.0f;
    ahead.v[3] = a.gate && p.second ? a.gate[p.n + 1] : 1.0f;
    const auto* residual = static_cast<const bf16*>(a.residual) + p.n;
    ahead.residual = a.residual != nullptr && !a.residual_f32 && a.residual_rows >= a.row0 + a.m &&
                     p.second && ((reinterpret_cast<uintptr_t>(residual) | (a.ld_residual * 2)) & 3) == 0;
    if (ahead.residual) {
      const int64_t at = (a.row0 + row) * a.ld_residual;
      if (p.first < rows) ahead.v[4] = __uint_as_float(*reinterpret_cast<const uint32_t*>(residual + at));
      if (p.first + p.step < rows) {
        ahead.v[5] =
            __uint_as_float(*reinterpret_cast<const uint32_t*>(residual + at + p.step * a.ld_residual));
      }
    }
  } else if (mode == Mode::kQkv && p.part < a.rotate) {
    if (p.first < rows) read_rope(a, p.n, row, ahead.v[0], ahead.v[1], ahead.v[2], ahead.v[3]);
    if (p.first + p.step < rows) {
      read_rope(a, p.n, row + p.step, ahead.v[4], ahead.v[5], ahead.v[6], ahead.v[7]);
    }
  }
  return ahead;
}

struct Sums {
  const float* received;  // [split][own + 1][columns]
  int split, stride, columns, bias_row;
  bool has_bias;

  // (norm(x) W^T)[row][c] and [c + 1], c a column of the thread block.
  __device__ __forceinline__ float2 at(int row, int c, float rstd) const {
    float2 sum = make_float2(0.0f, 0.0f), bias = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < kMaxCluster; ++r) {
      if (r < split) {
        const float2 v = *reinterpret_cast<const float2*>(received + r * stride + row * columns + c);
        sum.x += v.x, sum.y += v.y;
      }
    }
    if (has_bias) {
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        if (r < split) {
          const float2 b = *reinterpret_cast<const float2*>(received + r * stride + bias_row * columns + c);
          bias.x += b.x, bias.y += b.y;
        }
      }
    }
    return make_float2(sum.x * rstd + bias.x, sum.y * rstd + bias.y);
  }
};

__device__ __forceinline__ void put(void* out, int64_t i, float2 v, bool second, bool f32) {
  if (!f32 && second && (reinterpret_cast<uintptr_t>(static_cast<bf16*>(out) + i) & 3) == 0) {
    *reinterpret_cast<uint32_t*>(static_cast<bf16*>(out) + i) = pack2(v.x, v.y);
    return;
  }
  store_from_float(out, i, v.x, f32);
  if (second) store_from_float(out, i + 1, v.y, f32);
}

// v = y + bias;  x += dt (v - gain weight (previous - (x - time v)))
__device__ __forceinline__ void euler_value(const Args& a, const Part& p, int row, int n, float y) {
  const float v = y + (p.bias != nullptr ? p.bias[n] : 0.0f);
  float* x = a.sample + row * a.ld_sample + n;
  const float error =
      (a.previous[row * a.ld_previous + n] - (*x - *a.time * v)) * a.weight[row * a.ld_weight];
  *x += a.dt * (v - *a.gain * error);
}

// Finishes the rows of this block, rank * own and on.
template <int WN>
__device__ __forceinline__ void finish(const Args& a, const Shape& s, std::byte* smem, int rank,
                                       const Place& place, const Ahead& ahead) {
  if (place.part < 0) return;
  const float* squares = reinterpret_cast<const float*>(smem + s.squares);
  const Sums sums{
      reinterpret_cast<const float*>(smem + s.received), a.split, (a.own + 1) * 32 * WN, 32 * WN, a.own,
      a.norm == NormKind::kRms && a.norm_bias != nullptr};
  const int rows = min(a.own, a.m - rank * a.own), n = place.n;
  const Part& p = a.part[place.part];
  int turn = 0;
  for (int local = place.first; local < rows; local += place.step, ++turn) {
    const int row = rank * a.own + local;
    float rstd = 1.0f;
    if (a.norm == NormKind::kRms) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        if (r < a.split) sum += squares[r * a.own + local];
      }
      rstd = rsqrtf(sum / static_cast<float>(a.k) + a.eps);
    }
    float2 y = sums.at(local, place.column, rstd);
    if (a.mode == Mode::kLinear) {
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
    } else if (a.mode == Mode::kGated) {
      const float2 up = sums.at(local, place.column + 16, rstd);
      put(p.out, row * p.ld + n, make_float2(activate(y.x, a.act) * up.x, activate(y.y, a.act) * up.y),
          place.second, a.out_f32);
    } else if (a.mode == Mode::kEuler) {
      euler_value(a, p, row, n, y.x);
      if (place.second) euler_value(a, p, row, n + 1, y.y);
    } else {
      if (p.bias != nullptr) y.x += p.bias[n], y.y += place.second ? p.bias[n + 1] : 0.0f;
      if (a.half > 0) {
        const int d2 = 32 * a.half;  // half of a head
        float2 h2 = sums.at(local, place.column + 32, rstd);
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
  }
}

}  // namespace vla::cuda::small
