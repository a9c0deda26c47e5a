// Checks everything in E4M3 against double precision on the same quantised operands, so that the kernels'
// error and the format's are told apart: fresh random inputs, odd sizes, every tile, poisoned memory. Usage:
// e4m3_check [quick | part parts]. One line a case; exit status 1 when one fails. The first lines are sums of
// small integers, which have to come out exactly: layout, scales, columns and masks show there, rounding does
// not. The last ones say what the matrix unit's 14 bits cost by k; they fail only where something else is
// wrong.
#include "e4m3_compare.cuh"
#include "promote.h"

namespace vla::check {

// e4m3_others.cu
void check_conversions();
void check_producers();

namespace {

// ---- products
struct LinearCase {
  int m, n, k;
  NormKind norm = NormKind::kNone;
  Act act = Act::kNone;
  bool bias = false, gate = false;
  int residual = 0;  // its rows
  float scale = 1;
  int pad = 8;
  DType x = DType::kBF16, out = DType::kBF16;
  bool in_place = false;
};
void check_linear(const std::string& how, const LinearCase& c, const Launch& at, const Run& run = nullptr) {
  if (!mine()) return;
  const bool codes = c.x == DType::kE4M3;
  Matrix x = Matrix::random(c.m, c.k, c.x, pad_of(c.x, c.k, c.pad), codes ? -448 : -1, codes ? 448 : 1);
  Matrix out = Matrix::empty(c.m, c.n, c.out, pad_of(c.out, c.n, c.pad));
  const PackedE4M3 w = random_pack(Packing::kStacked, {c.n}, c.k);
  NormCase norm = make_norm(c.norm, c.k);
  Linear op;
  op.x = x.view, op.norm = norm.norm, op.w = w.weight, op.act = c.act, op.scale = c.scale, op.out = out.view;
  op.x_scale = c.norm == NormKind::kNone ? 0.0023f : 0.011f;
  if (c.out == DType::kE4M3) op.out_scale = 0.0057f * std::max(1.0f, c.scale);
  Matrix bias, gate, residual;
  if (c.bias) op.bias = (bias = Matrix::random(1, c.n, DType::kF32, 1, -1, 1)).view;
  if (c.gate) op.gate = (gate = Matrix::random(1, c.n, DType::kF32, 1, -1, 1)).view;
  if (c.residual) op.residual = (residual = Matrix::random(c.residual, c.n, DType::kBF16, c.pad, -1, 1)).view;
  if (c.in_place) op.out = out.view = residual.view;
  launch_product(op, at, run);
  out.download();
  Result r;
  const auto columns = sample(c.n, c.m * c.n < 100000 ? c.n : 300);
  for (int i : sample(c.m, 24)) {
    const auto given = normed(norm, x, i);
    const auto row = codes ? given : quantised(given, op.x_scale);
    for (int j : columns) {
      double y = activated(c.scale * (op.x_scale * w.at(0, j, row) + (c.bias ? bias.at(0, j) : 0)), c.act);
      if (c.gate) y *= gate.at(0, j);
      if (c.residual) y += residual.at(i % c.residual, j);
      add(r, out, i, j, y, op.out_scale);
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "linear %s m=%d n=%d k=%d norm=%s act=%s%s%s res=%d pad=%d %s>%s",
                how.c_str(), c.m, c.n, c.k, kNorms[int(c.norm)], kActs[int(c.act)], c.bias ? " bias" : "",
                c.gate ? " gate" : "", c.residual, c.pad, type_name(c.x), type_name(c.out));
  report(name, r, {&out}, limit_of(c.k));
  if (!c.in_place) report_bits(name, same_bits(op, out, at, run));
  release_all();
}

struct GatedCase {
  int m, n, k;
  NormKind norm = NormKind::kRms;
  Act act = Act::kSilu;
  DType out = DType::kE4M3;
  int pad = 8;
};
void check_gated(const std::string& how, const GatedCase& c, const Launch& at, const Run& run = nullptr) {
  if (!mine()) return;
  Matrix x = Matrix::random(c.m, c.k, DType::kBF16, c.pad, -1, 1);
  Matrix out = Matrix::empty(c.m, c.n, c.out, pad_of(c.out, c.n, c.pad));
  const PackedE4M3 w = random_pack(Packing::kInterleaved, {c.n, c.n}, c.k);
  NormCase norm = make_norm(c.norm, c.k);
  GatedLinear op;
  op.x = x.view, op.out = out.view, op.norm = norm.norm, op.w = w.weight, op.act = c.act;
  op.x_scale = c.norm == NormKind::kNone ? 0.0023f : 0.011f;
  if (c.out == DType::kE4M3) op.out_scale = 0.0127f;
  launch_product(op, at, run);
  out.download();
  Result r;
  const auto columns = sample(c.n, c.m * c.n < 100000 ? c.n : 300);
  for (int i : sample(c.m, 24)) {
    const auto row = quantised(normed(norm, x, i), op.x_scale);
    for (int j : columns) {
      const double gate = op.x_scale * w.at(0, j, row), up = op.x_scale * w.at(1, j, row);
      add(r, out, i, j, activated(gate, c.act) * up, op.out_scale);
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "gated %s m=%d n=%d k=%d norm=%s act=%s pad=%d >%s", how.c_str(), c.m, c.n,
                c.k, kNorms[int(c.norm)], kActs[int(c.act)], c.pad, type_name(c.out));
  report(name, r, {&out}, 1.5 * limit_of(c.k));
  report_bits(name, same_bits(op, out, at, run));
  release_all();
}

struct QkvCase {
  int m, q, kv, d, k;  // heads of q (0: none) and of k and v
  NormKind norm = NormKind::kRms;
  bool rope = true, bias = false;
  int pad = 8;
};
void check_qkv(const std::string& how, const QkvCase& c, const Launch& at, const Run& run = nullptr) {
  if (!mine()) return;
  Matrix x = Matrix::random(c.m, c.k, DType::kBF16, c.pad, -1, 1);
  std::vector<int> n;
  if (c.q) n.push_back(c.q * c.d);
  n.insert(n.end(), {c.kv * c.d, c.kv * c.d});
  const PackedE4M3 w = random_pack(Packing::kStacked, n, c.k);
  NormCase norm = make_norm(c.norm, c.k);
  const int longest = 2 * c.m;
  Matrix rope = Matrix::random(longest, c.d, DType::kF32, 0, -1, 1);
  Matrix positions = Matrix::random(c.m, 1, DType::kI32, 0, 0, static_cast<float>(longest));
  Qkv op;
  op.x = x.view, op.norm = norm.norm, op.w = w.weight, op.head_dim = c.d;
  op.x_scale = 0.011f;
  if (c.rope) op.rope = rope.view, op.positions = positions.view;
  std::vector<Matrix> outs, biases;
  for (int rows : n) {
    outs.push_back(Matrix::empty(c.m, rows, DType::kBF16, c.pad));
    biases.push_back(Matrix::random(1, rows, DType::kF32, 0, -1, 1));
  }
  const int first = c.q ? 0 : 1;
  View* const views[3] = {&op.q, &op.k, &op.v};
  View* const bias_views[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
  for (size_t i = 0; i < n.size(); ++i) {
    *views[first + i] = outs[i].view;
    if (c.bias) *bias_views[first + i] = biases[i].view;
  }
  launch_product(op, at, run);
  Result r;
  for (Matrix& out : outs) out.download();
  for (int i : sample(c.m, 20)) {
    const auto row = quantised(normed(norm, x, i), op.x_scale);
    for (size_t part = 0; part < n.size(); ++part) {
      const auto value = [&](int j) {
        return op.x_scale * w.at(static_cast<int>(part), j, row) + (c.bias ? biases[part].at(0, j) : 0);
      };
      for (int j : sample(n[part], c.m * n[part] < 100000 ? n[part] : 200)) {
        double y = value(j);
        if (c.rope && first + part < 2) {
          const int e = j % c.d, half = c.d / 2, p = static_cast<int>(positions.at(i, 0));
          const double cos = rope.at(p, e % half), sin = rope.at(p, half + e % half);
          y = e < half ? y * cos - value(j + half) * sin : y * cos + value(j - half) * sin;
        }
        r.add(outs[part].at(i, j), y);
      }
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "qkv %s m=%d heads=%d/%d d=%d k=%d norm=%s%s%s pad=%d", how.c_str(), c.m,
                c.q, c.kv, c.d, c.k, kNorms[int(c.norm)], c.rope ? " rope" : "", c.bias ? " bias" : "",
                c.pad);
  std::vector<Matrix*> all;
  for (Matrix& out : outs) all.push_back(&out);
  report(name, r, all, limit_of(c.k));
  release_all();
}

// Sums of small integers: x in {-1, 0, 1}, but zeros in column 0, where W has the 448 that makes its scales
// 1; else W is -2, -1, 1 or 2. With no more than 10 bits a sum has to be right to the last one.
void check_exact(const std::string& how, int m, int n, int k, const Launch& at, const Run& run) {
  if (!mine()) return;
  Matrix x = Matrix::empty(m, k, DType::kE4M3, aligned_pad(k)), w = Matrix::empty(n, k, DType::kBF16, 0);
  const int steps[] = {-2, -1, 1, 2};
  for (int i = 0; i < m * k; ++i) x.values.push_back(i % k ? float(int(generator()() % 3) - 1) : 0.0f);
  for (int i = 0; i < n * k; ++i) w.values.push_back(i % k ? float(steps[generator()() >> 8 & 3]) : 448.0f);
  x.upload();
  w.upload();
  const Matrix weights = w;
  Matrix out = Matrix::empty(m, n, DType::kF32, 3);
  Linear op;
  op.x = x.view, op.x_scale = 1.0f, op.out = out.view;
  op.w = pack(Packing::kStacked, {w}).weight;
  launch_product(op, at, run);
  out.download();
  Result r;
  for (int i : sample(m, 40)) {
    for (int j : sample(n, 200)) {
      double sum = 0;
      for (int e = 1; e < k; ++e) sum += double(x.at(i, e)) * weights.at(j, e);
      r.add(out.at(i, j), sum);
    }
  }
  report("exact " + how + " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k),
         r, {&out}, 0.0);
  report_bits("exact " + how, same_bits(op, out, at, run));
  release_all();
}

// A NaN spoils its row and no other; what is too large becomes the largest.
void check_special(const Launch& at) {
  if (!mine()) return;
  const int m = 150, n = 192, k = 320;
  for (DType type : {DType::kBF16, DType::kE4M3}) {
    Matrix x = Matrix::random(m, k, type, aligned_pad(k), -1, 1);
    for (int i = 0; i < k; ++i) x.values[7 * k + i] = type == DType::kE4M3 ? 448.0f : 1e30f;
    x.values[3 * k + 100] = NAN;
    x.values[149 * k + 319] = NAN;
    x.upload();
    PackedE4M3 w = random_pack(Packing::kStacked, {n}, k);
    Matrix out = Matrix::empty(m, n, DType::kE4M3, 16), wide = Matrix::empty(m, n, DType::kBF16, 8);
    Linear op;
    op.x = x.view, op.w = w.weight, op.x_scale = 0.5f;
    op.out = out.view, op.out_scale = 1e-3f;
    launch_product(op, at, nullptr);
    op.out = wide.view, op.out_scale = 0.0f;
    launch_product(op, at, nullptr);
    out.download();
    wide.download();
    bool right = !out.touched_outside && !wide.touched_outside;
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        const bool nan = i == 3 || i == 149;
        right = right && std::isnan(out.at(i, j)) == nan && std::isnan(wide.at(i, j)) == nan;
        if (i == 7) {
          const std::vector<double> largest(k, 448.0);
          const double want = 0.5 * w.at(0, j, largest);
          right = right && std::fabs(wide.at(i, j) - want) <= 1e-2 * std::fabs(want) + 2;
          if (std::fabs(want) > 3) right = right && out.at(i, j) == (want > 0 ? 448.0f : -448.0f);
        }
      }
    }
    failures += !right;
    std::printf("%-4s NaN and saturation, x %s\n", right ? "ok" : "FAIL", type_name(type));
    release_all();
  }
}

// ---- all of it
// Every tile that there is, with splits, as a way to run a product.
void each_tile(const std::function<void(const std::string&, const Run&)>& use) {
  for (int groups = 1; groups <= 3; ++groups) {
    for (int columns = 64; columns <= 256; columns += 64) {
      for (int split : {1, 2, 3, 5, 8}) {
        const cuda::Tile tile{groups, columns, split};
        if (!cuda::has_tile_e4m3(tile) || (quick && split > 2)) continue;
        char how[60];
        std::snprintf(how, sizeof how, "%dx%d/%d", 64 * groups, columns, split);
        use(how, [tile](const cuda::QuantisedProduct& p, const Launch& l) {
          cuda::Tile t = tile;
          const int slices = (p.k + 127) / 128;
          if (t.split > slices) t.split = slices > 1 ? slices : 1;
          return cuda::product_e4m3(p, cuda::has_tile_e4m3(t) ? t : cuda::choose_tile_e4m3(p, l.sms), l);
        });
      }
    }
  }
  for (int promote : {1, 2, 4}) {
    use("128x128 promote " + std::to_string(promote),
        [promote](const cuda::QuantisedProduct& p, const Launch& l) {
          return product_promoted(promote, p, l);
        });
  }
}

void every_tile_exact(const Launch& at) {
  each_tile([&](const std::string& how, const Run& run) {
    check_exact(how, 70, 130, 64, at, run);
    check_exact(how, 200, 327, 1000, at, run);
    check_exact(how, 129, 77, 2064, at, run);
    if (!quick) check_exact(how, 300, 512, 16384, at, run);
  });
}

void every_tile(const Launch& at) {
  each_tile([&](const std::string& how, const Run& run) {
    const DType e4m3 = DType::kE4M3;
    check_linear(how, {.m = 200, .n = 336, .k = 200, .act = Act::kGeluTanh, .bias = true, .out = e4m3}, at,
                 run);
    check_linear(how, {.m = 70, .n = 77, .k = 591, .bias = true, .residual = 35, .scale = 3, .pad = 3}, at,
                 run);
    check_linear(how, {.m = 70, .n = 77, .k = 600, .bias = true, .x = e4m3, .out = e4m3}, at, run);
    check_linear(how,
                 {.m = 560, .n = 2048, .k = 2048, .gate = true, .residual = 560, .x = e4m3, .in_place = true},
                 at, run);
    check_gated(how, {.m = 177, .n = 200, .k = 960, .out = DType::kBF16}, at, run);
    check_gated(how, {.m = 177, .n = 208, .k = 960}, at, run);
    check_gated(how, {.m = 90, .n = 101, .k = 130, .norm = NormKind::kNone, .pad = 1}, at, run);
    check_qkv(how, {.m = 177, .q = 6, .kv = 2, .d = 64, .k = 192}, at, run);
    check_qkv(how, {.m = 130, .q = 3, .kv = 1, .d = 256, .k = 520}, at, run);
    check_qkv(
        how,
        {.m = 200, .q = 4, .kv = 4, .d = 72, .k = 136, .norm = NormKind::kLayer, .rope = false, .bias = true},
        at, run);
  });
}

// Sizes of the policies, and of the small ones of the tests.
void policies(const Launch& l) {
  const DType e4m3 = DType::kE4M3;
  const NormKind layer = NormKind::kLayer;
  const std::string how = "auto";
  check_linear(how, {.m = 2048, .n = 768, .k = 768, .bias = true, .residual = 1024, .x = e4m3}, l);
  check_linear(
      how, {.m = 2048, .n = 3072, .k = 768, .norm = layer, .act = Act::kGeluTanh, .bias = true, .out = e4m3},
      l);
  check_linear(how, {.m = 2048, .n = 768, .k = 3072, .bias = true, .residual = 2048, .x = e4m3}, l);
  check_linear(how, {.m = 128, .n = 960, .k = 12288, .scale = 30.98f, .x = e4m3}, l);
  check_linear(how, {.m = 64, .n = 960, .k = 12288, .scale = 30.98f}, l);
  check_linear(how, {.m = 512, .n = 1152, .k = 588, .bias = true, .residual = 256, .pad = 0}, l);
  check_linear(
      how, {.m = 512, .n = 4304, .k = 1152, .norm = layer, .act = Act::kGeluTanh, .bias = true, .out = e4m3},
      l);
  check_linear(how, {.m = 512, .n = 1152, .k = 4304, .bias = true, .residual = 512, .x = e4m3}, l);
  check_linear(how, {.m = 512, .n = 2048, .k = 1152, .norm = layer, .bias = true}, l);
  check_linear(how, {.m = 560, .n = 2048, .k = 16384, .residual = 560, .x = e4m3, .in_place = true}, l);
  check_gated(how, {.m = 560, .n = 16384, .k = 2048, .act = Act::kGeluTanh, .pad = 0}, l);
  check_gated(how, {.m = 177, .n = 2560, .k = 960, .pad = 0}, l);
  check_qkv(how, {.m = 560, .q = 8, .kv = 1, .d = 256, .k = 2048}, l);
  check_qkv(how, {.m = 560, .q = 0, .kv = 1, .d = 256, .k = 2048}, l);
  check_qkv(how, {.m = 177, .q = 15, .kv = 5, .d = 64, .k = 960}, l);
  check_qkv(how,
            {.m = 512, .q = 16, .kv = 16, .d = 72, .k = 1152, .norm = layer, .rope = false, .bias = true}, l);
  check_linear(how, {.m = 32, .n = 304, .k = 144, .norm = layer, .act = Act::kGeluTanh, .bias = true}, l);
  check_linear(how, {.m = 8, .n = 192, .k = 512, .scale = 13.9f, .pad = 0}, l);
  check_linear(how, {.m = 1, .n = 9, .k = 32, .bias = true, .x = DType::kF32, .out = DType::kF32}, l);
  check_linear(
      how, {.m = 90, .n = 33, .k = 2500, .norm = NormKind::kRms, .act = Act::kSilu, .residual = 90, .pad = 1},
      l);
  check_linear(how, {.m = 90, .n = 40, .k = 40, .norm = layer, .x = DType::kF32, .out = DType::kF32}, l);
  check_qkv(how, {.m = 20, .q = 4, .kv = 1, .d = 72, .k = 128, .bias = true, .pad = 3}, l);
  check_qkv(how, {.m = 20, .q = 2, .kv = 1, .d = 10, .k = 36}, l);
}

// Relative error of random sums by k: of the matrix unit alone, and with sums added up in float32 after every
// 4, 2 and 1 slices; float32 out, so that nothing else rounds.
void error_by_k(const Launch& at) {
  if (!mine()) return;
  std::printf("\nerror of sums by k; promoted after slices of 128:\n%8s %9s %9s %9s %9s\n", "k", "never", "4",
              "2", "1");
  for (int k : {64, 256, 1024, 2048, 4096, 8192, 16384}) {
    const int m = 128, n = 256;
    Matrix x = Matrix::random(m, k, DType::kE4M3, 0, -448, 448), out = Matrix::empty(m, n, DType::kF32, 0);
    const PackedE4M3 w = random_pack(Packing::kStacked, {n}, k);
    Linear op;
    op.x = x.view, op.w = w.weight, op.out = out.view, op.x_scale = 1 / 448.0f;
    std::vector<std::vector<double>> want(m);
    for (int i = 0; i < m; i += 4) {
      const std::vector<double> row(x.values.begin() + int64_t{i} * k, x.values.begin() + int64_t{i + 1} * k);
      for (int j = 0; j < n; j += 4) want[i].push_back(op.x_scale * w.at(0, j, row));
    }
    std::printf("%8d", k);
    for (int promote : {0, 4, 2, 1}) {
      launch_product(op, at, [&](const cuda::QuantisedProduct& p, const Launch& l) {
        return product_promoted(promote, p, l);
      });
      out.download();
      Result r;
      for (int i = 0; i < m; i += 4) {
        for (int j = 0; j < n; j += 4) r.add(out.at(i, j), want[i][j / 4]);
      }
      const double error = std::sqrt(r.error / r.norm);
      failures += !(error <= limit_of(k));
      std::printf(" %9.2e", error);
    }
    std::printf("\n");
    release_all();
  }
}

void check_everything() {
  const Launch at = base;
  check_conversions();
  every_tile_exact(at);
  check_special(at);
  if (quick) {
    check_linear("auto",
                 {.m = 300, .n = 336, .k = 700, .norm = NormKind::kLayer, .bias = true, .out = DType::kE4M3},
                 at);
    check_gated("auto", {.m = 177, .n = 2560, .k = 960}, at);
    check_qkv("auto", {.m = 177, .q = 15, .kv = 5, .d = 64, .k = 960}, at);
    check_qkv("auto", {.m = 130, .q = 3, .kv = 1, .d = 256, .k = 520}, at);
  } else {
    every_tile(at);
    policies(at);
  }
  check_producers();
  error_by_k(at);
}

}  // namespace
}  // namespace vla::check

int main(int count, char** arguments) {
  using namespace vla::check;
  quick = count == 2 && std::string(arguments[1]) == "quick";
  if (count > 2) {
    part = std::atoi(arguments[1]);
    parts = std::max(1, std::atoi(arguments[2]));
  }
  // The scratch must outlive release_all(): taken first, and not owned by it.
  base = launch_on(nullptr, 64 << 20);
  owned().clear();
  if (base.arch != 90) {
    std::printf("needs compute capability 9.0, got %d.%d\n", base.arch / 10, base.arch % 10);
    return 2;
  }
  check_everything();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
