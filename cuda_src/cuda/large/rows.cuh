// What is done row by row; see rows.cu.
#pragma once

#include "../common.cuh"

namespace vla::cuda {

// True when rows of `v` start on multiples of 16 bytes.
bool aligned16(const View& v, int step);
// out (rows, padded) bf16 = norm(x), or x itself without one; columns from x.cols on become zero.
cudaError_t normalise_rows(const View& x, const Norm& norm, bf16* out, int64_t ldo, int padded,
                           const Launch& at);
// Rotary embedding of the heads of x, in place.
cudaError_t rotate_heads(const View& x, int head_dim, const View& rope, const View& positions,
                         const Launch& at);

}  // namespace vla::cuda
