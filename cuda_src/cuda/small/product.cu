// Products of few rows (m <= 64), the denoising loop's work: bound by reading W once.
//
// y (m, n) = norm(x) W^T, then what the operation does with it (epilogue.cuh). x (m, k), W (n, k) as
// fragments (pack.cu). A thread block of 8 warps computes 32 * wn columns over one part of k; a cluster of
// `split` blocks covers k. Each warp streams its own tiles of W (32 rows by 16 columns, 1 KB) through a
// private ring in shared memory, filled before pdl_wait() so that reading W goes on across kernels; x is
// staged once a block. W is the left operand of the matrix unit (16 rows), x the right one (8 rows): m is
// padded to 8, not to 64. Sums go warp by warp, then block by block in rank order through distributed shared
// memory: always the same order.
//
// RMS norm: y_i = rstd_i * (x_i * (weight + plus)) W^T + norm_bias W^T: no block needs the statistics of a
// row before the end, where the blocks of the cluster have all of its sum of squares. The norm's bias is one
// more row of x.
#include "epilogue.cuh"

namespace vla::cuda::small {

namespace {

__device__ __forceinline__ void load8(float (&v)[8], const Args& a, int row, int col) {
  const int64_t at = row * a.ldx + col;
  if (a.x_vector && col + 8 <= a.k) {
    if (a.x_f32) {
      const float4 lo = *reinterpret_cast<const float4*>(static_cast<const float*>(a.x) + at);
      const float4 hi = *reinterpret_cast<const float4*>(static_cast<const float*>(a.x) + at + 4);
      v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w, v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
    } else {
      const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(a.x) + at);
      const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 f = unpack2(word[j]);
        v[2 * j] = f.x, v[2 * j + 1] = f.y;
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = col + j < a.k ? load_as_float(a.x, at + j, a.x_f32) : 0.0f;
}

__device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
  return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}

// Mean and 1 / sqrt(var + eps) of the whole rows, two passes: stats[row], stats[rows + row].
template <int MT>
__device__ void layer_statistics(const Args& a, float* stats, int warp, int lane) {
  for (int row = warp; row < a.m; row += kWarps) {
    float sum = 0.0f, squares = 0.0f;
    for (int c = lane; c < a.k; c += 32) sum += load_as_float(a.x, row * a.ldx + c, a.x_f32);
    const float mean = warp_sum(sum) / static_cast<float>(a.k);
    for (int c = lane; c < a.k; c += 32) {
      const float d = load_as_float(a.x, row * a.ldx + c, a.x_f32) - mean;
      squares += d * d;
    }
    squares = warp_sum(squares);
    if (lane == 0) {
      stats[row] = mean;
      stats[8 * MT + row] = rsqrtf(squares / static_cast<float>(a.k) + a.eps);
    }
  }
}

// Puts columns [16 * tile0, 16 * (tile0 + tiles)) of the normalised x (but for the RMS) into shared memory as
// bfloat16. Warp w has rows w, w + 8, ...; squares[i] is its lanes' part of row w + 8 i's sum of squares.
template <int MT>
__device__ __forceinline__ void stage_x(const Args& a, std::byte* x_smem, int stride, int tile0, int tiles,
                                        const float* stats, float (&squares)[MT], int warp, int lane) {
  const bool has_bias = a.norm_bias != nullptr;
  for (int chunk = lane; chunk < 2 * tiles; chunk += 32) {
    const int col = 16 * tile0 + 8 * chunk;
    float v[MT][8], scale[8];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int row = warp + kWarps * i;
      if (row < a.m) {
        load8(v[i], a, row, col);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] = 0.0f;
      }
    }
    if (a.norm != NormKind::kNone) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        scale[j] = a.norm_weight == nullptr ? 1.0f : col + j < a.k ? a.norm_weight[col + j] + a.plus : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        const int row = warp + kWarps * i;
        if (a.norm == NormKind::kRms) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            squares[i] += v[i][j] * v[i][j];
            v[i][j] *= scale[j];
          }
          if (has_bias && row == a.m) {
#pragma unroll
            for (int j = 0; j < 8; ++j) v[i][j] = col + j < a.k ? a.norm_bias[col + j] : 0.0f;
          }
        } else if (row < a.m) {
          const float mean = stats[row], rstd = stats[8 * MT + row];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float bias = has_bias && col + j < a.k ? a.norm_bias[col + j] : 0.0f;
            v[i][j] = col + j < a.k ? (v[i][j] - mean) * rstd * scale[j] + bias : 0.0f;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int row = warp + kWarps * i;
      *reinterpret_cast<uint4*>(x_smem + row * stride + 16 * chunk) = pack8(v[i]);
    }
  }
}

