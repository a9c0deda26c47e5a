// The layers of a vision encoder in double precision on the GPU, and random numbers: as plain as can be.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace vla::test::vision {

using bf16 = __nv_bfloat16;

// Uniform in [mean - scale, mean + scale), by place; some columns larger where `outliers`.
__global__ void fill_kernel(void* to, bool f32, int64_t rows, int cols, int64_t ld, float scale, float mean,
                            uint32_t seed, bool outliers) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= rows * cols) return;
  uint64_t z = (uint64_t(seed) << 40) + uint64_t(i) * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull, z ^= z >> 31;
  const int col = int(i % cols);
  float v = mean + scale * (float(z >> 40) * (2.0f / 16777216.0f) - 1.0f);
  if (outliers && col % 97 == 7) v *= 12.0f;
  const int64_t at = i / cols * ld + col;
  if (f32) {
    static_cast<float*>(to)[at] = v;
  } else {
    static_cast<bf16*>(to)[at] = __float2bfloat16(v);
  }
}

// ---- double precision
__global__ void widen_kernel(double* to, const bf16* from, int64_t rows, int cols, int64_t ld) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < rows * cols) to[i] = double(__bfloat162float(from[i / cols * ld + i % cols]));
}
// A block a row.
__global__ void norm_kernel(double* to, const double* x, int cols, double eps, const float* gamma,
                            const float* beta) {
  __shared__ double sums[256];
  const double* row = x + int64_t(blockIdx.x) * cols;
  const auto total = [&](double v) {
    sums[threadIdx.x] = v;
    __syncthreads();
    for (int o = 128; o > 0; o >>= 1) {
      if (int(threadIdx.x) < o) sums[threadIdx.x] += sums[threadIdx.x + o];
      __syncthreads();
    }
    const double all = sums[0];
    __syncthreads();
    return all;
  };
  double sum = 0.0, squares = 0.0;
  for (int c = threadIdx.x; c < cols; c += 256) sum += row[c];
  const double mean = total(sum) / cols;
  for (int c = threadIdx.x; c < cols; c += 256) squares += (row[c] - mean) * (row[c] - mean);
  const double scale = rsqrt(total(squares) / cols + eps);
  for (int c = threadIdx.x; c < cols; c += 256)
    to[int64_t(blockIdx.x) * cols + c] = (row[c] - mean) * scale * gamma[c] + beta[c];
}
// out (m, n) = residual + act(x (m, k) w (n, k)^T + bias). Blocks of 16 x 16.
__global__ void product_kernel(double* out, const double* x, const bf16* w, const float* bias,
                               const double* residual, int m, int n, int k, int ldw, bool gelu) {
  __shared__ double a[16][17], b[16][17];
  const int i = blockIdx.y * 16 + threadIdx.y, j = blockIdx.x * 16 + threadIdx.x;
  double sum = 0.0;
  for (int s = 0; s < k; s += 16) {
    const int c = s + threadIdx.x, r = blockIdx.x * 16 + threadIdx.y;
    a[threadIdx.y][threadIdx.x] = i < m && c < k ? x[int64_t(i) * k + c] : 0.0;
    b[threadIdx.y][threadIdx.x] = r < n && c < k ? double(__bfloat162float(w[int64_t(r) * ldw + c])) : 0.0;
    __syncthreads();
    for (int e = 0; e < 16; ++e) sum += a[threadIdx.y][e] * b[threadIdx.x][e];
    __syncthreads();
  }
  if (i >= m || j >= n) return;
  sum += double(bias[j]);
  if (gelu) sum = 0.5 * sum * (1.0 + tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
  out[int64_t(i) * n + j] = sum + (residual ? residual[int64_t(i) * n + j] : 0.0);
}
// A block for each query of a head; qkv (rows, 3 width).
__global__ void attention_kernel(double* out, const double* qkv, int keys, int heads, int d) {
  extern __shared__ double weights[];
  __shared__ double top, total;
  const int row = blockIdx.x, head = blockIdx.y, width = heads * d, first = row / keys * keys;
  const double* q = qkv + int64_t(row) * 3 * width + head * d;
  for (int j = threadIdx.x; j < keys; j += blockDim.x) {
    const double* key = qkv + int64_t(first + j) * 3 * width + width + head * d;
    double s = 0.0;
    for (int c = 0; c < d; ++c) s += q[c] * key[c];
    weights[j] = s / sqrt(double(d));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    top = weights[0], total = 0.0;
    for (int j = 1; j < keys; ++j) top = fmax(top, weights[j]);
    for (int j = 0; j < keys; ++j) total += weights[j] = exp(weights[j] - top);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    double s = 0.0;
    for (int j = 0; j < keys; ++j)
      s += weights[j] * qkv[int64_t(first + j) * 3 * width + 2 * width + head * d + c];
    out[int64_t(row) * width + head * d + c] = s / total;
  }
}

}  // namespace vla::test::vision
