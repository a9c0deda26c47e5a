// Attention of many queries: the operation, and the kernel for devices from sm_80 up.
//
// out (batch m, heads d) = softmax(q k^T / sqrt(d) + mask) v by head. A block takes 64 queries of one head:
// four warps of 16 queries (mma.sync), GROUPS times, each group of warps with its own share of the keys; the
// groups' results are put together at the end. Keys and values pass through shared memory in slices of KEYS
// for each group, one slice ahead. Sums and softmax are float32, with a running maximum (Milakov, Gimelshein
// 2018; Dao et al. 2022).
#include <cmath>

#include "attention.cuh"
#include "rows.cuh"

namespace vla::cuda {
namespace {

// `rows` rows of D columns (d of them real) to shared memory with a row's stride of D + 8; zeros elsewhere.
template <int D, int THREADS>
__device__ __forceinline__ void fetch(uint32_t to, uint8_t* to_pointer, const bf16* from, int64_t ld,
                                      int rows, int valid, int d, bool wide) {
  constexpr int kPieces = D / 8;
  for (int i = threadIdx.x; i < rows * kPieces; i += THREADS) {
    const int row = i / kPieces, c = i % kPieces * 8;
    const uint32_t offset = (row * (D + 8) + c) * 2;
    const bool inside = row < valid;
    if (wide) {
      const int bytes = inside ? min(max(d - c, 0), 8) * 2 : 0;
      cp_async16_or_zero(to + offset, bytes ? from + row * ld + c : from, bytes);
    } else {
      bf16* at = reinterpret_cast<bf16*>(to_pointer + offset);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        at[e] = inside && c + e < d ? from[row * ld + c + e] : __float2bfloat16(0.0f);
    }
  }
}

template <int D, int GROUPS, int KEYS>
struct Sizes {
  static constexpr int kKeys = KEYS;
  static constexpr int kStride = (D + 8) * 2;
  static constexpr int kBytesQ = kQueries * kStride;
  static constexpr int kBytesKeys = GROUPS * kKeys * kStride;  // keys, or values, of all groups' slices
  static constexpr int kStage = 2 * kBytesKeys;
  static constexpr int kMerge = GROUPS > 1 ? kQueries * (D + 2) * 4 : 0;
  static constexpr int kRing = kBytesQ + 2 * kStage;
  static constexpr int kShared = (kRing > kMerge ? kRing : kMerge) + 2 * GROUPS * kKeys * 4;
  static constexpr int kThreads = 128 * GROUPS;
};

template <int D, int GROUPS, int KEYS, bool E4M3>
__global__ void __launch_bounds__(128 * GROUPS) attention_kernel(const __grid_constant__ Queries p) {
  using S = Sizes<D, GROUPS, KEYS>;
  constexpr int kKeys = S::kKeys, kThreads = S::kThreads, kOut = D / 8;
  extern __shared__ __align__(128) uint8_t shared[];
  int* const k_blocks = reinterpret_cast<int*>(shared + S::kShared - 2 * GROUPS * kKeys * 4);
  const uint32_t base = smem_address(shared);
  const int head = blockIdx.y, batch = blockIdx.z, q0 = blockIdx.x * kQueries, d = p.head_dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, group = warp / 4;
  const bf16* const q = p.q + (static_cast<int64_t>(batch) * p.m + q0) * p.ldq + head * d;
  const bf16* const k = p.k + static_cast<int64_t>(batch) * p.n * p.ldk + head / p.group * d;
  const bf16* const v = p.v + static_cast<int64_t>(batch) * p.n * p.ldv + head / p.group * d;

  pdl_trigger();
  pdl_wait();
  const auto fetch_keys = [&](int stage, int slice) {
    const int key = slice * GROUPS * kKeys;
    const int at = S::kBytesQ + stage * S::kStage;
    fetch<D, kThreads>(base + at, shared + at, k + key * p.ldk, p.ldk, GROUPS * kKeys, p.n - key, d, p.wide);
    const int at_v = at + S::kBytesKeys;
    fetch<D, kThreads>(base + at_v, shared + at_v, v + key * p.ldv, p.ldv, GROUPS * kKeys, p.n - key, d,
                       p.wide);
    if (p.k_block) {
      for (int i = threadIdx.x; i < GROUPS * kKeys; i += kThreads) {
        k_blocks[stage * GROUPS * kKeys + i] =
            key + i < p.n ? p.k_block[(key + i) * p.ld_k_block] : 0x7fffffff;
      }
    }
  };
  fetch<D, kThreads>(base, shared, q, p.ldq, kQueries, p.m - q0, d, p.wide);
  fetch_keys(0, 0);
  cp_async_commit();

  // This thread's rows are r and r + 8.
  const int r = warp % 4 * 16 + lane / 4;
  int seen_up_to[2] = {0, 0};
  if (p.q_block) {
#pragma unroll
    for (int h = 0; h < 2; ++h) seen_up_to[h] = p.q_block[min(q0 + r + 8 * h, p.m - 1) * p.ld_q_block];
  }
  float out[kOut][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  const int slices = ceil_div(p.n, GROUPS * kKeys);
  for (int i = 0; i < slices; ++i) {
    if (i + 1 < slices) fetch_keys((i + 1) & 1, i + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const uint32_t k_at = base + S::kBytesQ + (i & 1) * S::kStage + group * kKeys * S::kStride;
    const uint32_t v_at = k_at + S::kBytesKeys;
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[4];
      ldmatrix_x4(a, base + (warp % 4 * 16 + lane % 16) * S::kStride + (2 * kk + lane / 16) * 16);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        ldmatrix_x4(
            b, k_at + (j * 16 + (lane & 7) + (lane >> 4) * 8) * S::kStride + (2 * kk + (lane >> 3 & 1)) * 16);
        mma_16816(s[2 * j], a, b[0], b[1]);
        mma_16816(s[2 * j + 1], a, b[2], b[3]);
      }
    }
    // Mask, then the row's maximum over the four lanes that share it.
    const int key0 = (i * GROUPS + group) * kKeys;
    const int* blocks = k_blocks + ((i & 1) * GROUPS + group) * kKeys;
    if (p.k_block || key0 + kKeys > p.n) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = j * 8 + 2 * (lane & 3) + e;
          const int block = p.k_block ? blocks[key] : 0;
          const bool inside = key0 + key < p.n;
#pragma unroll
          for (int h = 0; h < 2; ++h)
            s[j][2 * h + e] = inside && block <= seen_up_to[h] ? s[j][2 * h + e] : -INFINITY;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = top[h];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) high = fmaxf(high, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      const float shift =
          high == -INFINITY ? 0.0f : high * p.scale;  // nothing seen yet: all weights become 0
      const float shrink = exp2_fast(top[h] * p.scale - shift);
      top[h] = high;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[j][2 * h + e] = exp2_fast(s[j][2 * h + e] * p.scale - shift);
          sum += s[j][2 * h + e];
        }
      }
      total[h] = total[h] * shrink + sum;
#pragma unroll
      for (int j = 0; j < kOut; ++j) {
        out[j][2 * h] *= shrink;
        out[j][2 * h + 1] *= shrink;
      }
    }
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      const uint32_t a[4] = {pack2(s[2 * kk][0], s[2 * kk][1]), pack2(s[2 * kk][2], s[2 * kk][3]),
                             pack2(s[2 * kk + 1][0], s[2 * kk + 1][1]),
                             pack2(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t b[4];
        ldmatrix_x4_t(b, v_at + (kk * 16 + lane % 16) * S::kStride + (2 * j + lane / 16) * 16);
        mma_16816(out[2 * j], a, b[0], b[1]);
        mma_16816(out[2 * j + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
    total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
    top[h] = top[h] == -INFINITY ? top[h] : top[h] * p.scale;
  }
  if constexpr (GROUPS > 1) {
    cp_async_wait<0>();
    // The second group leaves its results in shared memory: sums, then maxima and totals.
    float* const sums = reinterpret_cast<float*>(shared);
    float* const tops = sums + kQueries * D;
    __syncthreads();
    if (group == 1) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int j = 0; j < kOut; ++j) {
          *reinterpret_cast<float2*>(sums + (r + 8 * h) * D + j * 8 + 2 * (lane & 3)) =
              make_float2(out[j][2 * h], out[j][2 * h + 1]);
        }
        if ((lane & 3) == 0) {
          tops[2 * (r + 8 * h)] = top[h];
          tops[2 * (r + 8 * h) + 1] = total[h];
        }
      }
    }
    __syncthreads();
    if (group == 1) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float other = tops[2 * (r + 8 * h)], other_total = tops[2 * (r + 8 * h) + 1];
      const float high = fmaxf(top[h], other), shift = high == -INFINITY ? 0.0f : high;
      const float mine = exp2_fast(top[h] - shift), theirs = exp2_fast(other - shift);
      total[h] = total[h] * mine + other_total * theirs;
#pragma unroll
      for (int j = 0; j < kOut; ++j) {
        const float2 o = *reinterpret_cast<const float2*>(sums + (r + 8 * h) * D + j * 8 + 2 * (lane & 3));
        out[j][2 * h] = out[j][2 * h] * mine + o.x * theirs;
        out[j][2 * h + 1] = out[j][2 * h + 1] * mine + o.y * theirs;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = q0 + r + 8 * h;
    if (row >= p.m) continue;
    const float share = total[h] > 0.0f ? 1.0f / total[h] : 0.0f;
    const int64_t at = (static_cast<int64_t>(batch) * p.m + row) * p.ldo + head * d;
    if constexpr (E4M3) {
      e4m3* const to = static_cast<e4m3*>(p.out) + at;
#pragma unroll
      for (int j = 0; j < kOut; ++j) {
        const int c = j * 8 + 2 * (lane & 3);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (c + e < d) to[c + e] = to_e4m3(out[j][2 * h + e] * share * p.out_inverse);
        }
      }
      continue;
    }
    bf16* const to = static_cast<bf16*>(p.out) + at;
#pragma unroll
    for (int j = 0; j < kOut; ++j) {
      const int c = j * 8 + 2 * (lane & 3);
      if (c + 1 < d && d % 2 == 0 && p.wide) {
        *reinterpret_cast<uint32_t*>(to + c) = pack2(out[j][2 * h] * share, out[j][2 * h + 1] * share);
      } else {
        if (c < d) to[c] = __float2bfloat16(out[j][2 * h] * share);
        if (c + 1 < d) to[c + 1] = __float2bfloat16(out[j][2 * h + 1] * share);
      }
    }
  }
}

