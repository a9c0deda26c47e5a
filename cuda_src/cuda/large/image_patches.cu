// Pixels to patches.
#include "e4m3.cuh"

namespace vla::cuda {
namespace {

struct Pictures {
  const uint8_t* frames = nullptr;
  int64_t frame_ld = 0, frame_bytes = 0;
  const int* geometry = nullptr;
  int64_t geometry_ld = 0;
  void* out = nullptr;
  int64_t ldo = 0;
  bool out_f32 = false;
  int height = 0, width = 0, patch = 0;
  float inverse = 1.0f;  // of the scale of an E4M3 out
};

// Bilinear interpolation between pixel centres, as image libraries define it: where output pixel i of `to`
// lies among `from` input pixels.
struct Between {
  int low, high;
  float weight;  // of high
};
__device__ __forceinline__ Between between(int i, int from, int to) {
  const float at = fmaxf((i + 0.5f) * (static_cast<float>(from) / static_cast<float>(to)) - 0.5f, 0.0f);
  const int low = min(static_cast<int>(at), from - 1);
  return {low, min(low + 1, from - 1), at - static_cast<float>(low)};
}

// out (cameras * patches, 3 patch^2), columns (c, y, x) = resized pixel / 127.5 - 1, and -1 where there is
// none. A thread for each pixel of the padded picture; geometry: h, w, stride, resized h, resized w, top,
// left, present.
template <bool E4M3>
__global__ void __launch_bounds__(128) patches_kernel(const Pictures p) {
  pdl_trigger();
  pdl_wait();
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y, camera = blockIdx.z;
  if (x >= p.width) return;
  const int* g = p.geometry + camera * p.geometry_ld;
  const int h = g[0], w = g[1], new_h = g[3], new_w = g[4], top = g[5], left = g[6];
  const int64_t stride = g[2];
  float v[3] = {-1.0f, -1.0f, -1.0f};
  const bool fits =
      h > 0 && w > 0 && stride >= 3 * static_cast<int64_t>(w) && (h - 1) * stride + 3 * w <= p.frame_bytes;
  if (g[7] != 0 && fits && y >= top && y < top + new_h && x >= left && x < left + new_w) {
    const Between row = between(y - top, h, new_h), col = between(x - left, w, new_w);
    const uint8_t* frame = p.frames + camera * p.frame_ld;
    const uint8_t *above = frame + row.low * stride, *below = frame + row.high * stride;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const float a = above[3 * col.low + c], b = above[3 * col.high + c];
      const float d = below[3 * col.low + c], e = below[3 * col.high + c];
      const float upper = a + (b - a) * col.weight, lower = d + (e - d) * col.weight;
      v[c] = (upper + (lower - upper) * row.weight) / 127.5f - 1.0f;
    }
  }
  const int s = p.patch, across = p.width / s;
  const int64_t patch = (static_cast<int64_t>(camera) * (p.height / s) + y / s) * across + x / s;
  const int64_t at = patch * p.ldo + y % s * s + x % s;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    if constexpr (E4M3) {
      static_cast<e4m3*>(p.out)[at + c * s * s] = to_e4m3(v[c] * p.inverse);
    } else {
      store_from_float(p.out, at + c * s * s, v[c], p.out_f32);
    }
  }
}

}  // namespace

cudaError_t launch(const ImagePatches& op, const Launch& at) {
  Pictures p;
  p.frames = op.frames.at<const uint8_t>(at.step);
  p.frame_ld = op.frames.ld;
  p.frame_bytes = op.frames.cols;
  p.geometry = op.geometry.at<const int>(at.step);
  p.geometry_ld = op.geometry.ld;
  p.out = op.out.at<void>(at.step);
  p.ldo = op.out.ld;
  p.out_f32 = op.out.dtype == DType::kF32;
  p.height = op.height;
  p.width = op.width;
  p.patch = op.patch;
  const bool e4m3_out = op.out.dtype == DType::kE4M3;
  if (e4m3_out) p.inverse = 1.0f / op.out_scale;
  return launch_kernel(e4m3_out ? patches_kernel<true> : patches_kernel<false>,
                       dim3(ceil_div(op.width, 128), op.height, op.frames.rows), dim3(128), 0, at, 1, p);
}

}  // namespace vla::cuda
