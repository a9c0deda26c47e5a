// The operations that are small products: what each asks of the kernel in product.cu, and how the work is
// split.
#include "product.cuh"

namespace vla::cuda {

namespace small {

namespace {

// Time of a split in cycles of a multiprocessor, roughly: what is read and multiplied by one thread block,
// the reductions, and rounds of blocks. Constants are an H200's; what matters is their proportion.
float cost(const Args& a, const Launch& at) {
  const int mt = row_tiles(a), wn = a.wn, split = a.split, tiles = a.tiles;
  const Shape s = shape_of(mt, a.own, wn, split, tiles);
  const int blocks = ceil_div(a.blocks, wn) * split;
  const int per_sm = s.bytes <= 112 * 1024 && mt <= 7 ? 2 : 1;
  const float rounds = static_cast<float>(ceil_div(blocks, at.sms * per_sm));
  const float shared = static_cast<float>(ceil_div(blocks, at.sms));  // blocks that share a multiprocessor
  const float steps = static_cast<float>(ceil_div(tiles, kWarps / wn));
  const float x = static_cast<float>(s.rows * tiles * 32) / 40.0f;
  const float weights = static_cast<float>(wn * tiles * 1024) / 18.0f;
  const float products = steps * static_cast<float>(2 * mt * 2) * 8.0f + 200.0f;
  const float partial = static_cast<float>(kWarps * s.rows * 128 * 2) / 128.0f;
  const float exchange = split > 1 ? 700.0f + static_cast<float>(s.rows * wn * 128) / 24.0f : 0.0f;
  const float finish = static_cast<float>(s.own * wn * 32) / 40.0f * static_cast<float>(split + 6) / 4.0f;
  const float work = weights > products ? weights : products;
  return (rounds > shared ? rounds : shared) * (x + work) + partial + exchange + finish;
}

bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && bytes % 16 == 0;
}

const float* row_of(const View& v, int step) { return v ? v.at<const float>(step) : nullptr; }

// What the operations have in common; x, and everything that goes by its rows, from row `row0` on.
Args common(const View& x, const Norm& norm, const Weight& w, int step, int row0, int rows) {
  Args a;
  const int64_t size = static_cast<int64_t>(size_of(x.dtype));
  a.x = x.at<std::byte>(step) + row0 * x.ld * size;
  a.ldx = x.ld;
  a.m = rows;
  a.row0 = row0;
  a.k = x.cols;
  a.x_f32 = x.dtype == DType::kF32;
  a.x_whole = !a.x_f32 && x.cols % 8 == 0 && aligned(a.x, x.ld * size);
  a.norm = norm.kind;
  a.eps = norm.eps, a.plus = norm.plus;
  a.norm_weight = row_of(norm.weight, step), a.norm_bias = row_of(norm.bias, step);
  a.norm_vector = x.cols % 8 == 0 && aligned(a.norm_weight, 0) && aligned(a.norm_bias, 0);
  a.w = static_cast<const uint4*>(w.data);
  a.k_tiles = ceil_div(w.k, 16);
  for (int part : w.n) a.blocks += ceil_div(part, w.packing == Packing::kStacked ? 32 : 16);
  if (w.packing == Packing::kInterleaved) a.blocks /= 2;
  return a;
}

void* row_at(const View& v, int step, int row) {
  return v.at<std::byte>(step) + row * v.ld * static_cast<int64_t>(size_of(v.dtype));
}

}  // namespace

bool rotates(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }

int row_tiles(const Args& a) {
  const int rows = a.m + (a.norm == NormKind::kRms && a.norm_bias != nullptr ? 1 : 0);
  return rows <= 16 ? 2 : rows <= 32 ? 4 : rows <= 56 ? 7 : 9;
}

bool set_split(Args& a, int wn, int split, const Launch& at) {
  a.wn = wn, a.split = split, a.tiles = ceil_div(a.k_tiles, split);
  a.own = ceil_div(a.m, split), a.own_inverse = ceil_div(65536, a.own);
  if (a.half > 0 && wn < 2) return false;
  if (ceil_div(a.k_tiles, a.tiles) != split || (split > 1 && at.arch < 90)) return false;
  const int largest = at.arch == 90 || at.arch == 100 ? 227 * 1024 : at.arch == 80 ? 163 * 1024 : 99 * 1024;
  return shape_of(row_tiles(a), a.own, wn, split, a.tiles).bytes <= largest;
}

bool choose_split(Args& a, const Launch& at) {
  float best = INFINITY;
  int best_wn = 0, best_split = 0;
  for (int wn = 1; wn <= kMaxWn; wn *= 2) {
    for (int split = 1; split <= kMaxCluster; ++split) {
      if (!set_split(a, wn, split, at)) continue;
      if (const float c = cost(a, at); c < best) best = c, best_wn = wn, best_split = split;
    }
  }
  return best_wn > 0 && set_split(a, best_wn, best_split, at);
}

Args arguments(const Linear& op, int step, int row0, int rows) {
  Args a = common(op.x, op.norm, op.w, step, row0, rows);
  a.mode = Mode::kLinear;
  a.part[0] = {row_at(op.out, step, row0), row_of(op.bias, step), op.out.ld, 0, op.out.cols};
  a.out_f32 = op.out.dtype == DType::kF32;
  if (op.residual) {
    a.residual = op.residual.at<std::byte>(step);
    a.ld_residual = op.residual.ld, a.residual_rows = op.residual.rows;
    a.residual_f32 = op.residual.dtype == DType::kF32;
  }
  a.gate = row_of(op.gate, step);
  a.act = op.act, a.scale = op.scale;
  return a;
}

Args arguments(const GatedLinear& op, int step, int row0, int rows) {
  Args a = common(op.x, op.norm, op.w, step, row0, rows);
  a.mode = Mode::kGated;
  a.part[0] = {row_at(op.out, step, row0), nullptr, op.out.ld, 0, op.out.cols};
  a.out_f32 = op.out.dtype == DType::kF32;
  a.act = op.act;
  return a;
}

Args arguments(const Qkv& op, int step, int row0, int rows) {
  Args a = common(op.x, op.norm, op.w, step, row0, rows);
  a.mode = Mode::kQkv;
  a.parts = 0;
  const View* views[3] = {&op.q, &op.k, &op.v};
  const View* biases[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
  int block = 0;
  for (int i = 0; i < 3; ++i) {
    const View& v = *views[i];
    if (!v) continue;
    a.part[a.parts++] = {row_at(v, step, row0), row_of(*biases[i], step), v.ld, block, v.cols};
    block += ceil_div(v.cols, kBlockRows);
    a.out_f32 = v.dtype == DType::kF32;
    if (op.rope && i < 2) a.rotate = a.parts;
  }
  if (a.rotate > 0) {
    a.half = op.head_dim / 64;
    while (2 << a.half_shift <= a.half) ++a.half_shift;
    a.rope = op.rope.at<const float>(step), a.ld_rope = op.rope.ld, a.rope_rows = op.rope.rows;
    a.positions = static_cast<const int*>(row_at(op.positions, step, row0));
    a.ld_positions = op.positions.ld;
  }
  return a;
}

Args arguments(const Euler& op, int step, int row0, int rows) {
  Args a = common(op.h, op.norm, op.w, step, row0, rows);
  a.mode = Mode::kEuler;
  a.part[0] = {nullptr, row_of(op.bias, step), 0, 0, op.x.cols};
  a.sample = static_cast<float*>(row_at(op.x, step, row0)), a.ld_sample = op.x.ld;
  a.previous = static_cast<const float*>(row_at(op.previous, step, row0)), a.ld_previous = op.previous.ld;
  a.weight = static_cast<const float*>(row_at(op.weight, step, row0)), a.ld_weight = op.weight.ld;
  a.gain = row_of(op.gain, step), a.time = row_of(op.time, step);
  a.dt = op.dt;
  return a;
}

namespace {

// More rows than the kernel takes go in pieces.
template <typename O>
cudaError_t launch_by_rows(const O& op, int m, const Launch& at) {
  for (int row0 = 0; row0 < m; row0 += kSmallRows) {
    Args a = arguments(op, at.step, row0, m - row0 < kSmallRows ? m - row0 : kSmallRows);
    if (m <= kSmallRows) {
      a.squares_in = at.squares_in, a.square_parts = at.square_parts, a.squares_out = at.squares_out;
      a.shift = at.shift, a.norm_constant = at.norm_constant;
    }
    const bool sm90 = fits_sm90(a, at) && choose_split_sm90(a, at);
    if (!sm90 && !choose_split(a, at)) return cudaErrorInvalidConfiguration;
    if (const cudaError_t error = sm90 ? run_product_sm90(a, at) : run_product(a, at); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace small

int small_square_parts(const Linear& op, const Launch& at) {
  if (op.x.rows > kSmallRows || op.out.dtype != DType::kBF16) return 0;
  const small::Args a = small::arguments(op, at.step, 0, op.x.rows);
  const int parts = ceil_div(a.blocks, 2);
  return small::fits_sm90(a, at) && parts <= kSquareParts ? parts : 0;
}

int packed_rows_small(const Weight& w) {
  return static_cast<int>(packed_bytes_small(w.packing, w.n, w.k) /
                          (static_cast<size_t>(ceil_div(w.k, 16)) * 1024)) *
         32;
}

cudaError_t make_shift(const View& bias, int steps, const Weight& w, float* shift, const Launch& at) {
  // the weight as if it were one matrix of all its packed rows
  Linear op;
  op.x = bias;
  op.x.rows = steps;
  op.x.ld = bias.step_bytes != 0 ? bias.step_bytes / 4 : bias.cols;
  op.w = {w.data, w.dtype, Packing::kStacked, w.k, {packed_rows_small(w)}};
  op.out = {
      reinterpret_cast<std::byte*>(shift), steps, packed_rows_small(w), packed_rows_small(w), 0, DType::kF32};
  return launch_small(op, at);
}

cudaError_t launch_small(const Linear& op, const Launch& at) {
  return small::launch_by_rows(op, op.x.rows, at);
}
cudaError_t launch_small(const GatedLinear& op, const Launch& at) {
  return small::launch_by_rows(op, op.x.rows, at);
}
cudaError_t launch_small(const Qkv& op, const Launch& at) {
  if (!op.rope || small::rotates(op.head_dim)) return small::launch_by_rows(op, op.x.rows, at);
  Qkv plain = op;
  plain.rope = {};
  cudaError_t error = small::launch_by_rows(plain, op.x.rows, at);
  if (error == cudaSuccess && op.q) error = small::run_rotate(op.q, op, at);
  if (error == cudaSuccess && op.k) error = small::run_rotate(op.k, op, at);
  return error;
}
cudaError_t launch_small(const Euler& op, const Launch& at) {
  return small::launch_by_rows(op, op.h.rows, at);
}

}  // namespace vla::cuda
