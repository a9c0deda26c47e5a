// What is done row by row: normalising (alone, before a product, or while moving squares to depth),
// embedding, and rotating heads in place where a product could not.
#include "rows.cuh"

#include <type_traits>

namespace vla::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kKept = 4;  // rows of up to 1024 (one warp each) or 4096 (four) are read once

struct Rows {
  const void* x = nullptr;
  int64_t ldx = 0;
  bool x_f32 = false, wide = false;
  bf16* out = nullptr;  // or E4M3
  int64_t ldo = 0;
  int rows = 0, cols = 0, padded = 0;  // columns [cols, padded) of out become zero
  NormKind kind = NormKind::kNone;
  float eps = 0.0f, plus = 0.0f;
  const float *weight = nullptr, *bias = nullptr;
  int factor = 1, height = 1, width = 1;  // space to depth: row (b, y, x) of a grid goes to the square's row
  float inverse = 1.0f;                   // of the scale of an E4M3 out
};

// Eight numbers of a row from column c; what lies beyond the row is zero.
template <bool WIDE>
__device__ __forceinline__ uint4 load_raw(const Rows& r, int64_t row, int c) {
  if constexpr (WIDE) return *reinterpret_cast<const uint4*>(static_cast<const bf16*>(r.x) + row * r.ldx + c);
  return {};
}
template <bool WIDE>
__device__ __forceinline__ void convert(const Rows& r, int64_t row, int c, const uint4& raw, float (&v)[8]) {
  if constexpr (WIDE) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = unpack2(words[i]);
      v[2 * i] = f.x;
      v[2 * i + 1] = f.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] = c + i < r.cols ? load_as_float(r.x, row * r.ldx + c + i, r.x_f32) : 0.0f;
  }
}

// Eight of a norm's weights or biases, or `none` where it has none.
template <bool WIDE>
__device__ __forceinline__ void load_factors(const float* from, int c, int cols, float none, float (&v)[8]) {
  if (!from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = none;
  } else if constexpr (WIDE) {
    *reinterpret_cast<float4*>(v) = __ldg(reinterpret_cast<const float4*>(from + c));
    *reinterpret_cast<float4*>(v + 4) = __ldg(reinterpret_cast<const float4*>(from + c + 4));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = from[min(c + i, cols - 1)];
  }
}

// Eight numbers of a row to out[c] on as E4M3, or those of them that lie inside the row.
template <bool WIDE>
__device__ __forceinline__ void store8(const Rows& r, e4m3* out, int c, const float (&v)[8]) {
  const float s = r.inverse;
  if constexpr (WIDE) {
    *reinterpret_cast<uint2*>(out + c) =
        make_uint2(pack_e4m3(v[0] * s, v[1] * s) | pack_e4m3(v[2] * s, v[3] * s) << 16,
                   pack_e4m3(v[4] * s, v[5] * s) | pack_e4m3(v[6] * s, v[7] * s) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (c + i < r.cols) out[c + i] = to_e4m3(v[i] * s);
    }
  }
}

// out row = (x - mean) / sqrt(var + eps) * (weight + plus) + bias (layer), x / sqrt(mean(x^2) + eps) ...
// (rms), or x; x (rows, cols), out (rows, padded) or, with factor f, (rows / f^2, cols f^2). WARPS warps for
// each row, whose first kKept vectors of 8 a lane keeps; longer rows are read again.
template <typename T, bool WIDE, int WARPS>
__global__ void __launch_bounds__(32 * kWarps) normalise_kernel(const Rows r) {
  constexpr bool kE4M3 = std::is_same_v<T, e4m3>;
  __shared__ float sums[2][kWarps];
  pdl_trigger();
  pdl_wait();
  const int lane = threadIdx.x % (32 * WARPS);
  const int row = blockIdx.x * (kWarps / WARPS) + threadIdx.x / (32 * WARPS);
  if (row >= r.rows) return;
  const auto total = [&](float v, int turn) {
    v = warp_sum(v);
    if constexpr (WARPS > 1) {
      if (threadIdx.x % 32 == 0) sums[turn][threadIdx.x / 32] = v;
      __syncthreads();
      v = 0.0f;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) v += sums[turn][i];
    }
    return v;
  };
  constexpr int kStep = 256 * WARPS;
  uint4 raw[kKept];
  float kept[kKept][8];
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    const int c = j * kStep + lane * 8;
    if (c < r.cols) raw[j] = load_raw<WIDE>(r, row, c);
  }
