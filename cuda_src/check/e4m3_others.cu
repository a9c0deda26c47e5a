// The checks of E4M3 beside the products: conversion, norms, packing, and what writes E4M3 for a product to
// read.
#include "../cuda/large/rows.cuh"
#include "e4m3_compare.cuh"

namespace vla::check {
namespace {

// Every E4M3 number, every tie, their neighbours, infinities and NaN, in the two ways the norms' kernel
// converts.
void check_conversion(DType type) {
  if (!mine()) return;
  std::vector<float> values{0.0f, -0.0f, 448.1f, 464.0f, 1e30f, INFINITY, -INFINITY, NAN, 1e-10f, 0x1p-10f};
  for (int code = 0; code < 0x7e; ++code) {
    const float low = from_e4m3(code), high = from_e4m3(code + 1), tie = 0.5f * (low + high);
    for (float v : {low, high, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)}) {
      values.push_back(v);
      values.push_back(-v);
    }
  }
  while (values.size() % 64) values.push_back(uniform(-500, 500));
  const int cols = 64, rows = static_cast<int>(values.size()) / cols;
  Matrix x = Matrix::empty(rows, cols, type, 8), out = Matrix::empty(rows, cols, DType::kE4M3, 16);
  x.values = values;
  if (type == DType::kBF16) {
    for (float& v : x.values) v = std::isnan(v) ? v : from_bf16(to_bf16(v));
  }
  x.upload();
  CUDA_OK(cuda::normalise_rows_e4m3(x.view, {}, out.view.at<cuda::e4m3>(0), cols + 16, 1.0f, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.view.cols = cols + 16;  // the columns after the row become zeros
  out.download();
  int wrong = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols + 16; ++j) {
      const float want = j < cols ? from_e4m3(to_e4m3(x.at(i, j))) : 0.0f, got = out.at(i, j);
      wrong += !(std::isnan(want) ? std::isnan(got) : got == want);
    }
  }
  failures += wrong != 0;
  std::printf("%-4s conversion of %s: %d of %zu wrong\n", wrong ? "FAIL" : "ok", type_name(type), wrong,
              values.size());
  release_all();
}

void check_norm(int m, int k, NormKind kind, DType type, int pad) {
  if (!mine()) return;
  Matrix x = Matrix::random(m, k, type, pad, -1, 1);
  NormCase norm = make_norm(kind, k);
  const int ld = (k + 15) / 16 * 16;
  Matrix out = Matrix::empty(m, ld, DType::kE4M3, 0);
  CUDA_OK(cuda::normalise_rows_e4m3(x.view, norm.norm, out.view.at<cuda::e4m3>(0), ld, 1 / 0.011f, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.download();
  Result r;
  for (int i : sample(m, 40)) {
    const auto v = normed(norm, x, i);
    for (int j = 0; j < ld; ++j) add_code(r, out.at(i, j), j < k ? v[j] / 0.011f : 0.0);
  }
  report("norm m=" + std::to_string(m) + " k=" + std::to_string(k) + " " + kNorms[int(kind)] + " of " +
             type_name(type),
         r, {&out}, 1e-5);
  release_all();
}

// The packed bytes and scales, as the host packs them: every one, but for what lies beyond k in a row whose
// scale is NaN. The device has 0 / NaN there; nothing reads it, as a product's copies end at k, and all of
// that row is NaN anyway.
void check_pack(Packing packing, int n, int k, DType type) {
  if (!mine()) return;
  const bool gated = packing == Packing::kInterleaved;
  std::vector<Matrix> parts;
  for (int i = 0; i < (gated ? 2 : 3); ++i) {
    parts.push_back(Matrix::random(gated ? n : n + i, k, type, 5, -1, 1));
    Matrix& m = parts.back();
    if (i == 1) {
      for (int e = 0; e < k; ++e) m.values[2 * k + e] = 0.0f;
      m.values[4 * k + 1] = NAN;
      m.values[5 * k + 1] = INFINITY;
      m.upload();
    }
  }
  const PackedE4M3 p = pack(packing, parts);
  const int ld = (k + 15) / 16 * 16, block = (n + 31) / 32 * 32;
  int rows = 0;
  for (const Matrix& m : parts) rows += gated ? block : m.view.rows;
  std::vector<uint8_t> bytes(cuda::packed_bytes_e4m3(packing, p.weight.n, k));
  CUDA_OK(cudaMemcpy(bytes.data(), p.weight.data, bytes.size(), cudaMemcpyDeviceToHost));
  const size_t scales_at = bytes.size() - rows * sizeof(float);
  int wrong = scales_at < static_cast<size_t>(rows) * ld || scales_at % 256 != 0;
  int first = 0;
  for (size_t part = 0; part < parts.size(); ++part) {
    const int real = parts[part].view.rows;
    for (int row = 0; row < (gated ? block : real); ++row) {
      const int packed = gated ? row / 32 * 64 + 32 * static_cast<int>(part) + row % 32 : first + row;
      float scale;
      std::memcpy(&scale, bytes.data() + scales_at + 4 * packed, 4);
      const float want_scale = row < real ? p.scales[part][row] : 1.0f;
      wrong += !(std::isnan(want_scale) ? std::isnan(scale) : scale == want_scale);
      for (int col = 0; col < (std::isnan(want_scale) ? k : ld); ++col) {
        const float got = from_e4m3(bytes[static_cast<size_t>(packed) * ld + col]);
        const float want = row < real && col < k ? p.codes[part][static_cast<size_t>(row) * k + col] : 0.0f;
        wrong += !(std::isnan(want) ? std::isnan(got) : got == want);
      }
    }
    first += real;
  }
  failures += wrong != 0;
  std::printf("%-4s packing %s n=%d k=%d of %s: %d wrong\n", wrong ? "FAIL" : "ok",
              gated ? "gated" : "stacked", n, k, type_name(type), wrong);
  release_all();
}

struct AttentionCase {
  int m, n, heads, kv, d;
  int batch = 1;
  bool blocks = false;
  int pad = 8;
};
void check_attention(const std::string& how, const AttentionCase& c, const Launch& at) {
  if (!mine()) return;
  Matrix q = Matrix::random(c.batch * c.m, c.heads * c.d, DType::kBF16, c.pad, -2, 2);
  Matrix k = Matrix::random(c.batch * c.n, c.kv * c.d, DType::kBF16, c.pad, -2, 2);
  Matrix v = Matrix::random(c.batch * c.n, c.kv * c.d, DType::kBF16, c.pad, -1, 1);
  Matrix out = Matrix::empty(c.batch * c.m, c.heads * c.d, DType::kE4M3, aligned_pad(c.heads * c.d));
  Matrix qb = Matrix::random(c.m, 1, DType::kI32, 0, -1, 4),
         kb = Matrix::random(c.n, 1, DType::kI32, 0, 0, 5);
  Attention op;
  op.q = q.view, op.k = k.view, op.v = v.view, op.out = out.view, op.head_dim = c.d, op.batch = c.batch;
  op.out_scale = 0.0021f;
  if (c.blocks) op.q_block = qb.view, op.k_block = kb.view;
  launch_product(op, at, nullptr);
  out.download();
  Result r;
  for (int row : sample(c.batch * c.m, 40)) {
    const int b = row / c.m, i = row % c.m;
    for (int h : sample(c.heads, 4)) {
      const int g = h / (c.heads / c.kv);
      std::vector<double> p(c.n);
      double top = -1e300, total = 0;
      for (int j = 0; j < c.n; ++j) {
        p[j] = -1e300;
        if (c.blocks && kb.at(j, 0) > qb.at(i, 0)) continue;
        double sum = 0;
        for (int e = 0; e < c.d; ++e) sum += double(q.at(row, h * c.d + e)) * k.at(b * c.n + j, g * c.d + e);
        top = std::max(top, p[j] = sum / std::sqrt(double(c.d)));
      }
      for (double& e : p) total += e = e == -1e300 ? 0 : std::exp(e - top);
      for (int e = 0; e < c.d; ++e) {
        double sum = 0;
        for (int j = 0; j < c.n; ++j) sum += p[j] * v.at(b * c.n + j, g * c.d + e);
        add_code(r, out.at(row, h * c.d + e), total > 0 ? sum / total / op.out_scale : 0);
      }
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "attention %s m=%d n=%d heads=%d/%d d=%d batch=%d%s", how.c_str(), c.m,
                c.n, c.heads, c.kv, c.d, c.batch, c.blocks ? " blocks" : "");
  report(name, r, {&out}, 6e-3);
  report_bits(name, same_bits(op, out, at, nullptr));
  release_all();
}

void check_space_to_depth(int batch, int grid, int f, int d, NormKind kind) {
  if (!mine()) return;
  Matrix x = Matrix::random(batch * grid * grid, d, DType::kBF16, 8, -1, 1);
  const int rows = batch * grid * grid / (f * f), cols = d * f * f;
  Matrix out = Matrix::empty(rows, cols, DType::kE4M3, aligned_pad(cols));
  NormCase norm = make_norm(kind, d);
  SpaceToDepth op;
  op.x = x.view, op.out = out.view, op.norm = norm.norm, op.factor = f, op.height = op.width = grid;
  op.out_scale = 0.011f;
  CUDA_OK(cuda::launch(op, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.download();
  Result r;
  for (int row = 0; row < x.view.rows; ++row) {
    const auto v = normed(norm, x, row);
    const int b = row / (grid * grid), y = row / grid % grid, xx = row % grid;
    const int to = (b * (grid / f) + y / f) * (grid / f) + xx / f, at = (y % f * f + xx % f) * d;
    for (int c = 0; c < d; ++c) add_code(r, out.at(to, at + c), v[c] / op.out_scale);
  }
  report("space_to_depth grid=" + std::to_string(grid) + " d=" + std::to_string(d), r, {&out}, 1e-5);
  release_all();
}

// E4M3 patches against those in float32, of the same pictures.
void check_patches(int size, int patch) {
  if (!mine()) return;
  Matrix frames = Matrix::random(2, 60 * 50 * 3, DType::kU8, 0, 0, 256);
  Matrix geometry = Matrix::empty(2, 8, DType::kI32, 0);
  geometry.values = {50, 40, 120, float(size),     float(size - 3), 0, 3, 1,
                     60, 50, 150, float(size - 2), float(size),     2, 0, 1};
  geometry.upload();
  const int rows = 2 * (size / patch) * (size / patch), cols = 3 * patch * patch;
  Matrix out = Matrix::empty(rows, cols, DType::kE4M3, aligned_pad(cols)),
         wide = Matrix::empty(rows, cols, DType::kF32, 3);
  ImagePatches op;
  op.frames = frames.view, op.geometry = geometry.view, op.height = op.width = size, op.patch = patch;
  op.out = wide.view;
  CUDA_OK(cuda::launch(op, base));
  op.out = out.view, op.out_scale = 1 / 448.0f;
  CUDA_OK(cuda::launch(op, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.download();
  wide.download();
  Result r;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) add_code(r, out.at(i, j), double(wide.at(i, j)) * 448);
  }
  report("image_patches " + std::to_string(size) + " patch " + std::to_string(patch), r, {&out, &wide}, 1e-5);
  release_all();
}

void attentions(const Launch& l, const std::string& how) {
  check_attention(how, {.m = 1024, .n = 1024, .heads = 12, .kv = 12, .d = 64, .batch = 2}, l);
  check_attention(how, {.m = 256, .n = 256, .heads = 16, .kv = 16, .d = 72, .batch = 2, .pad = 0}, l);
  check_attention(how, {.m = 177, .n = 177, .heads = 15, .kv = 5, .d = 64, .blocks = true}, l);
  check_attention(how, {.m = 560, .n = 560, .heads = 8, .kv = 1, .d = 256, .blocks = true, .pad = 0}, l);
  check_attention(how, {.m = 70, .n = 33, .heads = 2, .kv = 1, .d = 128, .batch = 3, .blocks = true}, l);
  check_attention(how, {.m = 65, .n = 70, .heads = 2, .kv = 2, .d = 36, .batch = 2, .pad = 1}, l);
  check_attention(how, {.m = 16, .n = 16, .heads = 2, .kv = 2, .d = 72, .batch = 2}, l);
  check_attention(how, {.m = 3, .n = 1, .heads = 1, .kv = 1, .d = 200, .blocks = true}, l);
}

}  // namespace

void check_conversions() {
  for (DType type : {DType::kF32, DType::kBF16}) {
    check_conversion(type);
    check_pack(Packing::kStacked, 70, 591, type);
    check_pack(Packing::kInterleaved, 101, 70, type);
    check_norm(100, 591, NormKind::kLayer, type, 3);
    check_norm(177, 960, NormKind::kRms, type, 8);
    check_norm(60, 2048, NormKind::kRms, type, 8);
    check_norm(30, 12288, NormKind::kNone, type, 8);
    check_norm(512, 588, NormKind::kNone, type, 0);
  }
}

void check_producers() {
  attentions(base, "auto");
  Launch old = base;
  old.arch = 86;
  if (!quick) attentions(old, "sm86");
  check_space_to_depth(2, 32, 4, 768, NormKind::kLayer);
  check_space_to_depth(2, 6, 2, 129, NormKind::kRms);
  check_patches(64, 16);
  check_patches(56, 14);
}

}  // namespace vla::check
