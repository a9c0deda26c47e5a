// Attention of many queries as its kernels see it.
#pragma once

#include "e4m3.cuh"

namespace vla::cuda {

struct Queries {
  const bf16 *q = nullptr, *k = nullptr, *v = nullptr;
  void* out = nullptr;  // bf16 or E4M3
  int64_t ldq = 0, ldk = 0, ldv = 0, ldo = 0;
  const int *q_block = nullptr, *k_block = nullptr;
  int64_t ld_q_block = 0, ld_k_block = 0;
  int m = 0, n = 0, head_dim = 0, heads = 0, batch = 1;
  int group = 1;             // query heads of a key head
  float scale = 0.0f;        // log2(e) / sqrt(d)
  bool wide = false;         // rows of q, k, v and out start on multiples of 16 bytes, and so do their heads
  float out_inverse = 0.0f;  // not 0: out is E4M3, what is computed times this
};

constexpr int kQueries = 64;  // of a group of four warps

// 2^x by the special function unit; 0 of -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A row of results of a warpgroup's 64 by D sums, of which a thread has rows h = 0 and 1: those over `total`.
template <int D, bool E4M3>
__device__ __forceinline__ void store_attention(const Queries& p, const float (&out)[D / 2], float total,
                                                int h, int batch, int head, int row) {
  const int q = threadIdx.x & 3;
  if constexpr (E4M3) {
    const float share = total > 0.0f ? p.out_inverse / total : 0.0f;
    e4m3* const to = static_cast<e4m3*>(p.out) + (static_cast<int64_t>(batch) * p.m + row) * p.ldo +
                     head * p.head_dim + q / 2 * 4;
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      const auto pair = [&](int block) {
        return pack_e4m3(out[4 * block + 2 * h] * share, out[4 * block + 2 * h + 1] * share);
      };
      const uint32_t four = join_e4m3(pair(i), pair(i + 1));
      const int block = i + (q & 1);
      if (row < p.m && 8 * block < p.head_dim) *reinterpret_cast<uint32_t*>(to + 8 * block) = four;
    }
  } else {
    if (row >= p.m) return;
    const float share = total > 0.0f ? 1.0f / total : 0.0f;
    bf16* const to = static_cast<bf16*>(p.out) + (static_cast<int64_t>(batch) * p.m + row) * p.ldo +
                     head * p.head_dim + 2 * q;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      if (8 * i < p.head_dim) {
        *reinterpret_cast<uint32_t*>(to + 8 * i) =
            pack2(out[4 * i + 2 * h] * share, out[4 * i + 2 * h + 1] * share);
      }
    }
  }
}

cudaError_t attention_sm80(const Queries& p, const Launch& at);
cudaError_t attention_sm90(const Queries& p, const Launch& at);  // head_dim of 64 to 256, wide
// The same of head_dim up to 64 and without a mask, for tiles enough to fill the device.
cudaError_t attention_tiles_sm90(const Queries& p, const Launch& at);
// The same for what fits: head_dim of 129 to 256, at most 576 keys, heads and rows for one round of blocks.
bool fits_attention_pairs(const Queries& p, int sms);
cudaError_t attention_pairs_sm90(const Queries& p, const Launch& at);

}  // namespace vla::cuda
