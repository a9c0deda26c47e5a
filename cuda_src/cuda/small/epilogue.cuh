// How the partial sums of a product become an operation's output.
#pragma once

#include "product.cuh"

namespace vla::cuda::small {

// The block of 32 rows of W that warp `along_n` of thread block column `column` multiplies by.
__device__ __forceinline__ int block_of(const Args& a, int column, int along_n) {
  if (a.half == 0) return column * a.wn + along_n;
  const int pair = column * (a.wn / 2) + along_n / 2;
  return pair / a.half * 2 * a.half + pair % a.half + (along_n & 1) * a.half;
}

// Adds up the warps that share columns and sends each row's sums to the block of the cluster that finishes
// it. The norm's bias (row m, if any) goes to all of them.
template <int MT>
__device__ __forceinline__ void send(const Args& a, const Shape& s, std::byte* smem,
                                     const float (&squares)[MT], int rank, int warp, int lane) {
  const int wk = kWarps / a.wn, columns = 32 * a.wn;
  const float* partial = reinterpret_cast<const float*>(smem + s.partial);
  const uint32_t received = smem_address(smem + s.received);
  const int rows = a.m + (a.norm == NormKind::kRms && a.norm_bias != nullptr ? 1 : 0);
  for (int item = threadIdx.x; item < rows * 8 * a.wn; item += kThreads) {
    const int quad = item % 8, along_n = item / 8 % a.wn, row = item / (8 * a.wn);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int j = 0; j < wk; ++j) {
      const float4 v = *reinterpret_cast<const float4*>(
          partial + ((along_n + j * a.wn) * s.rows + row) * kPitch + 4 * quad);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const bool to_all = row == a.m;
    const int first = to_all ? 0 : row / s.own, last = to_all ? a.split - 1 : first;
    const int local = to_all ? s.own : row % s.own;
    const uint32_t at = received + ((rank * (s.own + 1) + local) * columns + 32 * along_n + 4 * quad) * 4;
    for (int r = first; r <= last; ++r) cluster_store4(cluster_address(at, r), sum);
  }
  if (a.norm == NormKind::kRms) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const float sum = warp_sum(squares[i]);
      const int row = warp + kWarps * i;
      if (lane == 0 && row < a.m) {
        const uint32_t at = smem_address(smem + s.squares) + (rank * s.own + row % s.own) * 4;
        cluster_store(cluster_address(at, row / s.own), sum);
      }
    }
  }
}

struct Sums {
  const float* received;  // [split][own + 1][columns]
  int split, stride, columns, bias_row;
  bool has_bias;

