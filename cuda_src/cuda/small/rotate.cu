// Rotary embedding on its own, for head sizes whose halves the small product does not have in one place.
//
// x (m, heads * d), in place: [h1 | h2] -> [h1 cos - h2 sin | h2 cos + h1 sin], cos and sin from row
// positions[i] of rope (positions, d) = [cos | sin].
#include "product.cuh"

namespace vla::cuda::small {

namespace {

__global__ void __launch_bounds__(256)
    rotate(bf16* x, int64_t ld, int cols, int d, const float* rope, int64_t ld_rope, int rope_rows,
           const int* positions, int64_t ld_positions) {
  pdl_trigger();
  pdl_wait();
  const int row = static_cast<int>(blockIdx.x), half = d / 2;
  const float* table = rope + table_row(positions[row * ld_positions], rope_rows) * ld_rope;
  for (int i = threadIdx.x; i < cols / 2; i += 256) {
    bf16* at = x + row * ld + i / half * d + i % half;
    const float h1 = __bfloat162float(at[0]), h2 = __bfloat162float(at[half]);
    const float cos = table[i % half], sin = table[half + i % half];
    at[0] = __float2bfloat16(h1 * cos - h2 * sin);
    at[half] = __float2bfloat16(h2 * cos + h1 * sin);
  }
}

}  // namespace

cudaError_t run_rotate(const View& x, const Qkv& op, const Launch& at) {
  Launch here = at;
  here.pdl = true;
  return launch_kernel(rotate, x.rows, 256, 0, here, 1, x.at<bf16>(at.step), x.ld, x.cols, op.head_dim,
                       op.rope.at<const float>(at.step), op.rope.ld, op.rope.rows,
                       op.positions.at<const int>(at.step), op.positions.ld);
}

}  // namespace vla::cuda::small
