// A product of many rows as its kernels see it, and what each does with its sums.
//
// A kernel computes c (m, n) = a (m, k) w (n, k)^T, where w is the packed weight, and hands the sums to
// finish() in units of 64 packed columns: 32 and 32 that belong together (gate and up; the halves that a
// rotation mixes). Which columns those are is columns_of(). Sums, and everything until the store, are
// float32.
#pragma once

#include <type_traits>

#include "e4m3.cuh"

namespace vla::cuda {

enum class ProductKind : int { kLinear = 0, kGated = 1, kQkv = 2 };

struct Product {
  ProductKind kind = ProductKind::kLinear;
  int m = 0, n = 0, k = 0;  // n: packed rows
  const void* a = nullptr;  // bf16; E4M3 in a QuantisedProduct
  const void* w = nullptr;
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

// The same with a and w in E4M3: the sums of packed column i are multiplied by x_scale * w_scale[i] before
// anything else. A product in bf16 has no w_scale.
struct QuantisedProduct : Product {
  const float* w_scale = nullptr;
  float x_scale = 1.0f;
  float out_inverse = 0.0f;  // not 0: out is E4M3, what is computed times this
};
template <typename P>
constexpr bool kQuantised = std::is_base_of_v<QuantisedProduct, P>;
// The same where the compiler is to know the kind: the end of a tile has no code then that others need.
template <typename P, ProductKind KIND>
struct OfKind : P {
  static constexpr ProductKind kind = KIND;
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
// Whether a unit's columns belong together.
__host__ __device__ __forceinline__ bool in_pairs(const Product& p) {
  return p.kind == ProductKind::kGated || p.rotate;
}

// Where they do not, a tile may begin or end within a unit. Its columns are a Span then, where else they are
// the number of its first unit; both are counted on in steps of 64 columns.
struct Span {
  int first, left;  // a multiple of 32; columns up to the end of the tile
};
__device__ __forceinline__ Span operator+(const Span& s, int units) {
  return {s.first + 64 * units, s.left - 64 * units};
}
__device__ __forceinline__ int first_column(int unit) { return 64 * unit; }
__device__ __forceinline__ int first_column(const Span& s) { return s.first; }
// Whether 64 columns are left, or 32.
__device__ __forceinline__ bool whole(int) { return true; }
__device__ __forceinline__ bool whole(const Span& s) { return s.left >= 64; }
constexpr int kNoColumn = 1 << 30;
__device__ __forceinline__ Columns columns_of(const Product&, const Span& s) {
  return {s.first, whole(s) ? s.first + 32 : kNoColumn};
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

// The number that is added to packed column `column` before anything else.
__device__ __forceinline__ float bias_of(const Product& p, int column) {
  if (p.kind == ProductKind::kLinear) return p.bias && column < p.cols ? p.bias[column] : 0.0f;
  if (p.kind == ProductKind::kGated || column >= p.end[2]) return 0.0f;
  const int part = column < p.end[0] ? 0 : column < p.end[1] ? 1 : 2;
  return p.part_bias[part] ? p.part_bias[part][column - (part ? p.end[part - 1] : 0)] : 0.0f;
}
// The packed column that is column i of a tile whose first unit is `unit`.
__device__ __forceinline__ int column_in_tile(const Product& p, int unit, int i) {
  const Columns c = columns_of(p, unit + i / 64);
  return (i & 32 ? c.second : c.first) + i % 32;
}
__device__ __forceinline__ int column_in_tile(const Product&, const Span& s, int i) { return s.first + i; }
template <typename U>
__device__ __forceinline__ float bias_in_tile(const Product& p, const U& unit, int i) {
  return bias_of(p, column_in_tile(p, unit, i));
}
__device__ __forceinline__ float scale_in_tile(const QuantisedProduct& p, int unit, int i) {
  const int column = column_in_tile(p, unit, i);
  return column < p.n ? p.x_scale * p.w_scale[column] : 0.0f;
}

// ---- a unit's end. A warp has 16 rows of 64 packed columns as wgmma and mma leave them: x and y, its two
// halves of 32 columns; in each block i of 8 columns, rows lane / 4 and that + 8, columns 2 (lane mod 4) +
// {0, 1}. They pass through 2 KiB of shared memory, from where they go out as whole rows of 16 bytes a lane.

constexpr int kStaging = 16 * 128;  // bytes for each warp

__device__ __forceinline__ int residual_row(const Product& p, int row) {
  return row < p.residual_rows ? row : row % p.residual_rows;
}
// Where 16 bytes of a row lie: the pieces of a row change places with the row, so that no access meets a bank
// twice.
__device__ __forceinline__ uint32_t staged(uint32_t staging, int row, int piece) {
  return staging + row * 128 + ((piece ^ (row & 7)) << 4);
}
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared16(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_shared2(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(v)) : "memory");
}
__device__ __forceinline__ void store_matrix_x4(uint32_t address, const uint32_t (&r)[4], uint32_t staging,
                                                int piece) {
#if VLA_SM90
  (void)staging, (void)piece;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  (void)address;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile(
        "st.shared.b32 [%0], %1;" ::"r"(staged(staging, lane / 4 + i % 2 * 8, piece + i / 2) + lane % 4 * 4),
        "r"(r[i])
        : "memory");
  }
#endif
}

// What a unit's end reads, asked for before its sums are there: the residual's 16 rows of 64 columns, whole
// rows, or the positions of this lane's two rows.
struct Ahead {
  uint4 residual[4];
  int position[2];
};
template <typename P, typename U>
__device__ __forceinline__ Ahead look_ahead(const P& p, int row0, const U& unit) {
  Ahead ahead = {};
  const int lane = threadIdx.x & 31, c = first_column(unit) + lane % 8 * 8;
  if (p.kind == ProductKind::kQkv && p.rotate) {
#pragma unroll
    for (int r = 0; r < 2; ++r) ahead.position[r] = p.positions[min(row0 + lane / 4 + 8 * r, p.m - 1)];
  }
  if (p.kind == ProductKind::kLinear && p.residual && p.wide) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int row = row0 + 4 * t + lane / 8;
      if (row < p.m && c < p.cols && (whole(unit) || lane % 8 < 4)) {
        ahead.residual[t] = *reinterpret_cast<const uint4*>(p.residual + residual_row(p, row) * p.ldr + c);
      }
    }
  }
  return ahead;
}

