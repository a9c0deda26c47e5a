// A product of many rows as its kernels see it, and what each does with its sums.
//
// A kernel computes c (m, n) = a (m, k) w (n, k)^T, where w is the packed weight, and hands the sums to
// finish() in units of 64 packed columns: 32 and 32 that belong together (gate and up; the halves that a
// rotation mixes). Which columns those are is columns_of(). Sums, and everything until the store, are
// float32.
#pragma once

#include "../common.cuh"

namespace vla::cuda {

enum class ProductKind : int { kLinear = 0, kGated = 1, kQkv = 2 };

struct Product {
  ProductKind kind = ProductKind::kLinear;
  int m = 0, n = 0, k = 0;  // n: packed rows
  const bf16* a = nullptr;
  const bf16* w = nullptr;
  int64_t lda = 0, ldw = 0;
  // kLinear and kGated: out (m, cols) = residual + gate * act(scale * (c + bias));  = act(c of G) * (c of U)
  void* out = nullptr;
  int64_t ldo = 0;
  int cols = 0;
  bool out_f32 = false;
  bool wide = false;  // rows of out, residual, q, k and v can be read and written by 16 bytes
  bool activated = false;
  float act_linear = 0.0f, act_cubic = 0.0f;  // see activate_fast
  float scale = 1.0f;
  bool has_bias = false;  // there is one, here or of a part
  const float* bias = nullptr;
  const float* gate = nullptr;
  const bf16* residual = nullptr;
  int64_t ldr = 0;
  int residual_rows = 1;
  // kQkv: part i has columns [end[i - 1], end[i]) and starts at part[i]
  bf16* part[3] = {};
  int64_t part_ld[3] = {};
  const float* part_bias[3] = {};
  int end[3] = {};
  int head_dim = 0;
  bool rotate = false;  // head_dim is a multiple of 64, and the heads of q and k are rotated here
  const float* rope = nullptr;
  int64_t rope_ld = 0;
  int rope_rows = 1;
  const int* positions = nullptr;
};

struct Columns {
  int first, second;  // packed columns of the two halves of a unit
};
__host__ __device__ __forceinline__ Columns columns_of(const Product& p, int unit) {
  if (!p.rotate || p.head_dim == 64) return {64 * unit, 64 * unit + 32};
  const int units = p.head_dim / 64, head = unit / units;
  const int at = head * p.head_dim + 32 * (unit - head * units);
  return {at, at + p.head_dim / 2};
}

// tanh(x) by the special function unit: 2^-11 of absolute error, an eighth of a bfloat16's last place near 1.
__device__ __forceinline__ float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Both activations are x / 2 (1 + tanh(x (linear + cubic x^2))): silu with 1/2 and 0, gelu with sqrt(2 / pi)
// and 0.044715 sqrt(2 / pi).
__device__ __forceinline__ float activate_fast(const Product& p, float x) {
  const float h = 0.5f * x;
  return h + h * tanh_fast(x * (p.act_linear + p.act_cubic * x * x));
}

// Word i of lane q of every four lanes goes to word q of lane i: 8 columns that a thread holds in four blocks
// of 8 become 8 neighbours (16 bytes), and back.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const int lane = threadIdx.x;
  {
    const bool odd = lane & 1;
    const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
    const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
    w[0] = odd ? a : w[0];
    w[1] = odd ? w[1] : a;
    w[2] = odd ? b : w[2];
    w[3] = odd ? w[3] : b;
  }
  {
    const bool high = lane & 2;
    const uint32_t a = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2);
    const uint32_t b = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
    w[0] = high ? a : w[0];
    w[2] = high ? w[2] : a;
    w[1] = high ? b : w[1];
    w[3] = high ? w[3] : b;
  }
}

// The number that is added to packed column `column` before anything else.
__device__ __forceinline__ float bias_of(const Product& p, int column) {
  if (p.kind == ProductKind::kLinear) return p.bias && column < p.cols ? p.bias[column] : 0.0f;
  if (p.kind == ProductKind::kGated || column >= p.end[2]) return 0.0f;
  const int part = column < p.end[0] ? 0 : column < p.end[1] ? 1 : 2;
  return p.part_bias[part] ? p.part_bias[part][column - (part ? p.end[part - 1] : 0)] : 0.0f;
}
// The same for column i of a tile whose first unit is `unit`.
__device__ __forceinline__ float bias_in_tile(const Product& p, int unit, int i) {
  const Columns c = columns_of(p, unit + i / 64);
  return bias_of(p, (i & 32 ? c.second : c.first) + i % 32);
}