#pragma unroll
  for (int j = 0; j < kKept; ++j) {
    const int c = j * kStep + lane * 8;
    if (c < r.cols) convert<WIDE>(r, row, c, raw[j], kept[j]);
  }
  const auto over = [&](auto&& use) {
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int c = j * kStep + lane * 8;
      if (c < r.cols) use(c, kept[j]);
    }
    for (int c = kKept * kStep + lane * 8; c < r.cols; c += kStep) {
      float v[8];
      convert<WIDE>(r, row, c, load_raw<WIDE>(r, row, c), v);
      use(c, v);
    }
  };
  float mean = 0.0f, scale = 1.0f;
  if (r.kind == NormKind::kLayer) {
    float sum = 0.0f;
    over([&](int, float (&v)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += v[i];
    });
    mean = total(sum, 0) / r.cols;
  }
  if (r.kind != NormKind::kNone) {
    float squares = 0.0f;
    over([&](int c, float (&v)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float d = WIDE || c + i < r.cols ? v[i] - mean : 0.0f;
        squares += d * d;
      }
    });
    scale = rsqrtf(total(squares, 1) / r.cols + r.eps);
  }
  int64_t to = row * r.ldo;
  if (r.factor > 1) {
    const int f = r.factor, x = row % r.width, y = row / r.width % r.height, b = row / (r.width * r.height);
    const int64_t square = (static_cast<int64_t>(b) * (r.height / f) + y / f) * (r.width / f) + x / f;
    to = square * r.ldo + static_cast<int64_t>(y % f * f + x % f) * r.cols;
  }
  T* out = reinterpret_cast<T*>(r.out) + to;
  over([&](int c, float (&v)[8]) {
    float weight[8], bias[8];
    load_factors<WIDE>(r.weight, c, r.cols, 1.0f - r.plus, weight);
    load_factors<WIDE>(r.bias, c, r.cols, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = (v[i] - mean) * scale * (weight[i] + r.plus) + bias[i];
    if constexpr (kE4M3) {
      store8<WIDE>(r, out, c, v);
    } else if constexpr (WIDE) {
      *reinterpret_cast<uint4*>(out + c) =
          make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (c + i < r.cols) out[c + i] = __float2bfloat16(v[i]);
      }
    }
  });
  for (int c = r.cols + lane; c < r.padded; c += 32 * WARPS) {
    if constexpr (kE4M3) {
      out[c] = {0};
    } else {
      out[c] = __float2bfloat16(0.0f);
    }
  }
}

// out[i] (m, d) = scale * table[tokens[i]]; a token out of range takes row 0. A block for each row.
__global__ void __launch_bounds__(128)
    embed_kernel(const int* tokens, int64_t ld_tokens, const void* table, int64_t ld_table, bool table_f32,
                 int vocabulary, void* out, int64_t ldo, bool out_f32, int cols, float scale) {
  pdl_trigger();
  pdl_wait();
  const int token = table_row(tokens[blockIdx.x * ld_tokens], vocabulary);
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    store_from_float(out, blockIdx.x * ldo + c, scale * load_as_float(table, token * ld_table + c, table_f32),
                     out_f32);
  }
}

// x (m, heads * d), in place: [h1 | h2] -> [h1 cos - h2 sin | h2 cos + h1 sin] by row positions[i] of rope.
__global__ void __launch_bounds__(128)
    rotate_kernel(bf16* x, int64_t ld, int rows, int heads, int d, const float* rope, int64_t rope_ld,
                  int rope_rows, const int* positions, int64_t positions_ld) {
  pdl_trigger();
  pdl_wait();
  const int half = d / 2, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * heads * half) return;
  const int row = i / (heads * half), head = i / half % heads, j = i % half;
  const float* table = rope + table_row(positions[row * positions_ld], rope_rows) * rope_ld;
  bf16* at = x + row * ld + head * d + j;
  const float h1 = __bfloat162float(at[0]), h2 = __bfloat162float(at[half]);
  at[0] = __float2bfloat16(h1 * table[j] - h2 * table[half + j]);
  at[half] = __float2bfloat16(h2 * table[j] + h1 * table[half + j]);
}

}  // namespace