// Where rows cannot be written by 16 bytes: eight numbers of one row, columns c + 8 i + 2 (lane mod 4) + {0,
// 1}. Rare, and kept out of the way of the others.
struct Eight {
  float v[8];
};
template <typename P>
static __device__ __noinline__ void store_narrow(const P& p, int row, int c, Eight e) {
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
      if constexpr (kQuantised<P>) {
        if (p.out_inverse != 0.0f) {
          const float v = e.v[j] + (r ? __bfloat162float(r[col]) : 0.0f);
          static_cast<e4m3*>(p.out)[row * p.ldo + col] = to_e4m3(v * p.out_inverse);
          continue;
        }
      }
      store_from_float(p.out, row * p.ldo + col, e.v[j] + (r ? __bfloat162float(r[col]) : 0.0f), p.out_f32);
    }
  }
}
__device__ __forceinline__ Eight eight_of(const float* v) {
  return {{v[0], v[1], v[4], v[5], v[8], v[9], v[12], v[13]}};
}

// What there is for each of a unit's 64 columns, in shared memory; nullptr: nothing.
struct PerColumn {
  const float* bias = nullptr;
  const float* scale = nullptr;  // of the sums; always there in a QuantisedProduct
};
// Multiplies by 32 scales in shared memory.
__device__ __forceinline__ void scale_sums(const float* scale, float* x) {
  const int q = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 s = *reinterpret_cast<const float2*>(scale + 8 * i + 2 * q);
    x[4 * i] *= s.x;
    x[4 * i + 1] *= s.y;
    x[4 * i + 2] *= s.x;
    x[4 * i + 3] *= s.y;
  }
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
__device__ __forceinline__ void activate_16(const Product& p, float* x) {
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = activate_fast(p, x[i]);
}
__device__ __forceinline__ void scale_and_gate(const Product& p, int c, float* x) {
  if (p.scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= p.scale;
  }
  if (p.activated) activate_16(p, x);
  if (p.gate) {
    const int q = threadIdx.x & 3;
    float gate[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = p.gate[min(c + 8 * (i >> 1) + 2 * q + (i & 1), p.cols - 1)];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= gate[(i >> 2) * 2 + (i & 1)];
  }
}
// Rotates two rows of the halves of a head, of which x starts at column j.
__device__ __forceinline__ void rotate(const Product& p, const int (&position)[2], int j, float* x,
                                       float* y) {
  const int half = p.head_dim / 2, at = j + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float* table = p.rope + table_row(position[r], p.rope_rows) * p.rope_ld + at;
    float2 cos[4], sin[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cos[i] = *reinterpret_cast<const float2*>(table + 8 * i);
      sin[i] = *reinterpret_cast<const float2*>(table + half + 8 * i);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x0 = x[4 * i + 2 * r];
      float& x1 = x[4 * i + 2 * r + 1];
      float& y0 = y[4 * i + 2 * r];
      float& y1 = y[4 * i + 2 * r + 1];
      const float h0 = x0 * cos[i].x - y0 * sin[i].x, h1 = x1 * cos[i].y - y1 * sin[i].y;
      y0 = y0 * cos[i].x + x0 * sin[i].x;
      y1 = y1 * cos[i].y + x1 * sin[i].y;
      x0 = h0;
      x1 = h1;
    }
  }
}

