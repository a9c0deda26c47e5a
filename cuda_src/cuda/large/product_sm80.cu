// The product of many rows on devices from sm_80 up.
//
// c (m, n) = a (m, k) w (n, k)^T in tiles of 128 x 128 packed columns: eight warps of 32 x 64 (mma.sync),
// slices of 32 of k in a ring of four filled by cp.async. Rows of a slice are 64 bytes in shared memory; the
// four 16-byte pieces of a row change places with the row, so that ldmatrix meets no bank twice.
#include "product.cuh"

namespace vla::cuda {
namespace {

constexpr int kTile = 128, kSlice = 32, kStages = 4, kThreads = 256;
constexpr int kBytes = kTile * kSlice * 2;  // of one operand's slice

__device__ __forceinline__ uint32_t piece(int row, int column) {  // column: in pieces of 8
  return row * (kSlice * 2) + ((column ^ (row >> 1 & 3)) << 4);
}

__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ Product p, int tiles_m) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float bias[kTile];  // the loop's first barrier makes it visible
  const uint32_t ring = smem_address(shared);
  const int tile_m = blockIdx.x % tiles_m, tile_n = blockIdx.x / tiles_m;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int warp_m = warp / 2, warp_n = warp % 2;

  // This thread copies pieces of rows `row` and `row` + 64 of both operands.
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const bf16* from_a[2];
  const bf16* from_w[2];
  bool has_a[2], has_w[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = tile_m * kTile + row + 64 * h;
    has_a[h] = r < p.m;
    from_a[h] = static_cast<const bf16*>(p.a) + static_cast<int64_t>(min(r, p.m - 1)) * p.lda;
    const Columns c = columns_of(p, 2 * tile_n + h);
    const int n = (row < 32 ? c.first : c.second) + row % 32;
    has_w[h] = n < p.n;
    from_w[h] = static_cast<const bf16*>(p.w) + static_cast<int64_t>(min(n, p.n - 1)) * p.ldw;
  }
  const auto load = [&](int stage, int slice) {
    const int k = slice * kSlice + column * 8;
    const int bytes = min(max(p.k - k, 0), 8) * 2, at = bytes ? k : 0;
    const uint32_t to = ring + stage * 2 * kBytes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      cp_async16_or_zero(to + piece(row + 64 * h, column), from_a[h] + at, has_a[h] ? bytes : 0);
      cp_async16_or_zero(to + kBytes + piece(row + 64 * h, column), from_w[h] + at, has_w[h] ? bytes : 0);
    }
  };

  pdl_trigger();
  pdl_wait();
  const int slices = ceil_div(p.k, kSlice);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < slices) load(s, s);
    cp_async_commit();
  }
  if (p.has_bias && threadIdx.x < kTile) bias[threadIdx.x] = bias_in_tile(p, 2 * tile_n, threadIdx.x);
  float c[2][8][4] = {};
  for (int i = 0; i < slices; ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (i + kStages - 1 < slices) load((i + kStages - 1) % kStages, i + kStages - 1);
    cp_async_commit();
    const uint32_t a_at = ring + i % kStages * 2 * kBytes, w_at = a_at + kBytes;
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
        ldmatrix_x4(a[mi], a_at + piece(warp_m * 32 + mi * 16 + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int ni = 0; ni < 4; ++ni) {
        uint32_t b[4];
        ldmatrix_x4(
            b, w_at + piece(warp_n * 64 + ni * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          mma_16816(c[mi][2 * ni], a[mi], b[0], b[1]);
          mma_16816(c[mi][2 * ni + 1], a[mi], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring becomes what is stored from
  const int unit = 2 * tile_n + warp_n;
  if (64 * unit >= p.n) return;
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
    const int row0 = tile_m * kTile + warp_m * 32 + mi * 16;
    finish(p, row0, unit, &c[mi][0][0], &c[mi][4][0], {p.has_bias ? bias + 64 * warp_n : nullptr},
           look_ahead(p, row0, unit), ring + warp * kStaging);
  }
}

}  // namespace

cudaError_t product_sm80(const Product& p, const Launch& at) {
  const int tiles_m = ceil_div(p.m, kTile), tiles_n = ceil_div(p.n, kTile);
  return launch_kernel(product_kernel, dim3(tiles_m * tiles_n), dim3(kThreads), kStages * 2 * kBytes, at, 1,
                       p, tiles_m);
}

}  // namespace vla::cuda