// What a unit's end reads, asked for before its sums are there: rows `row` and `row` + 8 of both halves.
struct Ahead {
  uint4 residual[2][2] = {};
};
__device__ __forceinline__ int residual_row(const Product& p, int row) {
  return row < p.residual_rows ? row : row % p.residual_rows;
}
__device__ __forceinline__ Ahead look_ahead(const Product& p, int row, int unit) {
  Ahead ahead;
  if (p.kind != ProductKind::kLinear || !p.residual || !p.wide) return ahead;
  const int c = 64 * unit + 8 * (threadIdx.x & 3);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= p.m) continue;
    const bf16* from = p.residual + residual_row(p, row + 8 * r) * p.ldr + c;
    if (c < p.cols) ahead.residual[r][0] = *reinterpret_cast<const uint4*>(from);
    if (c + 32 < p.cols) ahead.residual[r][1] = *reinterpret_cast<const uint4*>(from + 32);
  }
  return ahead;
}

// The same as store_row and store_parts where rows cannot be written by 16 bytes: eight numbers, two by two.
// Rare, and kept out of the way of the others.
struct Eight {
  float v[8];
};
static __device__ __noinline__ void store_narrow(const Product& p, int row, int c, Eight e) {
  if (row >= p.m) return;
  const int q = threadIdx.x & 3;
  const bf16* r = p.residual ? p.residual + residual_row(p, row) * p.ldr : nullptr;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int col = c + 8 * (j >> 1) + 2 * q + (j & 1);
    if (p.kind == ProductKind::kQkv) {
      if (col >= p.end[2]) continue;
      const int part = col < p.end[0] ? 0 : col < p.end[1] ? 1 : 2;
      p.part[part][row * p.part_ld[part] + col - (part ? p.end[part - 1] : 0)] = __float2bfloat16(e.v[j]);
    } else if (col < p.cols) {
      store_from_float(p.out, row * p.ldo + col, e.v[j] + (r ? __bfloat162float(r[col]) : 0.0f), p.out_f32);
    }
  }
}
__device__ __forceinline__ Eight eight_of(const float* v) {
  return {{v[0], v[1], v[4], v[5], v[8], v[9], v[12], v[13]}};
}

// Adds the residual to, and stores, 32 columns of one row: this thread has columns c + 8 i + 2 q + {0, 1} as
// v[4 i + {0, 1}], and columns c + 8 q ... of the residual.
__device__ __forceinline__ void store_row(const Product& p, int row, int c, const float* v,
                                          const uint4& residual) {
  const int q = threadIdx.x & 3;
  if (p.wide) {
    const int at = c + 8 * q;
    uint32_t words[4];
    if (p.residual) {
      uint32_t r[4] = {residual.x, residual.y, residual.z, residual.w};
      transpose_quad(r);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = unpack2(r[i]);
        words[i] = pack2(v[4 * i] + f.x, v[4 * i + 1] + f.y);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack2(v[4 * i], v[4 * i + 1]);
    }
    transpose_quad(words);
    if (row < p.m && at < p.cols) {
      *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + row * p.ldo + at) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    return;
  }
  store_narrow(p, row, c, eight_of(v));
}

// Stores 32 columns of q | k | v of one row, held as in store_row.
__device__ __forceinline__ void store_parts(const Product& p, int row, int c, const float* v) {
  const int q = threadIdx.x & 3;
  if (p.wide) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack2(v[4 * i], v[4 * i + 1]);
    transpose_quad(words);
    const int at = c + 8 * q;
    if (row < p.m && at < p.end[2]) {
      const int part = at < p.end[0] ? 0 : at < p.end[1] ? 1 : 2;
      const int col = at - (part ? p.end[part - 1] : 0);
      *reinterpret_cast<uint4*>(p.part[part] + row * p.part_ld[part] + col) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    return;
  }
  store_narrow(p, row, c, eight_of(v));
}

// Adds 32 biases in shared memory.
__device__ __forceinline__ void add_bias(const float* bias, float* x) {
  const int q = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * i + 2 * q);
    x[4 * i] += b.x;
    x[4 * i + 1] += b.y;
    x[4 * i + 2] += b.x;
    x[4 * i + 3] += b.y;
  }
}

