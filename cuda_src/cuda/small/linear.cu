// The operations that are small products: what each asks of the kernel in product.cu, and how the work is split.
#include "product.cuh"

namespace vla::cuda {

namespace small {

cudaError_t run_product(const Args& a, int mt, const Launch& at);  // product.cu

namespace {

// Time of a split in cycles of a multiprocessor, roughly: what is read and multiplied by one thread block, the
// reductions, and rounds of blocks. Constants are an H200's; what matters is their proportion.
float cost(const Args& a, int mt, int wn, int split, int tiles, const Launch& at) {
  const Shape s = shape_of(mt, a.m, wn, split, tiles);
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

void choose_split(Args& a, int mt, const Launch& at) {
  float best = 1e30f;
  const int clusters = at.arch >= 90 ? kMaxCluster : 1;
  const int largest = at.arch >= 90 ? 227 * 1024 : at.arch == 80 ? 163 * 1024 : 99 * 1024;
  for (int wn = a.half > 0 ? 2 : 1; wn <= kWarps; wn *= 2) {
    for (int split = 1; split <= clusters; ++split) {
      const int tiles = ceil_div(a.k_tiles, split);
      if (ceil_div(a.k_tiles, tiles) != split || shape_of(mt, a.m, wn, split, tiles).bytes > largest) continue;
      const float c = cost(a, mt, wn, split, tiles, at);
      if (c < best) best = c, a.wn = wn, a.split = split, a.tiles = tiles;
    }
  }
  if (best == 1e30f) a.tiles = 0;
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
  a.x_vector = aligned(a.x, x.ld * size);
  a.norm = norm.kind;
  a.eps = norm.eps, a.plus = norm.plus;
  a.norm_weight = row_of(norm.weight, step), a.norm_bias = row_of(norm.bias, step);
  a.w = static_cast<const uint4*>(w.data);
  a.k_tiles = ceil_div(w.k, 16);
  for (int part : w.n) a.blocks += ceil_div(part, w.packing == Packing::kStacked ? 32 : 16);
  if (w.packing == Packing::kInterleaved) a.blocks /= 2;
  return a;
}

cudaError_t run(Args& a, const Launch& at) {
  const int rows = a.m + (a.norm == NormKind::kRms && a.norm_bias != nullptr ? 1 : 0);
  const int mt = rows <= 16 ? 2 : rows <= 32 ? 4 : rows <= 56 ? 7 : 9;
  choose_split(a, mt, at);
  return a.tiles > 0 ? run_product(a, mt, at) : cudaErrorInvalidConfiguration;
}

void* row_at(const View& v, int step, int row) {
  return v.at<std::byte>(step) + row * v.ld * static_cast<int64_t>(size_of(v.dtype));
}

// Calls f(row0, rows, first) for pieces of at most kSmallRows rows: only the first may overlap the kernel before.
template <typename F>
cudaError_t by_rows(int m, const Launch& at, F f) {
  for (int row0 = 0; row0 < m; row0 += kSmallRows) {
    if (const cudaError_t error = f(row0, m - row0 < kSmallRows ? m - row0 : kSmallRows, at); error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace small

cudaError_t launch_small(const Linear& op, const Launch& at) {
  return small::by_rows(op.x.rows, at, [&](int row0, int rows, const Launch& here) {
    small::Args a = small::common(op.x, op.norm, op.w, at.step, row0, rows);
    a.mode = small::Mode::kLinear;
    a.part[0] = {small::row_at(op.out, at.step, row0), small::row_of(op.bias, at.step), op.out.ld, 0, op.out.cols};
    a.out_f32 = op.out.dtype == DType::kF32;
    if (op.residual) {
      a.residual = op.residual.at<std::byte>(at.step);
      a.ld_residual = op.residual.ld, a.residual_rows = op.residual.rows;
      a.residual_f32 = op.residual.dtype == DType::kF32;
    }
    a.gate = small::row_of(op.gate, at.step);
    a.act = op.act, a.scale = op.scale;
    return small::run(a, here);
  });
}

cudaError_t launch_small(const GatedLinear& op, const Launch& at) {
  return small::by_rows(op.x.rows, at, [&](int row0, int rows, const Launch& here) {
    small::Args a = small::common(op.x, op.norm, op.w, at.step, row0, rows);
    a.mode = small::Mode::kGated;
    a.part[0] = {small::row_at(op.out, at.step, row0), nullptr, op.out.ld, 0, op.out.cols};
    a.out_f32 = op.out.dtype == DType::kF32;
    a.act = op.act;
    return small::run(a, here);
  });
}

cudaError_t launch_small(const Qkv& op, const Launch& at) {
  return small::by_rows(op.x.rows, at, [&](int row0, int rows, const Launch& here) {
    small::Args a = small::common(op.x, op.norm, op.w, at.step, row0, rows);
    a.mode = small::Mode::kQkv;
    a.parts = 0;
    const View* views[3] = {&op.q, &op.k, &op.v};
    const View* biases[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
    int block = 0;
    for (int i = 0; i < 3; ++i) {
      const View& v = *views[i];
      if (!v) continue;
      a.part[a.parts++] = {small::row_at(v, at.step, row0), small::row_of(*biases[i], at.step), v.ld, block, v.cols};
      block += ceil_div(v.cols, 32);
      a.out_f32 = v.dtype == DType::kF32;
      if (op.rope && i < 2) a.rotate = a.parts;
    }
    if (a.rotate > 0) {
      a.half = op.head_dim / 64;
      a.rope = op.rope.at<const float>(at.step), a.ld_rope = op.rope.ld;
      a.positions = static_cast<const int*>(small::row_at(op.positions, at.step, row0));
      a.ld_positions = op.positions.ld;
    }
    a.head_dim = op.head_dim;
    return small::run(a, here);
  });
}

cudaError_t launch_small(const Euler& op, const Launch& at) {
  return small::by_rows(op.h.rows, at, [&](int row0, int rows, const Launch& here) {
    small::Args a = small::common(op.h, op.norm, op.w, at.step, row0, rows);
    a.mode = small::Mode::kEuler;
    a.part[0] = {nullptr, small::row_of(op.bias, at.step), 0, 0, op.x.cols};
    a.sample = static_cast<float*>(small::row_at(op.x, at.step, row0)), a.ld_sample = op.x.ld;
    a.previous = static_cast<const float*>(small::row_at(op.previous, at.step, row0));
    a.ld_previous = op.previous.ld;
    a.weight = static_cast<const float*>(small::row_at(op.weight, at.step, row0)), a.ld_weight = op.weight.ld;
    a.gain = small::row_of(op.gain, at.step), a.time = small::row_of(op.time, at.step);
    a.dt = op.dt;
    return small::run(a, here);
  });
}

}  // namespace vla::cuda
