// What a product of the persistent prefix does with its sums: scaling by the rows' 1 / rms, the hidden state,
// rotation, and the stores.
#pragma once

#include "../head/multiply.cuh"
#include "../large/product.cuh"
#include "block.cuh"

namespace vla::cuda::prefix {

// The tile's rows' 1 / rms, four threads a row, from the parts of its sum of squares: asked for before the
// products, left in shared memory after them.
template <int N>
struct Squares {
  static constexpr int kTurns = divide_up(N, 64);
  float4 part[kTurns][4];

  __device__ __forceinline__ void ask(const Table& t, int row0) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = min(row0 + i * 64 + static_cast<int>(threadIdx.x / 4), kMaxRows - 1);
      const auto* from =
          reinterpret_cast<const float4*>(t.squares + row * kSquareParts) + threadIdx.x % 4 * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) part[i][j] = __ldcg(from + j);
    }
  }
  __device__ __forceinline__ void leave(const Block& b, float mean, float eps) const {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = i * 64 + static_cast<int>(threadIdx.x / 4);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += (part[i][j].x + part[i][j].y) + (part[i][j].z + part[i][j].w);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (threadIdx.x % 4 == 0 && row < N)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(b.inverse + row * 4), "f"(rsqrtf(sum * mean + eps))
                     : "memory");
    }
  }
};
// Of this thread's two rows of a unit.
__device__ __forceinline__ float2 inverse_of(const Block& b, int unit) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(b.inverse + (unit * 8 + threadIdx.x % 4 * 2) * 4)
               : "memory");
  return v;
}

// x / 2 (1 + tanh(x (linear + cubic x^2))): as of large products.
struct Activation {
  float linear, cubic;
};
__device__ __forceinline__ Activation activation(int act) {
  const bool gelu = act == static_cast<int>(Act::kGeluTanh);
  return {gelu ? 0.7978845608028654f : 0.5f, gelu ? 0.035677408136300125f : 0.0f};
}
__device__ __forceinline__ float activate(float x, const Activation& a) {
  const float h = 0.5f * x;
  return h + h * tanh_fast(x * (a.linear + a.cubic * x * x));
}

// Lanes four apart have neighbouring columns of the same two rows, a and b: the even column's gets both of
// row a, the odd one's both of row b.
__device__ __forceinline__ bool odd_column() { return threadIdx.x / 4 & 1; }
__device__ __forceinline__ uint32_t pair_columns(float a, float b) {
  const bool odd = odd_column();
  const float other = __shfl_xor_sync(0xffffffffu, odd ? a : b, 4);
  return odd ? pack2(other, b) : pack2(a, other);
}
__device__ __forceinline__ void store_pair(Bits* out, int rows, int row, int column, uint32_t v) {
  *reinterpret_cast<uint32_t*>(out + act_index(rows, row, column)) = v;
}

// The hidden state's new sums in: z of a block's kUnits units from row `row` on, of column tile `column`.
template <int kUnits, int H>
__device__ __forceinline__ void end_state(float (&z)[H][4], const Table& t, const Phase& p, int column,
                                          int row, const float (&next)[2], int group, Carried& state) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, c = column * 64 + warp * 16 + lane / 4;
  const int odd = odd_column();
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (group == 1 && H + i >= kUnits) continue;
    const int first = row + 8 * (group == 0 ? i : H + i) + lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; ++e) state.state[i][e] = z[i][e] += state.state[i][e];
    float a = z[i][0] * z[i][0] + z[i][2] * z[i][2], b = z[i][1] * z[i][1] + z[i][3] * z[i][3];
#pragma unroll
    for (int o = 4; o < 32; o *= 2)
      a += __shfl_xor_sync(0xffffffffu, a, o), b += __shfl_xor_sync(0xffffffffu, b, o);
    if (lane < 4) {
      float* squares = t.squares + first * kSquareParts + column * 4 + warp;
      if (first < t.m) squares[0] = a;
      if (first + 1 < t.m) squares[kSquareParts] = b;
    }
    const uint32_t low = pair_columns(z[i][0] * next[0], z[i][1] * next[0]),
                   high = pair_columns(z[i][2] * next[1], z[i][3] * next[1]);
    if (first + odd < t.m) {
      store_pair(p.out, t.rows, first + odd, c - odd, low);
      store_pair(p.out, t.rows, first + odd, c + 8 - odd, high);
    }
  }
}

// Cosines and sines of this thread's column of a head, for its rows, asked for ahead.
template <int H>
struct Rotation {
  float cosine[H][2], sine[H][2];

  __device__ __forceinline__ void ask(const Table& t, int part, int row, int group) {
    const int lane = threadIdx.x % 32, c = threadIdx.x / 32 % 4 * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < H; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        cosine[i][h] = 1.0f, sine[i][h] = 0.0f;
        if (part == 2) continue;
        const int r = min(row + 8 * (group * H + i) + lane % 4 * 2 + h, t.m - 1);
        const int position = __ldg(t.positions + r * t.ld_positions);
        const bool inside = static_cast<unsigned>(position) < static_cast<unsigned>(t.rope_rows);
        const float* from = t.rope + (inside ? position : 0) * t.ld_rope + c;
        cosine[i][h] = __ldg(from), sine[i][h] = __ldg(from + kHead / 2);
      }
    }
  }
};

template <int kUnits, int H>
__device__ __forceinline__ void end_qkv(float (&z)[H][4], const Table& t, const Block& b, const Phase& p,
                                        const HeadOf& of, int row, const Rotation<H>& r, int group) {
  const int lane = threadIdx.x % 32, odd = odd_column();
  const int c = of.head * kHead + threadIdx.x / 32 % 4 * 8 + lane / 4 - odd;
  Bits* const out = of.part == 0 ? p.out : of.part == 1 ? t.k : t.v;
  Bits* const cache = of.part == 1 ? p.cache_k : p.cache_v;
  const int64_t ld = of.part == 1 ? p.ld_k : p.ld_v;
  const int rows = of.part == 0 ? t.rows : 2 * t.key_rows;
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (group == 1 && H + i >= kUnits) continue;
    const int unit = group == 0 ? i : H + i, its = row + 8 * unit + lane % 4 * 2 + odd;
    const float2 inverse = inverse_of(b, unit);
    const float x[2] = {z[i][0] * inverse.x, z[i][1] * inverse.y},
                y[2] = {z[i][2] * inverse.x, z[i][3] * inverse.y};
    const float* cosine = r.cosine[i];
    const float* sine = r.sine[i];
    const uint32_t low = pair_columns(x[0] * cosine[0] - y[0] * sine[0], x[1] * cosine[1] - y[1] * sine[1]),
                   high = pair_columns(y[0] * cosine[0] + x[0] * sine[0], y[1] * cosine[1] + x[1] * sine[1]);
    if (its >= t.m) continue;
    store_pair(out, rows, its, c, low);
    store_pair(out, rows, its, c + kHead / 2, high);
    if (of.part > 0) {
      *reinterpret_cast<uint32_t*>(cache + its * ld + c) = low;
      *reinterpret_cast<uint32_t*>(cache + its * ld + c + kHead / 2) = high;
    }
  }
}

}  // namespace vla::cuda::prefix