__device__ __forceinline__ void finish_linear(const Product& p, int row, int c, float* x, const float* bias,
                                              const uint4& r0, const uint4& r1) {
  if (bias) add_bias(bias, x);
  if (p.scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= p.scale;
  }
  if (p.activated) {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = activate_fast(p, x[i]);
  }
  if (p.gate) {
    const int q = threadIdx.x & 3;
    float gate[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = p.gate[min(c + 8 * (i >> 1) + 2 * q + (i & 1), p.cols - 1)];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= gate[(i >> 2) * 2 + (i & 1)];
  }
  store_row(p, row, c, x, r0);
  store_row(p, row + 8, c, x + 2, r1);
}

// What follows the sums of one unit: x and y are its two halves of 32 columns, of rows `row` and `row` + 8,
// each as wgmma and mma leave them: block i of 8 columns, then row, then two columns from 2 q (q = lane mod
// 4). bias: the unit's 64 biases in shared memory, or nullptr where there are none.
__device__ __forceinline__ void finish(const Product& p, int row, int unit, float* x, float* y,
                                       const float* bias, const Ahead& ahead) {
  if (p.kind == ProductKind::kLinear) {
    finish_linear(p, row, 64 * unit, x, bias, ahead.residual[0][0], ahead.residual[1][0]);
    finish_linear(p, row, 64 * unit + 32, y, bias ? bias + 32 : nullptr, ahead.residual[0][1],
                  ahead.residual[1][1]);
    return;
  }
  if (p.kind == ProductKind::kGated) {
    if (p.activated) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = activate_fast(p, x[i]) * y[i];
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] *= y[i];
    }
    store_row(p, row, 32 * unit, x, uint4{});
    store_row(p, row + 8, 32 * unit, x + 2, uint4{});
    return;
  }
  const Columns c = columns_of(p, unit);
  if (bias) {
    add_bias(bias, x);
    add_bias(bias + 32, y);
  }
  if (p.rotate && c.first < p.end[1]) {
    const int q = threadIdx.x & 3, half = p.head_dim / 2;
    const int j = c.first % p.head_dim + 2 * q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = p.positions[min(row + 8 * r, p.m - 1)];
      const float* table = p.rope + min(max(position, 0), p.rope_rows - 1) * p.rope_ld + j;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 cos = *reinterpret_cast<const float2*>(table + 8 * i);
        const float2 sin = *reinterpret_cast<const float2*>(table + half + 8 * i);
        float& x0 = x[4 * i + 2 * r];
        float& x1 = x[4 * i + 2 * r + 1];
        float& y0 = y[4 * i + 2 * r];
        float& y1 = y[4 * i + 2 * r + 1];
        const float h0 = x0 * cos.x - y0 * sin.x, h1 = x1 * cos.y - y1 * sin.y;
        y0 = y0 * cos.x + x0 * sin.x;
        y1 = y1 * cos.y + x1 * sin.y;
        x0 = h0;
        x1 = h1;
      }
    }
  }
  store_parts(p, row, c.first, x);
  store_parts(p, row + 8, c.first, x + 2);
  store_parts(p, row, c.second, y);
  store_parts(p, row + 8, c.second, y + 2);
}

// ---- operations as products: launches what prepares x (a norm), if anything, and sets at.pdl if so
cudaError_t make_product(const Linear& op, Launch& at, Product* p);
cudaError_t make_product(const GatedLinear& op, Launch& at, Product* p);
cudaError_t make_product(const Qkv& op, Launch& at, Product* p);

// ---- the kernels, by device
struct Tile {
  int groups = 0;   // rows: 64 of each warpgroup
  int columns = 0;  // packed columns
  int pair = 1;     // 2: two neighbouring column tiles share what they read of a
  int split = 1;    // blocks that share one tile's k, summed within a cluster
};
cudaError_t product_sm90(const Product& p, const Tile& tile, const Launch& at);
cudaError_t product_sm80(const Product& p, const Launch& at);
// Tiles that product_sm90 has been compiled for, and the one expected to be fastest.
bool has_tile_sm90(const Tile& tile);
Tile choose_tile_sm90(const Product& p, int sms);

}  // namespace vla::cuda
