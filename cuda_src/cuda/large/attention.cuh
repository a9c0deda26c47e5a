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

cudaError_t attention_sm80(const Queries& p, const Launch& at);
cudaError_t attention_sm90(const Queries& p, const Launch& at);  // head_dim of 64 to 256, wide
// The same for what fits: head_dim of 129 to 256, at most 576 keys, heads and rows for one round of blocks.
bool fits_attention_pairs(const Queries& p, int sms);
cudaError_t attention_pairs_sm90(const Queries& p, const Launch& at);

}  // namespace vla::cuda
