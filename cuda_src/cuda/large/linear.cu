// Products of many rows: the operations as the kernels take them, their weights' packing, the norm before
// them.
#include <string>

#include "product.cuh"
#include "rows.cuh"

namespace vla::cuda {
namespace {

// Columns of a packed weight, and of a left operand in the scratch: rows start on multiples of 16 bytes.
int packed_k(int k) { return round_up(k, 8); }
int packed_k_e4m3(int k) { return round_up(k, 16); }
// Rows of one of the two matrices of a gated product: they alternate by 32.
int gated_rows(int n) { return round_up(n, 32); }

int packed_rows(Packing packing, const std::vector<int>& n) {
  if (packing == Packing::kInterleaved) return 2 * gated_rows(n.at(0));
  int total = 0;
  for (int part : n) total += part;
  return total;
}

// to (rows, packed k) = one part, from row `at` on, or, interleaved, into every other block of 32 rows.
__global__ void __launch_bounds__(256)
    pack_kernel(bf16* to, int ld, int at, int rows, int block, const void* from, bool f32, int n, int k,
                int64_t ld_from) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= static_cast<int64_t>(rows) * ld) return;
  const int row = static_cast<int>(i / ld), col = static_cast<int>(i % ld);
  const float v = row < n && col < k ? load_as_float(from, row * ld_from + col, f32) : 0.0f;
  const int packed = block ? row / block * 2 * block + row % block : row;
  to[static_cast<int64_t>(at + packed) * ld + col] = __float2bfloat16(v);
}

// An E4M3 weight in memory: its packed rows, then a scale for each of them.
size_t scales_at(int rows, int k) { return (static_cast<size_t>(rows) * packed_k_e4m3(k) + 255) / 256 * 256; }

// The larger one; a NaN stays.
__device__ __forceinline__ float larger(float a, float b) { return b <= a || a != a ? a : b; }

// One row of an E4M3 weight a block: scale = the largest magnitude / 448 (1 where that is no normal number),
// value = the nearest to element / scale, zeros beyond n and k. Rows go where pack_kernel puts them. A NaN or
// an infinity makes the row's output NaN.
__global__ void __launch_bounds__(256)
    pack_e4m3_kernel(e4m3* to, float* scales, int ld, int at, int block, const void* from, bool f32, int n,
                     int k, int64_t ld_from) {
  __shared__ float tops[8];
  const int row = blockIdx.x, packed = at + (block ? row / block * 2 * block + row % block : row);
  const auto element = [&](int col) {  // as bf16 has it
    return __bfloat162float(__float2bfloat16(load_as_float(from, row * ld_from + col, f32)));
  };
  float top = 0.0f;
  if (row < n) {
    for (int col = threadIdx.x; col < k; col += blockDim.x) top = larger(top, fabsf(element(col)));
  }
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) top = larger(top, __shfl_xor_sync(0xffffffffu, top, o));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i) top = larger(top, tops[i]);
  float scale = top / kLargestE4M3;
  if (scale < 1.17549435e-38f) scale = 1.0f;
  if (threadIdx.x == 0) scales[packed] = scale;
  for (int col = threadIdx.x; col < ld; col += blockDim.x) {
    const float v = row < n && col < k ? element(col) : 0.0f;
    to[static_cast<int64_t>(packed) * ld + col] = to_e4m3(v / scale);
  }
}

// The left operand as the product reads it, rows on multiples of 16 bytes: x itself, or norm(x) in the
// scratch.
bool is_plain(const View& x, const Norm& norm, DType type, int step) {
  return norm.kind == NormKind::kNone && x.dtype == type && aligned16(x, step);
}
// Not less than rows of E4M3 take.
size_t left_bytes(const View& x) { return static_cast<size_t>(x.rows) * packed_k(x.cols) * 2; }

cudaError_t prepare_left(QuantisedProduct& p, const View& x, const Norm& norm, Launch& at) {
  const bool quantised = p.w_scale != nullptr;
  p.m = x.rows;
  p.k = x.cols;
  if (is_plain(x, norm, quantised ? DType::kE4M3 : DType::kBF16, at.step)) {
    p.a = x.at<const void>(at.step);
    p.lda = x.ld;
    return cudaSuccess;
  }
  if (x.dtype == DType::kE4M3) return cudaErrorMisalignedAddress;
  if (left_bytes(x) > at.scratch_bytes) return cudaErrorMemoryAllocation;
  p.a = at.scratch;
  p.lda = quantised ? packed_k_e4m3(x.cols) : packed_k(x.cols);
  const int ld = static_cast<int>(p.lda);
  const cudaError_t error =
      quantised ? normalise_rows_e4m3(x, norm, reinterpret_cast<e4m3*>(at.scratch), ld, 1.0f / p.x_scale, at)
                : normalise_rows(x, norm, reinterpret_cast<bf16*>(at.scratch), ld, ld, at);
  at.pdl = true;
  return error;
}

