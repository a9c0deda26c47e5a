// What is done row by row; see rows.cu.
#pragma once

#include "e4m3.cuh"

namespace vla::cuda {

// True when rows of `v` start on multiples of 16 bytes.
bool aligned16(const View& v, int step);
// out (rows, padded) bf16 = norm(x), or x itself without one; columns from x.cols on become zero.
cudaError_t normalise_rows(const View& x, const Norm& norm, bf16* out, int64_t ldo, int padded,
                           const Launch& at);
// The same as E4M3: the nearest to norm(x) * inverse, zeros from x.cols to ldo.
cudaError_t normalise_rows_e4m3(const View& x, const Norm& norm, e4m3* out, int64_t ldo, float inverse,
                                const Launch& at);
// Rotary embedding of the heads of x, in place.
cudaError_t rotate_heads(const View& x, int head_dim, const View& rope, const View& positions,
                         const Launch& at);

}  // namespace vla::cuda
