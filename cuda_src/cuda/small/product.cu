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

// v, 8 columns of row `row` from `col` on, to what goes into shared memory: normalised but for the RMS. Adds
// to the sum of squares. scale and shift are the norm's weight + plus and bias for these columns.
template <int MT>
__device__ __forceinline__ void normalise(float (&v)[8], const Args& a, int row, const float (&scale)[8],
                                          const float (&shift)[8], const float* stats, float& squares) {
  if (a.norm == NormKind::kRms) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      squares += v[j] * v[j];
      v[j] = row == a.m ? shift[j] : v[j] * scale[j];
    }
  } else if (a.norm == NormKind::kLayer && row < a.m) {
    const float mean = stats[row], rstd = stats[8 * MT + row];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = (v[j] - mean) * rstd * scale[j] + shift[j];
  }
}

// Puts columns [16 * tile0, 16 * (tile0 + tiles)) of x, normalised but for the RMS, into shared memory as
// bfloat16. Warp w has rows w, w + 8, ...; squares[i] is its lanes' part of row w + 8 i's sum of squares.
template <int MT>
__device__ __forceinline__ void stage_x(const Args& a, std::byte* x_smem, int stride, int tile0, int tiles,
                                        const float* stats, float (&squares)[MT], int warp, int lane) {
  constexpr int kAtOnce = 2;  // chunks of 8 columns a lane reads before it uses any: latency counts here
  const int first = 16 * tile0;
  const auto* x = static_cast<const bf16*>(a.x) + first;
  for (int chunk0 = 0; chunk0 < 2 * tiles; chunk0 += 32 * kAtOnce) {
    uint4 raw[kAtOnce][MT];
    float scale[kAtOnce][8], shift[kAtOnce][8];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int chunk = chunk0 + 32 * b + lane, col = first + 8 * chunk;
      const bool in = chunk < 2 * tiles && col < a.k;
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        const int row = warp + kWarps * i;
        raw[b][i] = make_uint4(0, 0, 0, 0);
        if (in && row < a.m) raw[b][i] = *reinterpret_cast<const uint4*>(x + row * a.ldx + 8 * chunk);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) scale[b][j] = a.norm_weight != nullptr ? 0.0f : 1.0f, shift[b][j] = 0.0f;
      if (in && a.norm_weight != nullptr) {
        if (a.norm_vector) {
          *reinterpret_cast<float4*>(&scale[b][0]) = *reinterpret_cast<const float4*>(a.norm_weight + col);
          *reinterpret_cast<float4*>(&scale[b][4]) =
              *reinterpret_cast<const float4*>(a.norm_weight + col + 4);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) scale[b][j] = a.norm_weight[col + j];
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) scale[b][j] += a.plus;
      }
      // only layer norm's rows and the row after the last of RMS norm need the bias
      if (in && a.norm_bias != nullptr && (a.norm == NormKind::kLayer || warp == a.m % kWarps)) {
#pragma unroll
        for (int j = 0; j < 8; ++j) shift[b][j] = a.norm_bias[col + j];
      }
    }
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int chunk = chunk0 + 32 * b + lane;
      if (chunk >= 2 * tiles) break;
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        const int row = warp + kWarps * i;
        const uint32_t word[4] = {raw[b][i].x, raw[b][i].y, raw[b][i].z, raw[b][i].w};
        float v[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 f = unpack2(word[j]);
          v[2 * j] = f.x, v[2 * j + 1] = f.y;
        }
        normalise<MT>(v, a, row, scale[b], shift[b], stats, squares[i]);
        *reinterpret_cast<uint4*>(x_smem + row * stride + 16 * chunk) = pack8(v);
      }
    }
  }
}