  // (norm(x) W^T)[row][c] and [c + 1], c a column of the thread block.
  __device__ __forceinline__ float2 at(int row, int c, float rstd) const {
    float2 sum = make_float2(0.0f, 0.0f), bias = make_float2(0.0f, 0.0f);
    for (int r = 0; r < split; ++r) {
      const float2 v = *reinterpret_cast<const float2*>(received + r * stride + row * columns + c);
      sum.x += v.x, sum.y += v.y;
      if (has_bias) {
        const float2 b = *reinterpret_cast<const float2*>(received + r * stride + bias_row * columns + c);
        bias.x += b.x, bias.y += b.y;
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

__device__ __forceinline__ float linear_value(const Args& a, const Part& p, int row, int n, float y) {
  if (p.bias != nullptr) y += p.bias[n];
  y = activate(a.scale * y, a.act);
  if (a.gate != nullptr) y *= a.gate[n];
  if (a.residual != nullptr) {
    y += load_as_float(a.residual, (a.row0 + row) % a.residual_rows * a.ld_residual + n, a.residual_f32);
  }
  return y;
}

// v = y + bias;  x += dt (v - gain weight (previous - (x - time v)))
__device__ __forceinline__ void euler_value(const Args& a, const Part& p, int row, int n, float y) {
  const float v = y + (p.bias != nullptr ? p.bias[n] : 0.0f);
  float* x = a.sample + row * a.ld_sample + n;
  const float error =
      (a.previous[row * a.ld_previous + n] - (*x - *a.time * v)) * a.weight[row * a.ld_weight];
  *x += a.dt * (v - *a.gain * error);
}

// Finishes the rows of this block: rank * own ... Two columns a thread.
__device__ __forceinline__ void finish(const Args& a, const Shape& s, std::byte* smem, int rank, int column) {
  const float* squares = reinterpret_cast<const float*>(smem + s.squares);
  const Sums sums{
      reinterpret_cast<const float*>(smem + s.received), a.split, (s.own + 1) * 32 * a.wn, 32 * a.wn, s.own,
      a.norm == NormKind::kRms && a.norm_bias != nullptr};
  const int rows = min(s.own, a.m - rank * s.own);
  // pairs of columns of a warp's block, and blocks, that one row has work for
  const int pairs = a.mode == Mode::kGated ? 8 : 16, blocks = a.half > 0 ? a.wn / 2 : a.wn;
  for (int item = threadIdx.x; item < rows * pairs * blocks; item += kThreads) {
    const int c = item % pairs * 2, local = item / (pairs * blocks), row = rank * s.own + local;
    const int along_n = item / pairs % blocks * (a.half > 0 ? 2 : 1);
    const int block = block_of(a, column, along_n);
    if (block >= a.blocks) continue;
    float rstd = 1.0f;
    if (a.norm == NormKind::kRms) {
      float sum = 0.0f;
      for (int r = 0; r < a.split; ++r) sum += squares[r * s.own + local];
      rstd = rsqrtf(sum / static_cast<float>(a.k) + a.eps);
    }
    const float2 y = sums.at(local, 32 * along_n + c, rstd);
    if (a.mode == Mode::kGated) {
      const float2 up = sums.at(local, 32 * along_n + 16 + c, rstd);
      const int n = 16 * block + c;
      const float2 v = make_float2(activate(y.x, a.act) * up.x, activate(y.y, a.act) * up.y);
      if (n < a.part[0].n) put(a.part[0].out, row * a.part[0].ld + n, v, n + 1 < a.part[0].n, a.out_f32);
      continue;
    }
    int index = 0;
    while (index + 1 < a.parts && block >= a.part[index + 1].first) ++index;
    const Part& p = a.part[index];
    const int n = 32 * (block - p.first) + c;
    if (n >= p.n) continue;
    const bool second = n + 1 < p.n;
    if (a.mode == Mode::kEuler) {
      euler_value(a, p, row, n, y.x);
      if (second) euler_value(a, p, row, n + 1, y.y);
    } else if (a.mode == Mode::kLinear) {
      const float2 v =
          make_float2(linear_value(a, p, row, n, y.x), second ? linear_value(a, p, row, n + 1, y.y) : 0.0f);
      put(p.out, row * p.ld + n, v, second, a.out_f32);
    } else {
      float2 h1 = y;
      if (p.bias != nullptr) h1.x += p.bias[n], h1.y += second ? p.bias[n + 1] : 0.0f;
      if (a.half == 0) {
        put(p.out, row * p.ld + n, h1, second, a.out_f32);
        continue;
      }
      const int d2 = 32 * a.half;  // half of a head
      float2 h2 = sums.at(local, 32 * along_n + 32 + c, rstd);
      if (p.bias != nullptr) h2.x += p.bias[n + d2], h2.y += p.bias[n + d2 + 1];
      if (index < a.rotate) {
        const float* table = a.rope + a.positions[row * a.ld_positions] * a.ld_rope + n % (2 * d2);
        const float cx = table[0], cy = table[1], sx = table[d2], sy = table[d2 + 1];
        const float2 r1 = make_float2(h1.x * cx - h2.x * sx, h1.y * cy - h2.y * sy);
        h2 = make_float2(h2.x * cx + h1.x * sx, h2.y * cy + h1.y * sy);
        h1 = r1;
      }
      put(p.out, row * p.ld + n, h1, true, a.out_f32);
      put(p.out, row * p.ld + n + d2, h2, true, a.out_f32);
    }
  }
}

}  // namespace vla::cuda::small