template <int D, int GROUPS, int KEYS>
cudaError_t run(const Queries& p, const Launch& at) {
  using S = Sizes<D, GROUPS, KEYS>;
  const auto kernel = p.out_inverse != 0.0f ? attention_kernel<D, GROUPS, KEYS, true>
                                            : attention_kernel<D, GROUPS, KEYS, false>;
  return launch_kernel(kernel, dim3(ceil_div(p.m, kQueries), p.heads, p.batch), dim3(S::kThreads), S::kShared,
                       at, 1, p);
}

}  // namespace

cudaError_t attention_sm80(const Queries& p, const Launch& at) {
  const int blocks = ceil_div(p.m, kQueries) * p.heads * p.batch;
  const bool few = blocks <= 2 * at.sms;  // then two groups of warps make a block's time shorter
  if (p.head_dim <= 64) return few ? run<64, 2, 32>(p, at) : run<64, 1, 64>(p, at);
  if (p.head_dim <= 80) return run<80, 2, 32>(p, at);
  if (p.head_dim <= 128) return run<128, 2, 32>(p, at);
  // Only Hopper and Blackwell's large chips have the shared memory for two groups' slices of 32 keys of 256.
  return at.arch >= 90 && at.arch < 120 ? run<256, 2, 32>(p, at) : run<256, 1, 16>(p, at);
}