void set_activation(Product& p, Act act) {
  p.activated = act != Act::kNone;
  p.act_linear = act == Act::kGeluTanh ? 0.7978845608028654f : 0.5f;
  p.act_cubic = act == Act::kGeluTanh ? 0.035677408136300125f : 0.0f;
}

void set_weight(QuantisedProduct& p, const Weight& w, float x_scale) {
  p.w = w.data;
  p.n = packed_rows(w.packing, w.n);
  if (w.dtype != DType::kE4M3) {
    p.ldw = packed_k(w.k);
    return;
  }
  p.ldw = packed_k_e4m3(w.k);
  p.w_scale = reinterpret_cast<const float*>(static_cast<const std::byte*>(w.data) + scales_at(p.n, w.k));
  p.x_scale = x_scale;
}

// Where a Linear or a GatedLinear writes.
void set_out(QuantisedProduct& p, const View& out, float out_scale, int step) {
  p.out = out.at<void>(step);
  p.ldo = out.ld;
  p.cols = out.cols;
  p.out_f32 = out.dtype == DType::kF32;
  const int piece = out.dtype == DType::kE4M3 ? 16 : 8;  // columns of 16 bytes
  if (out.dtype == DType::kE4M3) p.out_inverse = 1.0f / out_scale;
  p.wide = !p.out_f32 && p.cols % piece == 0 && aligned16(out, step);
}

cudaError_t run(const QuantisedProduct& p, const Launch& at) {
  if (p.w_scale) {
    return at.arch == 90 ? product_e4m3(p, choose_tile_e4m3(p, at.sms), at) : cudaErrorNotSupported;
  }
  if (at.arch == 90) return product_sm90(p, choose_tile_sm90(p, at.sms), at);
  return product_sm80(p, at);
}

const float* floats(const View& v, int step) { return v ? v.at<const float>(step) : nullptr; }

const View* left_of(const Op& op, const Norm** norm) {
  return std::visit(
      [&](const auto& o) -> const View* {
        using T = std::decay_t<decltype(o)>;
        if constexpr (std::is_same_v<T, Linear> || std::is_same_v<T, GatedLinear> || std::is_same_v<T, Qkv>) {
          *norm = &o.norm;
          return &o.x;
        } else {
          return nullptr;
        }
      },
      op);
}

}  // namespace

size_t packed_bytes_large(Packing packing, const std::vector<int>& n, int k) {
  return static_cast<size_t>(packed_rows(packing, n)) * packed_k(k) * sizeof(bf16);
}

cudaError_t pack_large(void* to, Packing packing, const std::vector<RawMatrix>& parts, cudaStream_t stream) {
  int at = 0;
  for (const RawMatrix& part : parts) {
    const bool interleaved = packing == Packing::kInterleaved;
    const int rows = interleaved ? gated_rows(part.n) : part.n, ld = packed_k(part.k);
    const int64_t work = static_cast<int64_t>(rows) * ld;
    pack_kernel<<<static_cast<unsigned>((work + 255) / 256), 256, 0, stream>>>(
        static_cast<bf16*>(to), ld, at, rows, interleaved ? 32 : 0, part.data, part.dtype == DType::kF32,
        part.n, part.k, part.ld);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    at += interleaved ? 32 : rows;
  }
  return cudaSuccess;
}

size_t packed_bytes_e4m3(Packing packing, const std::vector<int>& n, int k) {
  const int rows = packed_rows(packing, n);
  return scales_at(rows, k) + rows * sizeof(float);
}

cudaError_t pack_e4m3(void* to, Packing packing, const std::vector<RawMatrix>& parts, cudaStream_t stream) {
  std::vector<int> n;
  for (const RawMatrix& part : parts) n.push_back(part.n);
  const int ld = packed_k_e4m3(parts.at(0).k);
  auto* scales = reinterpret_cast<float*>(static_cast<std::byte*>(to) +
                                          scales_at(packed_rows(packing, n), parts.at(0).k));
  int at = 0;
  for (const RawMatrix& part : parts) {
    const bool interleaved = packing == Packing::kInterleaved;
    const int rows = interleaved ? gated_rows(part.n) : part.n;
    pack_e4m3_kernel<<<static_cast<unsigned>(rows), 256, 0, stream>>>(
        static_cast<e4m3*>(to), scales, ld, at, interleaved ? 32 : 0, part.data, part.dtype == DType::kF32,
        part.n, part.k, part.ld);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    at += interleaved ? 32 : rows;
  }
  return cudaSuccess;
}

cudaError_t make_product(const Linear& op, Launch& at, QuantisedProduct* made) {
  QuantisedProduct p;
  p.kind = ProductKind::kLinear;
  set_weight(p, op.w, op.x_scale);
  set_out(p, op.out, op.out_scale, at.step);
  set_activation(p, op.act);
  p.scale = op.scale;
  p.bias = floats(op.bias, at.step);
  p.has_bias = p.bias != nullptr;
  p.gate = floats(op.gate, at.step);
  if (op.residual) {
    p.residual = op.residual.at<const bf16>(at.step);
    p.ldr = op.residual.ld;
    p.residual_rows = op.residual.rows;
    p.wide = p.wide && aligned16(op.residual, at.step);
  }
  const cudaError_t error = prepare_left(p, op.x, op.norm, at);
  *made = p;
  return error;
}