template <int MT>
__global__ void __launch_bounds__(kThreads, MT <= 7 ? 2 : 1) product(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) std::byte smem[];
  const Shape s = shape_of(MT, a.m, a.wn, a.split, a.tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % a.split, column = static_cast<int>(blockIdx.x) / a.split;
  const int wk = kWarps / a.wn, along_n = warp % a.wn, along_k = warp / a.wn;
  const int block = block_of(a, column, along_n);
  const int tile0 = rank * a.tiles;
  const int tiles = max(0, min(a.tiles, a.k_tiles - tile0));
  const int mine = block < a.blocks ? max(0, ceil_div(tiles - along_k, wk)) : 0;  // tiles of this warp

  // Fill the ring: lane l of a warp only ever reads what lane l has copied.
  const uint4* source = a.w + (static_cast<int64_t>(block) * a.k_tiles + tile0 + along_k) * 64 + lane;
  std::byte* ring = smem + s.ring + warp * kDepth * 1024 + lane * 16;
  const uint32_t ring_address = smem_address(ring);
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    if (d < mine) {
      cp_async16(ring_address + d * 1024, source + d * wk * 64);
      cp_async16(ring_address + d * 1024 + 512, source + d * wk * 64 + 32);
    }
    cp_async_commit();
  }
  pdl_trigger();
  pdl_wait();

  float* stats = reinterpret_cast<float*>(smem + s.squares) + a.split * s.own;
  if (a.norm == NormKind::kLayer) {
    layer_statistics<MT>(a, stats, warp, lane);
    __syncthreads();
  }
  float squares[MT] = {};
  stage_x<MT>(a, smem, s.x_stride, tile0, tiles, stats, squares, warp, lane);
  __syncthreads();

  float acc[2][MT][4] = {};
  const uint32_t x_address =
      smem_address(smem) + (lane / 16 * 8 + lane % 8) * s.x_stride + (lane / 8 % 2) * 16;
  int slot = 0;
  for (int t = 0; t < mine; ++t) {
    cp_async_wait<kDepth - 1>();
    uint32_t w[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 raw = *reinterpret_cast<const uint4*>(ring + slot * 1024 + h * 512);
      w[h][0] = raw.x, w[h][1] = raw.y, w[h][2] = raw.z, w[h][3] = raw.w;
    }
    const uint32_t x_tile = x_address + (along_k + t * wk) * 32;
#pragma unroll
    for (int i = 0; i < MT; i += 2) {
      uint32_t x[4];
      // an odd MT reads its last 8 rows twice rather than past the end
      ldmatrix_x4(x, x_tile + (i + 1 < MT || lane < 16 ? i : i - 1) * 8 * s.x_stride);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma_16816(acc[h][i], w[h], x[0], x[1]);
        if (i + 1 < MT) mma_16816(acc[h][i + 1], w[h], x[2], x[3]);
      }
    }
    if (t + kDepth < mine) {
      cp_async16(ring_address + slot * 1024, source + (t + kDepth) * wk * 64);
      cp_async16(ring_address + slot * 1024 + 512, source + (t + kDepth) * wk * 64 + 32);
    }
    cp_async_commit();
    slot = slot + 1 == kDepth ? 0 : slot + 1;
  }

  // From here x and the ring are not needed. The others may send once all blocks of the cluster have come
  // this far.
  __syncthreads();
  if (a.split > 1) cluster_arrive();
  float* partial = reinterpret_cast<float*>(smem + s.partial) + warp * s.rows * kPitch;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      float* at = partial + (8 * i + 2 * (lane % 4)) * kPitch + 16 * h + lane / 4;
      at[0] = acc[h][i][0], at[kPitch] = acc[h][i][1];
      at[8] = acc[h][i][2], at[kPitch + 8] = acc[h][i][3];
    }
  }
  __syncthreads();
  if (a.split > 1) cluster_wait();
  send<MT>(a, s, smem, squares, rank, warp, lane);
  if (a.split > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  finish(a, s, smem, rank, column);
}

}  // namespace

cudaError_t run_product(const Args& a, const Launch& at) {
  const int mt = row_tiles(a);
  const int bytes = shape_of(mt, a.m, a.wn, a.split, a.tiles).bytes;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.blocks, a.wn) * a.split));
  switch (mt) {
    case 2:
      return launch_kernel(product<2>, grid, kThreads, bytes, at, a.split, a);
    case 4:
      return launch_kernel(product<4>, grid, kThreads, bytes, at, a.split, a);
    case 7:
      return launch_kernel(product<7>, grid, kThreads, bytes, at, a.split, a);
    case 9:
      return launch_kernel(product<9>, grid, kThreads, bytes, at, a.split, a);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace vla::cuda::small