// Stores a unit as E4M3: 16 rows of 64 columns, or of 32 (gated), pass through the staging as rows 80 bytes
// apart, so that neither side meets a bank more than twice, and go out by 16 bytes.
__device__ __forceinline__ void store_e4m3(const QuantisedProduct& p, int row0, int unit, const float* x,
                                           const float* y, uint32_t staging) {
  constexpr int kApart = 80;
  static_assert(16 * kApart <= kStaging && kApart % 16 == 0);
  const bool gated = p.kind == ProductKind::kGated;
  const int lane = threadIdx.x & 31;
  const uint32_t at = staging + lane / 4 * kApart + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (gated && i >= 4) break;
    const float* const v = i < 4 ? x + 4 * i : y + 4 * (i - 4);
    store_shared2(at + 8 * i, pack_e4m3(v[0] * p.out_inverse, v[1] * p.out_inverse));
    store_shared2(at + 8 * i + 8 * kApart, pack_e4m3(v[2] * p.out_inverse, v[3] * p.out_inverse));
  }
  __syncwarp();
  const int shift = gated ? 1 : 2;  // a row has 2 or 4 pieces of 16 columns
  const int piece = lane & ((1 << shift) - 1), col = (gated ? 32 : 64) * unit + 16 * piece;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int r = (32 * t + lane) >> shift;
    if (r < 16 && row0 + r < p.m && col < p.cols) {
      *reinterpret_cast<uint4*>(static_cast<e4m3*>(p.out) + (row0 + r) * p.ldo + col) =
          load_shared16(staging + r * kApart + 16 * piece);
    }
  }
  __syncwarp();
}