cudaError_t launch_large(const Attention& op, const Launch& at) {
  Queries p;
  p.q = op.q.at<const bf16>(at.step);
  p.k = op.k.at<const bf16>(at.step);
  p.v = op.v.at<const bf16>(at.step);
  p.out = op.out.at<void>(at.step);
  if (op.out.dtype == DType::kE4M3) p.out_inverse = 1.0f / op.out_scale;
  p.ldq = op.q.ld;
  p.ldk = op.k.ld;
  p.ldv = op.v.ld;
  p.ldo = op.out.ld;
  p.head_dim = op.head_dim;
  p.batch = op.batch;
  p.m = op.q.rows / op.batch;
  p.n = op.k.rows / op.batch;
  p.heads = op.q.cols / op.head_dim;
  p.group = p.heads / (op.k.cols / op.head_dim);
  p.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(op.head_dim));
  if (op.q_block && op.k_block) {
    p.q_block = op.q_block.at<const int>(at.step);
    p.k_block = op.k_block.at<const int>(at.step);
    p.ld_q_block = op.q_block.ld;
    p.ld_k_block = op.k_block.ld;
  }
  p.wide = op.head_dim % 8 == 0;
  for (const View* v : {&op.q, &op.k, &op.v, &op.out}) p.wide = p.wide && aligned16(*v, at.step);
  return at.arch == 90 && p.wide && p.head_dim >= 64 ? attention_sm90(p, at) : attention_sm80(p, at);
}

}  // namespace vla::cuda
