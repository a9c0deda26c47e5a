// Checks every large kernel against double precision on fresh random inputs, odd sizes included, in poisoned
// memory. Usage: large_check [part parts]: only every parts-th case. One line a case; exit status 1 when one
// fails.
#include <functional>

#include "../cuda/large/product.cuh"
#include "compare.cuh"

namespace vla::check {
namespace {

using Run = std::function<cudaError_t(const cuda::Product&, const Launch&)>;

// How a product is run: nullptr means by the launcher; otherwise what make_product makes goes to `run`.
template <typename T>
void launch_product(const T& op, const Launch& launch, const Run& run) {
  if (!run) {
    CUDA_OK(cuda::launch_large(op, launch));
  } else {
    Launch at = launch;
    cuda::QuantisedProduct p;
    CUDA_OK(cuda::make_product(op, at, &p));
    CUDA_OK(run(p, at));
  }
  CUDA_OK(cudaDeviceSynchronize());
}

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
  Matrix x = Matrix::random(c.m, c.k, c.x, c.pad, -1, 1), out = Matrix::empty(c.m, c.n, c.out, c.pad);
  Packed w = random_weight(Packing::kStacked, {c.n}, c.k);
  NormCase norm = make_norm(c.norm, c.k);
  Linear op;
  op.x = x.view;
  op.norm = norm.norm;
  op.w = w.weight;
  op.act = c.act;
  op.scale = c.scale;
  op.out = out.view;
  Matrix bias, gate, residual;
  if (c.bias) op.bias = (bias = Matrix::random(1, c.n, DType::kF32, 1, -1, 1)).view;
  if (c.gate) op.gate = (gate = Matrix::random(1, c.n, DType::kF32, 1, -1, 1)).view;
  if (c.residual) op.residual = (residual = Matrix::random(c.residual, c.n, DType::kBF16, c.pad, -1, 1)).view;
  if (c.in_place) {
    op.out = residual.view;
    out.view = residual.view;
  }
  launch_product(op, at, run);
  out.download();
  Result r;
  const auto columns = sample(c.n, c.m * c.n < 100000 ? c.n : 300);
  for (int i : sample(c.m, 24)) {
    const auto row = normed(norm, x, i);
    for (int j : columns) {
      double y = activated(c.scale * (dot(row, w.parts[0], j) + (c.bias ? bias.at(0, j) : 0)), c.act);
      if (c.gate) y *= gate.at(0, j);
      if (c.residual) y += residual.at(i % c.residual, j);
      r.add(out.at(i, j), y);
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "linear %s m=%d n=%d k=%d norm=%s act=%s%s%s res=%d pad=%d%s%s",
                how.c_str(), c.m, c.n, c.k, kNorms[int(c.norm)], kActs[int(c.act)], c.bias ? " bias" : "",
                c.gate ? " gate" : "", c.residual, c.pad, c.x == DType::kF32 ? " x=f32" : "",
                c.out == DType::kF32 ? " out=f32" : "");
  report(name, r, {&out}, 5e-3);
  release_all();
}

void check_gated(const std::string& how, int m, int n, int k, NormKind kind, Act act, int pad,
                 const Launch& at, const Run& run = nullptr) {
  if (!mine()) return;
  Matrix x = Matrix::random(m, k, DType::kBF16, pad, -1, 1), out = Matrix::empty(m, n, DType::kBF16, pad);
  Packed w = random_weight(Packing::kInterleaved, {n, n}, k);
  NormCase norm = make_norm(kind, k);
  GatedLinear op;
  op.x = x.view;
  op.out = out.view;
  op.norm = norm.norm;
  op.w = w.weight;
  op.act = act;
  launch_product(op, at, run);
  out.download();
  Result r;
  const auto columns = sample(n, m * n < 100000 ? n : 300);
  for (int i : sample(m, 24)) {
    const auto row = normed(norm, x, i);
    for (int j : columns)
      r.add(out.at(i, j), activated(dot(row, w.parts[0], j), act) * dot(row, w.parts[1], j));
  }
  char name[160];
  std::snprintf(name, sizeof name, "gated %s m=%d n=%d k=%d norm=%s act=%s pad=%d", how.c_str(), m, n, k,
                kNorms[int(kind)], kActs[int(act)], pad);
  report(name, r, {&out}, 6e-3);
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
  Packed w = random_weight(Packing::kStacked, n, c.k);
  NormCase norm = make_norm(c.norm, c.k);
  const int longest = 2 * c.m;
  Matrix rope = Matrix::random(longest, c.d, DType::kF32, 0, -1, 1);
  Matrix positions = Matrix::random(c.m, 1, DType::kI32, 0, 0, static_cast<float>(longest));
  Qkv op;
  op.x = x.view;
  op.norm = norm.norm;
  op.w = w.weight;
  op.head_dim = c.d;
  if (c.rope) {
    op.rope = rope.view;
    op.positions = positions.view;
  }
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
    const auto row = normed(norm, x, i);
    for (size_t part = 0; part < n.size(); ++part) {
      const auto value = [&](int j) {
        return dot(row, w.parts[part], j) + (c.bias ? biases[part].at(0, j) : 0);
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
  report(name, r, all, 5e-3);
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
  Matrix out = Matrix::empty(c.batch * c.m, c.heads * c.d, DType::kBF16, c.pad);
  Matrix qb = Matrix::random(c.m, 1, DType::kI32, 0, -1, 4),
         kb = Matrix::random(c.n, 1, DType::kI32, 0, 0, 5);
  Attention op;
  op.q = q.view;
  op.k = k.view;
  op.v = v.view;
  op.out = out.view;
  op.head_dim = c.d;
  op.batch = c.batch;
  if (c.blocks) {
    op.q_block = qb.view;
    op.k_block = kb.view;
  }
  CUDA_OK(cuda::launch_large(op, at));
  CUDA_OK(cudaDeviceSynchronize());
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
        r.add(out.at(row, h * c.d + e), total > 0 ? sum / total : 0);
      }
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "attention %s m=%d n=%d heads=%d/%d d=%d batch=%d%s pad=%d", how.c_str(),
                c.m, c.n, c.heads, c.kv, c.d, c.batch, c.blocks ? " blocks" : "", c.pad);
  report(name, r, {&out}, 6e-3);
  release_all();
}

void check_space_to_depth(int batch, int grid, int f, int d, NormKind kind, int pad) {
  if (!mine()) return;
  Matrix x = Matrix::random(batch * grid * grid, d, DType::kBF16, pad, -1, 1);
  Matrix out = Matrix::empty(batch * grid * grid / (f * f), d * f * f, DType::kBF16, pad);
  NormCase norm = make_norm(kind, d);
  SpaceToDepth op;
  op.x = x.view;
  op.out = out.view;
  op.norm = norm.norm;
  op.factor = f;
  op.height = op.width = grid;
  CUDA_OK(cuda::launch(op, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.download();
  Result r;
  for (int row = 0; row < x.view.rows; ++row) {
    const auto v = normed(norm, x, row);
    const int b = row / (grid * grid), y = row / grid % grid, xx = row % grid;
    const int to = (b * (grid / f) + y / f) * (grid / f) + xx / f, at = (y % f * f + xx % f) * d;
    for (int c = 0; c < d; ++c) r.add(out.at(to, at + c), v[c]);
  }
  char name[160];
  std::snprintf(name, sizeof name, "space_to_depth batch=%d grid=%d factor=%d d=%d norm=%s pad=%d", batch,
                grid, f, d, kNorms[int(kind)], pad);
  report(name, r, {&out}, 4e-3);
  release_all();
}

void check_embed(int m, int vocabulary, int d, int pad) {
  if (!mine()) return;
  Matrix tokens = Matrix::random(m, 1, DType::kI32, 0, -3, static_cast<float>(vocabulary + 3));
  Matrix table = Matrix::random(vocabulary, d, DType::kBF16, pad, -1, 1),
         out = Matrix::empty(m, d, DType::kBF16, pad);
  Embed op;
  op.tokens = tokens.view;
  op.table = table.view;
  op.out = out.view;
  op.scale = 1.7f;
  CUDA_OK(cuda::launch(op, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.download();
  Result r;
  for (int i = 0; i < m; ++i) {
    const int t = static_cast<int>(tokens.at(i, 0));
    for (int c = 0; c < d; ++c) r.add(out.at(i, c), 1.7 * table.at(t < 0 || t >= vocabulary ? 0 : t, c));
  }
  report("embed m=" + std::to_string(m) + " d=" + std::to_string(d), r, {&out}, 4e-3);
  release_all();
}

struct Picture {
  int h, w, stride, new_h, new_w, top, left, present;
};
void check_patches(int size, int patch, const std::vector<Picture>& pictures, int pad) {
  if (!mine()) return;
  const int cameras = static_cast<int>(pictures.size());
  int bytes = 0;
  for (const Picture& g : pictures) bytes = std::max(bytes, g.h * g.stride);
  Matrix frames = Matrix::random(cameras, bytes, DType::kU8, 0, 0, 256),
         geometry = Matrix::empty(cameras, 8, DType::kI32, 0);
  for (const Picture& g : pictures) {
    for (int v : {g.h, g.w, g.stride, g.new_h, g.new_w, g.top, g.left, g.present})
      geometry.values.push_back(float(v));
  }
  geometry.upload();
  const int across = size / patch, columns = 3 * patch * patch;
  Matrix out = Matrix::empty(cameras * across * across, columns, DType::kBF16, pad);
  ImagePatches op;
  op.frames = frames.view;
  op.geometry = geometry.view;
  op.out = out.view;
  op.height = op.width = size;
  op.patch = patch;
  CUDA_OK(cuda::launch(op, base));
  CUDA_OK(cudaDeviceSynchronize());
  out.download();
  Result r;
  for (int b = 0; b < cameras; ++b) {
    const Picture& g = pictures[b];
    for (int y = 0; y < size; ++y) {
      for (int x = 0; x < size; ++x) {
        for (int c = 0; c < 3; ++c) {
          double v = -1;
          const int yy = y - g.top, xx = x - g.left;
          if (g.present && yy >= 0 && yy < g.new_h && xx >= 0 && xx < g.new_w) {
            const double sy = std::max((yy + 0.5) * g.h / g.new_h - 0.5, 0.0),
                         sx = std::max((xx + 0.5) * g.w / g.new_w - 0.5, 0.0);
            const int y0 = std::min(int(sy), g.h - 1), x0 = std::min(int(sx), g.w - 1);
            const int y1 = std::min(y0 + 1, g.h - 1), x1 = std::min(x0 + 1, g.w - 1);
            const auto pixel = [&](int py, int px) {
              return double(frames.at(b, py * g.stride + 3 * px + c));
            };
            const double fy = sy - y0, fx = sx - x0;
            v = ((1 - fy) * ((1 - fx) * pixel(y0, x0) + fx * pixel(y0, x1)) +
                 fy * ((1 - fx) * pixel(y1, x0) + fx * pixel(y1, x1))) /
                    127.5 -
                1;
          }
          const int row = (b * across + y / patch) * across + x / patch;
          r.add(out.at(row, (c * patch + y % patch) * patch + x % patch), v);
        }
      }
    }
  }
  report("image_patches " + std::to_string(size) + " patch " + std::to_string(patch), r, {&out}, 4e-3);
  release_all();
}

// Sums of small integers, a bias and a residual of them: x in {-1, 0, 1}, W in {-1, 1}. What comes out has to
// be right to the last bit; in bf16 it is below 256.
void check_exact(const std::string& how, int m, int n, int k, DType type, const Launch& at, const Run& run) {
  if (!mine()) return;
  const auto integers = [](int rows, int cols, DType kind, int pad, int low, int high, int step) {
    Matrix all = Matrix::empty(rows, cols, kind, pad);
    const unsigned count = (high - low) / step + 1;
    for (int i = 0; i < rows * cols; ++i)
      all.values.push_back(static_cast<float>(low + step * static_cast<int>((generator()() >> 8) % count)));
    all.upload();
    return all;
  };
  const int pad = type == DType::kBF16 ? 8 : 3;
  Matrix x = integers(m, k, DType::kBF16, 8, -1, 1, 1), w = integers(n, k, DType::kBF16, 0, -1, 1, 2),
         bias = integers(1, n, DType::kF32, 1, -9, 9, 1),
         residual = integers(m, n, DType::kBF16, pad, -9, 9, 1), out = Matrix::empty(m, n, type, pad);
  void* packed = device(cuda::packed_bytes_large(Packing::kStacked, {n}, k));
  CUDA_OK(
      cuda::pack_large(packed, Packing::kStacked, {{w.view.base, DType::kBF16, n, k, w.view.ld}}, nullptr));
  Linear op;
  op.x = x.view, op.out = out.view, op.bias = bias.view, op.residual = residual.view;
  op.w = {packed, DType::kBF16, Packing::kStacked, k, {n}};
  launch_product(op, at, run);
  out.download();
  Result r;
  for (int i : sample(m, 24)) {
    for (int j : sample(n, n < 500 ? n : 200)) {
      double sum = bias.at(0, j) + residual.at(i, j);
      for (int e = 0; e < k; ++e) sum += double(x.at(i, e)) * w.at(j, e);
      r.add(out.at(i, j), sum);
    }
  }
  report("exact " + how + " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k) +
             (type == DType::kF32 ? " out=f32" : ""),
         r, {&out}, 0.0);
  release_all();
}

// Products whose columns do not belong together in twos.
void plain_products(const std::string& how, const Launch& at, const Run& run) {
  check_linear(how, {.m = 200, .n = 328, .k = 200, .act = Act::kGeluTanh, .bias = true}, at, run);
  check_linear(how, {.m = 70, .n = 77, .k = 591, .bias = true, .residual = 35, .scale = 3, .pad = 3}, at,
               run);
  check_linear(how, {.m = 560, .n = 2048, .k = 2048, .gate = true, .residual = 560, .in_place = true}, at,
               run);
  check_qkv(
      how,
      {.m = 200, .q = 4, .kv = 4, .d = 72, .k = 136, .norm = NormKind::kLayer, .rope = false, .bias = true},
      at, run);
  check_exact(how, 70, 130, 64, DType::kF32, at, run);
  check_exact(how, 200, 328, 1000, DType::kBF16, at, run);
  check_exact(how, 193, 480, 2064, DType::kBF16, at, run);
  check_exact(how, 200, 168, 16384, DType::kF32, at, run);
}
void products_in_pairs(const std::string& how, const Launch& at, const Run& run) {
  check_gated(how, 177, 200, 960, NormKind::kRms, Act::kSilu, 8, at, run);
  check_qkv(how, {.m = 177, .q = 6, .kv = 2, .d = 64, .k = 192}, at, run);
  check_qkv(how, {.m = 130, .q = 3, .kv = 1, .d = 256, .k = 520}, at, run);
}
// A tile that begins within a unit refuses what needs whole ones.
void check_refusal(const std::string& how, const cuda::Tile& tile, const Launch& at) {
  if (!mine()) return;
  cuda::Product gated, rotated;
  gated.kind = cuda::ProductKind::kGated;
  rotated.kind = cuda::ProductKind::kQkv;
  rotated.rotate = true;
  const bool right = cuda::product_sm90(gated, tile, at) == cudaErrorInvalidValue &&
                     cuda::product_sm90(rotated, tile, at) == cudaErrorInvalidValue;
  failures += !right;
  std::printf("%-4s %s refuses pairs of columns\n", right ? "ok" : "FAIL", how.c_str());
}

void check_everything() {
  const Launch at = base;
  // Sizes of the policies, and of the small ones of the tests.
  for (const Launch& l : {at, [&] {
                            Launch old = at;
                            old.arch = 80;
                            return old;
                          }()}) {
    const std::string how = l.arch == 90 ? "auto" : "sm80";
    check_linear(how, {.m = 2048, .n = 768, .k = 768, .bias = true, .residual = 1024}, l);
    check_linear(
        how, {.m = 2048, .n = 3072, .k = 768, .norm = NormKind::kLayer, .act = Act::kGeluTanh, .bias = true},
        l);
    check_linear(how, {.m = 2048, .n = 768, .k = 3072, .bias = true, .residual = 2048, .in_place = true}, l);
    check_linear(how, {.m = 128, .n = 960, .k = 12288, .scale = 30.98f}, l);
    check_linear(how, {.m = 512, .n = 1152, .k = 588, .bias = true, .residual = 256, .pad = 0}, l);
    check_linear(
        how, {.m = 512, .n = 4304, .k = 1152, .norm = NormKind::kLayer, .act = Act::kGeluTanh, .bias = true},
        l);
    check_linear(how, {.m = 512, .n = 1152, .k = 4304, .bias = true, .residual = 512}, l);
    check_linear(how, {.m = 560, .n = 2048, .k = 16384, .residual = 560, .in_place = true}, l);
    check_gated(how, 560, 16384, 2048, NormKind::kRms, Act::kGeluTanh, 0, l);
    check_gated(how, 177, 2560, 960, NormKind::kRms, Act::kSilu, 0, l);
    check_qkv(how, {.m = 560, .q = 8, .kv = 1, .d = 256, .k = 2048}, l);
    check_qkv(how, {.m = 560, .q = 0, .kv = 1, .d = 256, .k = 2048}, l);
    check_qkv(how, {.m = 177, .q = 15, .kv = 5, .d = 64, .k = 960}, l);
    check_qkv(how,
              {.m = 512,
               .q = 16,
               .kv = 16,
               .d = 72,
               .k = 1152,
               .norm = NormKind::kLayer,
               .rope = false,
               .bias = true},
              l);
    check_linear(
        how, {.m = 32, .n = 304, .k = 144, .norm = NormKind::kLayer, .act = Act::kGeluTanh, .bias = true}, l);
    check_linear(how, {.m = 8, .n = 192, .k = 512, .scale = 13.9f, .pad = 0}, l);
    check_linear(how, {.m = 1, .n = 9, .k = 32, .bias = true, .x = DType::kF32, .out = DType::kF32}, l);
    check_linear(
        how,
        {.m = 90, .n = 33, .k = 2500, .norm = NormKind::kRms, .act = Act::kSilu, .residual = 90, .pad = 1},
        l);
    check_linear(
        how, {.m = 90, .n = 40, .k = 40, .norm = NormKind::kLayer, .x = DType::kF32, .out = DType::kF32}, l);
    check_qkv(how, {.m = 20, .q = 4, .kv = 1, .d = 72, .k = 128, .bias = true, .pad = 3}, l);
    check_qkv(how, {.m = 20, .q = 2, .kv = 1, .d = 10, .k = 36}, l);
  }
  const Run sm80 = [](const cuda::Product& p, const Launch& l) { return cuda::product_sm80(p, l); };
  plain_products("sm80", at, sm80);
  products_in_pairs("sm80", at, sm80);
  for (int groups = 1; at.arch == 90 && groups <= 4; ++groups) {
    for (int columns = 64; columns <= 256; columns += 32) {
      for (int split : {1, 2, 3, 5, 8}) {
        const cuda::Tile tile{groups, columns, split};
        if (!cuda::has_tile_sm90(tile)) continue;
        char how[60];
        std::snprintf(how, sizeof how, "%dx%d/%d", 64 * groups, columns, split);
        const Run run = [&](const cuda::Product& p, const Launch& l) {
          cuda::Tile t = tile;
          const int slices = (p.k + 63) / 64;
          if (t.split > slices) t.split = slices > 1 ? slices : 1;
          const bool same = t.split == tile.split || cuda::has_tile_sm90(t);
          return same ? cuda::product_sm90(p, t, l) : cuda::product_sm80(p, l);
        };
        plain_products(how, at, run);
        if (columns % 64 == 0) {
          products_in_pairs(how, at, run);
        } else {
          check_refusal(how, tile, at);
        }
      }
    }
  }
  for (const Launch& l : {at, [&] {
                            Launch old = at;
                            old.arch = 86;
                            return old;
                          }()}) {
    const std::string how = l.arch == 90 ? "auto" : "sm86";
    check_attention(how, {.m = 1024, .n = 1024, .heads = 12, .kv = 12, .d = 64, .batch = 2}, l);
    check_attention(how, {.m = 200, .n = 130, .heads = 40, .kv = 20, .d = 64, .batch = 3}, l);
    check_attention(how, {.m = 1, .n = 257, .heads = 70, .kv = 70, .d = 56, .batch = 2, .pad = 0}, l);
    check_attention(how, {.m = 256, .n = 256, .heads = 16, .kv = 16, .d = 72, .batch = 2, .pad = 0}, l);
    check_attention(how, {.m = 177, .n = 177, .heads = 15, .kv = 5, .d = 64, .blocks = true}, l);
    check_attention(how, {.m = 560, .n = 560, .heads = 8, .kv = 1, .d = 256, .blocks = true, .pad = 0}, l);
    check_attention(how, {.m = 304, .n = 304, .heads = 8, .kv = 1, .d = 256, .batch = 1, .blocks = true}, l);
    check_attention(how, {.m = 21, .n = 576, .heads = 8, .kv = 2, .d = 256, .batch = 2, .blocks = true}, l);
    check_attention(how, {.m = 75, .n = 545, .heads = 3, .kv = 3, .d = 136, .batch = 2}, l);
    check_attention(how, {.m = 30, .n = 97, .heads = 4, .kv = 2, .d = 256, .blocks = true}, l);
    check_attention(how, {.m = 11, .n = 577, .heads = 8, .kv = 1, .d = 256}, l);
    check_attention(how, {.m = 70, .n = 33, .heads = 2, .kv = 1, .d = 128, .batch = 3, .blocks = true}, l);
    check_attention(how, {.m = 65, .n = 70, .heads = 2, .kv = 2, .d = 36, .batch = 2, .pad = 1}, l);
    check_attention(how, {.m = 16, .n = 16, .heads = 2, .kv = 2, .d = 72, .batch = 2}, l);
    check_attention(how, {.m = 3, .n = 1, .heads = 1, .kv = 1, .d = 200, .blocks = true}, l);
  }
  check_space_to_depth(2, 32, 4, 768, NormKind::kLayer, 0);
  check_space_to_depth(2, 6, 2, 129, NormKind::kRms, 3);
  check_space_to_depth(1, 4, 2, 2304, NormKind::kNone, 8);
  check_embed(48, 512, 960, 8);
  check_embed(7, 9, 33, 1);
  check_patches(512, 16, {{480, 640, 1920, 384, 512, 64, 0, 1}, {240, 320, 1000, 384, 512, 128, 0, 1}}, 0);
  check_patches(224, 14,
                {{480, 640, 1920, 168, 224, 28, 0, 1},
                 {224, 224, 672, 224, 224, 0, 0, 1},
                 {9, 9, 27, 224, 224, 0, 0, 0}},
                4);
  check_patches(64, 16, {{50, 37, 111, 64, 47, 0, 8, 1}}, 0);
}

}  // namespace
}  // namespace vla::check

int main(int count, char** arguments) {
  using namespace vla::check;
  if (count > 2) {
    part = std::atoi(arguments[1]);
    parts = std::max(1, std::atoi(arguments[2]));
  }
  // The scratch must outlive release_all(): taken first, and not owned by it.
  base = launch_on(nullptr, 64 << 20);
  owned().clear();
  check_everything();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