// What follows the sums of a unit, or of a Span's first 64 columns, whose first row is row0. staging: this
// warp's.
template <typename P, typename U>
__device__ __forceinline__ void finish(const P& p, int row0, const U& unit, float* x, float* y,
                                       const PerColumn& columns, const Ahead& ahead, uint32_t staging) {
  const int lane = threadIdx.x & 31, row = row0 + lane / 4;
  const Columns c = columns_of(p, unit);
  const float* const bias = columns.bias;
  if constexpr (kQuantised<P>) {
    scale_sums(columns.scale, x);
    scale_sums(columns.scale + 32, y);
  }
  if (p.kind == ProductKind::kGated) {
    if (p.activated) activate_16(p, x);
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] *= y[i];
  } else {
    if (bias) {
      add_bias(bias, x);
      add_bias(bias + 32, y);
    }
    if (p.kind == ProductKind::kLinear) {
      scale_and_gate(p, c.first, x);
      scale_and_gate(p, c.second, y);
    } else if (p.kind == ProductKind::kQkv && p.rotate && c.first < p.end[1]) {
      rotate(p, ahead.position, c.first % p.head_dim, x, y);
    }
  }
  const bool gated = p.kind == ProductKind::kGated;
  if (!p.wide) {
    const int first = gated ? first_column(unit) / 2 : c.first;
    store_narrow(p, row, first, eight_of(x));
    store_narrow(p, row + 8, first, eight_of(x + 2));
    if (gated) return;
    store_narrow(p, row, c.second, eight_of(y));
    store_narrow(p, row + 8, c.second, eight_of(y + 2));
    return;
  }
  // Matrices of 8 x 8: lane l names row l mod 8 of matrix l / 8; they are rows + 0, + 8 of one piece, then of
  // the next.
  const int matrix_row = lane % 16, matrix_piece = lane / 16;
  if (p.kind == ProductKind::kLinear && p.residual) {
#pragma unroll
    for (int t = 0; t < 4; ++t)
      store_shared16(staged(staging, 4 * t + lane / 8, lane % 8), ahead.residual[t]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float* const v = i < 4 ? x + 4 * i : y + 4 * (i - 4);
      uint32_t r[4];
      ldmatrix_x4(r, staged(staging, matrix_row, i + matrix_piece));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 f = unpack2(r[e]);
        v[4 * (e / 2) + 2 * (e % 2)] += f.x;
        v[4 * (e / 2) + 2 * (e % 2) + 1] += f.y;
      }
    }
    __syncwarp();
  }
  if constexpr (kQuantised<P>) {
    if (p.out_inverse != 0.0f) {
      store_e4m3(p, row0, unit, x, y, staging);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    if (gated && i >= 4) break;
    const float* const v = i < 4 ? x + 4 * i : y + 4 * (i - 4);
    const uint32_t r[4] = {pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7])};
    store_matrix_x4(staged(staging, matrix_row, i + matrix_piece), r, staging, i);
  }
  __syncwarp();
  if (gated) {
    const int col = first_column(unit) / 2 + lane % 4 * 8;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int r = 8 * t + lane / 4;
      if (row0 + r < p.m && col < p.cols) {
        *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out) + (row0 + r) * p.ldo + col) =
            load_shared16(staged(staging, r, lane % 4));
      }
    }
  } else {
    const int piece = lane % 8, col = piece < 4 ? c.first + 8 * piece : c.second + 8 * (piece - 4);
    bf16* to = static_cast<bf16*>(p.out) + col;
    int64_t ld = p.ldo;
    int end = p.cols;
    if (p.kind == ProductKind::kQkv) {
      const int part = col < p.end[0] ? 0 : col < p.end[1] ? 1 : 2;
      to = p.part[part] + col - (part == 0 ? 0 : part == 1 ? p.end[0] : p.end[1]);
      ld = p.part_ld[part];
      end = p.end[2];
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int r = 4 * t + lane / 8;
      if (row0 + r < p.m && col < end) {
        *reinterpret_cast<uint4*>(to + (row0 + r) * ld) = load_shared16(staged(staging, r, piece));
      }
    }
  }
  __syncwarp();
}

struct Tile {
  int groups = 0;   // rows: 64 of each warpgroup
  int columns = 0;  // packed columns
  int split = 1;    // blocks that share one tile's k, summed within a cluster
};

// ---- operations as products: launches what prepares x (a norm, a conversion), if anything, and sets at.pdl
// if so
cudaError_t make_product(const Linear& op, Launch& at, QuantisedProduct* p);
cudaError_t make_product(const GatedLinear& op, Launch& at, QuantisedProduct* p);
cudaError_t make_product(const Qkv& op, Launch& at, QuantisedProduct* p);

// ---- the kernels, by device and type of the operands
cudaError_t product_sm90(const Product& p, const Tile& tile, const Launch& at);
cudaError_t product_e4m3(const QuantisedProduct& p, const Tile& tile, const Launch& at);  // on Hopper
cudaError_t product_sm80(const Product& p, const Launch& at);
// Whether product_sm90 or product_e4m3 has been compiled for a tile; and the one expected to be fastest.
bool has_tile_sm90(const Tile& tile);
bool has_tile_e4m3(const Tile& tile);
Tile choose_tile_sm90(const Product& p, int sms);
Tile choose_tile_e4m3(const QuantisedProduct& p, int sms);

}  // namespace vla::cuda