bool aligned16(const View& v, int step) {
  const int64_t unit = 16 / static_cast<int64_t>(size_of(v.dtype));
  return reinterpret_cast<uintptr_t>(v.at<std::byte>(step)) % 16 == 0 && v.ld % unit == 0;
}

template <typename T>
static cudaError_t normalise(Rows r, const View& x, const Norm& norm, const Launch& at) {
  r.x = x.at<void>(at.step);
  r.ldx = x.ld;
  r.x_f32 = x.dtype == DType::kF32;
  r.rows = x.rows;
  r.cols = x.cols;
  r.wide = !r.x_f32 && x.cols % 8 == 0 && aligned16(x, at.step) && r.ldo % 8 == 0 &&
           reinterpret_cast<uintptr_t>(r.out) % (8 * sizeof(T)) == 0;
  r.kind = norm.kind;
  r.eps = norm.eps;
  r.plus = norm.plus;
  if (norm.kind != NormKind::kNone) {
    r.weight = norm.weight ? norm.weight.at<float>(at.step) : nullptr;
    r.bias = norm.bias ? norm.bias.at<float>(at.step) : nullptr;
    for (const float* factors : {r.weight, r.bias}) {
      r.wide = r.wide && reinterpret_cast<uintptr_t>(factors) % 16 == 0;
    }
  }
  const bool narrow = !r.wide || x.cols <= 1024;  // a warp for each row
  const auto kernel = !r.wide  ? normalise_kernel<T, false, 1>
                      : narrow ? normalise_kernel<T, true, 1>
                               : normalise_kernel<T, true, kWarps>;
  const int blocks = narrow ? ceil_div(x.rows, kWarps) : x.rows;
  return launch_kernel(kernel, dim3(blocks), dim3(32 * kWarps), 0, at, 1, r);
}

cudaError_t normalise_rows(const View& x, const Norm& norm, bf16* out, int64_t ldo, int padded,
                           const Launch& at) {
  Rows r;
  r.out = out;
  r.ldo = ldo;
  r.padded = padded;
  return normalise<bf16>(r, x, norm, at);
}

cudaError_t normalise_rows_e4m3(const View& x, const Norm& norm, e4m3* out, int64_t ldo, float inverse,
                                const Launch& at) {
  Rows r;
  r.out = reinterpret_cast<bf16*>(out);
  r.ldo = ldo;
  r.padded = static_cast<int>(ldo);
  r.inverse = inverse;
  return normalise<e4m3>(r, x, norm, at);
}

cudaError_t rotate_heads(const View& x, int d, const View& rope, const View& positions, const Launch& at) {
  const int work = x.rows * (x.cols / 2);
  return launch_kernel(rotate_kernel, dim3(ceil_div(work, 128)), dim3(128), 0, at, 1, x.at<bf16>(at.step),
                       x.ld, x.rows, x.cols / d, d, rope.at<const float>(at.step), rope.ld, rope.rows,
                       positions.at<const int>(at.step), positions.ld);
}

cudaError_t launch(const SpaceToDepth& op, const Launch& at) {
  Rows r;
  r.out = op.out.at<bf16>(at.step);
  r.ldo = op.out.ld;
  r.factor = op.factor;
  r.height = op.height;
  r.width = op.width;
  if (op.out.dtype != DType::kE4M3) return normalise<bf16>(r, op.x, op.norm, at);
  r.inverse = 1.0f / op.out_scale;
  return normalise<e4m3>(r, op.x, op.norm, at);
}

cudaError_t launch(const Embed& op, const Launch& at) {
  return launch_kernel(embed_kernel, dim3(op.tokens.rows), dim3(128), 0, at, 1,
                       op.tokens.at<const int>(at.step), op.tokens.ld, op.table.at<const void>(at.step),
                       op.table.ld, op.table.dtype == DType::kF32, op.table.rows, op.out.at<void>(at.step),
                       op.out.ld, op.out.dtype == DType::kF32, op.table.cols, op.scale);
}

}  // namespace vla::cuda