// The same for one row of float32, or of a width that cannot be read 16 bytes at a time. Gives the lane's
// part of the sum of squares.
__device__ __noinline__ float stage_any_row(const Args& a, std::byte* row_smem, int row, int tile0, int tiles,
                                            float mean, float rstd, int lane) {
  float squares = 0.0f;
  for (int i = lane; i < 16 * tiles; i += 32) {
    const int col = 16 * tile0 + i;
    float v = 0.0f;
    if (col < a.k) {
      const float x = row < a.m ? load_as_float(a.x, row * a.ldx + col, a.x_f32) : 0.0f;
      const float scale = a.norm_weight == nullptr ? 1.0f : a.norm_weight[col] + a.plus;
      const float shift = a.norm_bias == nullptr ? 0.0f : a.norm_bias[col];
      squares += x * x;
      v = a.norm == NormKind::kNone  ? x
          : a.norm == NormKind::kRms ? (row == a.m ? shift : x * scale)
                                     : (x - mean) * rstd * scale + shift;
    }
    reinterpret_cast<bf16*>(row_smem)[i] = __float2bfloat16(v);
  }
  return squares;
}

// x as it is: no way through registers.
template <int MT>
__device__ __forceinline__ void copy_x(const Args& a, std::byte* x_smem, int stride, int tile0, int tiles,
                                       int warp, int lane) {
  const auto* x = static_cast<const bf16*>(a.x) + 16 * tile0;
  for (int chunk = lane; chunk < 2 * tiles; chunk += 32) {
    const bool in = 16 * tile0 + 8 * chunk < a.k;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int row = warp + kWarps * i;
      const bool there = in && row < a.m;
      cp_async16_or_zero(smem_address(x_smem + row * stride + 16 * chunk),
                         there ? x + row * a.ldx + 8 * chunk : a.x, there ? 16 : 0);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

template <int MT, int WN>
__global__ void __launch_bounds__(kThreads, MT <= 7 ? 2 : 1) product(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) std::byte smem[];
  const Shape s = shape_of(MT, a.own, WN, a.split, a.tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = block_rank(), column = cluster_index();
  constexpr int wk = kWarps / WN;
  const int along_n = warp % WN, along_k = warp / WN;
  const int block = block_of<WN>(a, column, along_n);
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
  const Place place = place_of<WN>(a, a.mode, column);
  pdl_trigger();
  pdl_wait();
  const Ahead ahead = look_ahead(a, a.mode, place, rank);

  float* stats = reinterpret_cast<float*>(smem + s.squares) + a.split * s.own;
  if (a.norm == NormKind::kLayer) {
    layer_statistics<MT>(a, stats, warp, lane);
    __syncthreads();
  }
  float squares[MT] = {};
  if (!a.x_whole) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int row = warp + kWarps * i;
      squares[i] =
          stage_any_row(a, smem + row * s.x_stride, row, tile0, tiles, stats[row], stats[s.rows + row], lane);
    }
  } else if (a.norm == NormKind::kNone) {
    copy_x<MT>(a, smem, s.x_stride, tile0, tiles, warp, lane);
  } else {
    stage_x<MT>(a, smem, s.x_stride, tile0, tiles, stats, squares, warp, lane);
  }
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
  send<MT, WN>(a, s, smem, squares, rank, warp, lane);
  if (a.split > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  finish<WN>(a, s, smem, rank, place, ahead);
}

template <int MT>
cudaError_t run_rows(const Args& a, const Launch& at) {
  const int bytes = shape_of(MT, a.own, a.wn, a.split, a.tiles).bytes;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.blocks, a.wn) * a.split));
  switch (a.wn) {
    case 1:
      return launch_kernel(product<MT, 1>, grid, kThreads, bytes, at, a.split, a);
    case 2:
      return launch_kernel(product<MT, 2>, grid, kThreads, bytes, at, a.split, a);
    case 4:
      return launch_kernel(product<MT, 4>, grid, kThreads, bytes, at, a.split, a);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t run_product(const Args& a, const Launch& at) {
  switch (row_tiles(a)) {
    case 2:
      return run_rows<2>(a, at);
    case 4:
      return run_rows<4>(a, at);
    case 7:
      return run_rows<7>(a, at);
    default:
      return run_rows<9>(a, at);
  }
}

}  // namespace vla::cuda::small