cudaError_t make_product(const GatedLinear& op, Launch& at, QuantisedProduct* made) {
  QuantisedProduct p;
  p.kind = ProductKind::kGated;
  set_weight(p, op.w, op.x_scale);
  set_out(p, op.out, op.out_scale, at.step);
  set_activation(p, op.act);
  const cudaError_t error = prepare_left(p, op.x, op.norm, at);
  *made = p;
  return error;
}

cudaError_t make_product(const Qkv& op, Launch& at, QuantisedProduct* made) {
  QuantisedProduct p;
  p.kind = ProductKind::kQkv;
  set_weight(p, op.w, op.x_scale);
  p.head_dim = op.head_dim;
  p.wide = true;
  const View* const parts[3] = {&op.q, &op.k, &op.v};
  const View* const biases[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
  int end = 0;
  for (int i = 0; i < 3; ++i) {
    if (*parts[i]) {
      p.part[i] = parts[i]->at<bf16>(at.step);
      p.part_ld[i] = parts[i]->ld;
      p.part_bias[i] = floats(*biases[i], at.step);
      p.has_bias = p.has_bias || p.part_bias[i];
      p.wide = p.wide && parts[i]->cols % 8 == 0 && aligned16(*parts[i], at.step);
      end += parts[i]->cols;
    }
    p.end[i] = end;
  }
  if (op.rope) {
    // The kernel reads pairs of the table and positions one after another.
    p.rotate = op.head_dim % 64 == 0 && op.rope.ld % 2 == 0 && op.positions.ld == 1 &&
               reinterpret_cast<uintptr_t>(op.rope.at<float>(at.step)) % 8 == 0;
    p.rope = floats(op.rope, at.step);
    p.rope_ld = op.rope.ld;
    p.rope_rows = op.rope.rows;
    p.positions = op.positions.at<const int>(at.step);
  }
  const cudaError_t error = prepare_left(p, op.x, op.norm, at);
  *made = p;
  return error;
}

cudaError_t launch_large(const Linear& op, const Launch& launch) {
  Launch at = launch;
  QuantisedProduct p;
  const cudaError_t error = make_product(op, at, &p);
  return error != cudaSuccess ? error : run(p, at);
}

cudaError_t launch_large(const GatedLinear& op, const Launch& launch) {
  Launch at = launch;
  QuantisedProduct p;
  const cudaError_t error = make_product(op, at, &p);
  return error != cudaSuccess ? error : run(p, at);
}

cudaError_t launch_large(const Qkv& op, const Launch& launch) {
  Launch at = launch;
  QuantisedProduct p;
  cudaError_t error = make_product(op, at, &p);
  if (error == cudaSuccess) error = run(p, at);
  if (op.rope && !p.rotate) {
    at.pdl = true;
    for (const View* part : {&op.q, &op.k}) {
      if (*part && error == cudaSuccess) error = rotate_heads(*part, op.head_dim, op.rope, op.positions, at);
    }
  }
  return error;
}

size_t scratch_large(const Op& op, int sms) {
  (void)sms;
  const Norm* norm = nullptr;
  const View* x = left_of(op, &norm);
  // At another step of a loop a view may lie on another boundary: whether a copy is needed is not asked here.
  return x ? left_bytes(*x) : 0;
}

std::string refuse_large(const Op& op) {
  if (const auto* o = std::get_if<Linear>(&op)) {
    if (o->residual && o->residual.dtype != DType::kBF16)
      return "residual: expected bfloat16, got another type";
  }
  if (const auto* o = std::get_if<Qkv>(&op)) {
    for (const View* v : {&o->q, &o->k, &o->v}) {
      if (*v && v->dtype != DType::kBF16) return "q, k, v: expected bfloat16, got another type";
    }
    if (o->rope && o->head_dim % 2)
      return "rotary embedding: expected an even head size, got " + std::to_string(o->head_dim);
  }
  if (const auto* o = std::get_if<Attention>(&op)) {
    for (const View* v : {&o->q, &o->k, &o->v}) {
      if (v->dtype != DType::kBF16) return "attention: expected bfloat16, got another type";
    }
    if (o->out.dtype != DType::kBF16 && o->out.dtype != DType::kE4M3)
      return "attention: expected a bfloat16 or E4M3 out, got another type";
    if (o->head_dim > 256)
      return "attention: expected heads of up to 256, got " + std::to_string(o->head_dim);
  }
  if (const auto* o = std::get_if<SpaceToDepth>(&op)) {
    if (o->out.dtype != DType::kBF16 && o->out.dtype != DType::kE4M3)
      return "space_to_depth: expected a bfloat16 or E4M3 out, got another type";
  }
  return "";
}

}  // namespace vla::cuda
