// Every kernel for few rows against double precision, on fresh random inputs: odd sizes, strided views, every
// split of the work, poisoned outputs, the same bits each time. Exit code 0 when all hold.
//   small_check [quick]    quick: one split each, for compute-sanitizer
#include <algorithm>
#include <cstring>
#include <memory>

#include "../cuda/small/product.cuh"
#include "harness.h"

namespace vla::test {
namespace {

using cuda::Launch;
using cuda::small::Args;
constexpr double kLimit = 4e-3;  // two roundings to bfloat16, 1.7e-3 each, and a little

struct NormCase {
  NormKind kind = NormKind::kNone;
  bool weight = false, bias = false;
  float plus = 0.0f;
};
const NormCase kNoNorm, kPlainRms{NormKind::kRms, true, false, 0.0f},
    kAdaptive{NormKind::kRms, true, true, 1.0f}, kLayerNorm{NormKind::kLayer, true, true, 0.0f},
    kBareRms{NormKind::kRms, false, false, 0.0f};

using Owned = std::unique_ptr<Matrix>;
Owned make(int rows, int cols, DType type, int extra = 0) {
  return std::make_unique<Matrix>(rows, cols, type, extra);
}

struct Normed {
  Owned weight, bias;
  Norm norm;
  std::vector<double> y;  // norm(x)
};

Normed normed(const Matrix& x, const NormCase& c) {
  Normed n;
  const int m = x.rows(), k = x.cols();
  n.norm.kind = c.kind, n.norm.eps = 1e-5f, n.norm.plus = c.plus;
  if (c.weight) {
    n.weight = make(1, k, DType::kF32);
    n.weight->normal(0.2f, 1.0f - c.plus);
    n.norm.weight = n.weight->view();
  }
  if (c.bias) {
    n.bias = make(1, k, DType::kF32);
    n.bias->normal(0.3f);
    n.norm.bias = n.bias->view();
  }
  n.y.resize(size_t(m) * k);
  for (int i = 0; i < m; ++i) {
    double mean = 0.0, square = 0.0;
    for (int j = 0; j < k; ++j) mean += x.at(i, j) / double(k);
    if (c.kind != NormKind::kLayer) mean = 0.0;
    for (int j = 0; j < k; ++j) square += (x.at(i, j) - mean) * (x.at(i, j) - mean) / k;
    const double rstd = c.kind == NormKind::kNone ? 1.0 : 1.0 / std::sqrt(square + 1e-5);
    for (int j = 0; j < k; ++j) {
      double v = (x.at(i, j) - mean) * rstd;
      if (c.weight) v *= n.weight->at(0, j) + double(c.plus);
      if (c.bias) v += n.bias->at(0, j);
      n.y[size_t(i) * k + j] = v;
    }
  }
  return n;
}

struct Packed {
  std::vector<Owned> parts;
  void* data = nullptr;
  Weight weight;
  ~Packed() { cudaFree(data); }

  Packed(Packing packing, const std::vector<int>& n, int k) {
    std::vector<cuda::RawMatrix> raw;
    for (size_t i = 0; i < n.size(); ++i) {
      parts.push_back(make(n[i], k, i % 2 ? DType::kF32 : DType::kBF16, 3));
      parts.back()->normal(1.0f / std::sqrt(float(k)));
      for (int r = 0; r < n[i]; ++r) {
        for (int c = 0; c < k; ++c) parts.back()->at(r, c) = round_bf16(parts.back()->at(r, c));
      }
      parts.back()->send();
      raw.push_back(
          {parts.back()->view().base, parts.back()->view().dtype, n[i], k, parts.back()->view().ld});
    }
    const size_t bytes = cuda::packed_bytes_small(packing, n, k);
    TEST_CUDA(cudaMalloc(&data, bytes));
    TEST_CUDA(cudaMemset(data, 0xff, bytes));
    TEST_CUDA(cuda::pack_small(data, packing, raw, nullptr));
    weight = {data, DType::kBF16, packing, k, n};
  }
  // x (m, k) times the transpose of part p
  std::vector<double> times(const std::vector<double>& x, int m, int p) const {
    const int n = parts[p]->rows(), k = parts[p]->cols();
    std::vector<double> y(size_t(m) * n);
    parallel(n, [&](int j) {
      for (int i = 0; i < m; ++i) {
        double sum = 0.0;
        for (int c = 0; c < k; ++c) sum += x[size_t(i) * k + c] * parts[p]->at(j, c);
        y[size_t(i) * n + j] = sum;
      }
    });
    return y;
  }
};

double act_of(double x, Act act) {
  if (act == Act::kSilu) return x / (1.0 + std::exp(-x));
  if (act == Act::kGeluTanh)
    return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
  return x;
}

struct Suite {
  Launch at;
  bool quick = false;
  Report report;
  static constexpr size_t kSquaresBytes = cuda::kSmallRows * cuda::kSquareParts * 4;
  float *squares = nullptr, *written = nullptr, *shift = nullptr;

  // Runs `op` with the split that would be chosen, then (unless quick) with every other; `outputs` are
  // poisoned or, where `reset` is given, reset before each run, and compared with `expected` after it.
  template <typename O>
  void run(const std::string& name, const O& op, int m, const std::vector<Matrix*>& outputs,
           const std::vector<std::vector<double>>& expected, double limit = kLimit,
           const std::function<void()>& reset = nullptr) {
    Launch here = at;
    here.squares = squares;
    if constexpr (requires {
                    op.norm.bias;
                    op.w;
                  }) {
      if (op.norm.kind == NormKind::kRms && op.norm.bias) {
        TEST_CUDA(cuda::make_shift(op.norm.bias, 1, op.w, shift, at));
        here.shift = shift;
      }
    }
    const auto prepare = [&] {
      for (Matrix* o : outputs) o->poison();
      if (reset) reset();
    };
    const auto compare = [&](const std::string& what) {
      if (const cudaError_t error = cudaStreamSynchronize(at.stream); error != cudaSuccess) {
        std::printf("%s%s: %s\n", name.c_str(), what.c_str(), cudaGetErrorString(error));
        std::exit(2);
      }
      for (size_t i = 0; i < outputs.size(); ++i) {
        report.check(name + what + " output " + std::to_string(i),
                     relative_error(outputs[i]->fetch(), expected[i]), limit);
      }
    };
    prepare();
    TEST_CUDA(cuda::launch_small(op, here));
    compare("");
    if (quick) return;
    const std::vector<std::byte> bits = outputs[0]->bytes();
    bool same = true;
    for (int i = 0; i < 20; ++i) {
      prepare();
      TEST_CUDA(cuda::launch_small(op, here));
      TEST_CUDA(cudaStreamSynchronize(at.stream));
      same &= outputs[0]->bytes() == bits;
    }
    report.require(name + ": the same bits each time", same);
    if constexpr (!std::is_same_v<O, Attention>) {
      if (m > cuda::kSmallRows) return;
      if constexpr (std::is_same_v<O, Qkv>) {
        if (op.rope && !cuda::small::rotates(op.head_dim)) return;
      }
      for (int g = 1; g <= 2; ++g) {
        for (int split = 1; split <= cuda::small::kMaxCluster; ++split) {
          Args a = cuda::small::arguments(op, 0, 0, m);
          a.shift = here.shift;
          if (!cuda::small::fits_sm90(a, here) || !cuda::small::set_split_sm90(a, g, split)) continue;
          const int parts = (a.blocks + 1) / 2;
          a.norm_constant = split % 2;
          const bool squared = std::is_same_v<O, Linear> && !a.out_f32 && parts <= cuda::kSquareParts;
          if (squared) a.squares_out = written;
          TEST_CUDA(cudaMemsetAsync(written, 0xff, kSquaresBytes, at.stream));
          prepare();
          TEST_CUDA(cuda::small::run_product_sm90(a, here));
          const std::string what = " sm90 " + std::to_string(g) + "x" + std::to_string(split);
          compare(what);
          if (squared) check_squares(name + what, *outputs[0], parts);
        }
      }
      for (int wn = 1; wn <= cuda::small::kMaxWn; wn *= 2) {
        for (int split = 1; split <= cuda::small::kMaxCluster; ++split) {
          Args a = cuda::small::arguments(op, 0, 0, m);
          if (!cuda::small::set_split(a, wn, split, at)) continue;
          prepare();
          TEST_CUDA(cuda::small::run_product(a, at));
          compare(" split " + std::to_string(wn) + "x" + std::to_string(split));
        }
      }
    }
  }

  // The parts that a kernel left of its output's rows' sums of squares.
  void check_squares(const std::string& name, const Matrix& out, int parts) {
    std::vector<float> got(kSquaresBytes / 4);
    TEST_CUDA(cudaMemcpy(got.data(), written, kSquaresBytes, cudaMemcpyDeviceToHost));
    const std::vector<double> y = out.fetch();
    std::vector<double> sums(out.rows(), 0.0), expected(out.rows(), 0.0);
    for (int i = 0; i < out.rows(); ++i) {
      for (int j = 0; j < parts; ++j) sums[i] += got[i * cuda::kSquareParts + j];
      for (int j = 0; j < out.cols(); ++j)
        expected[i] += y[size_t(i) * out.cols() + j] * y[size_t(i) * out.cols() + j];
    }
    report.check(name + " squares", relative_error(sums, expected), 1e-5);
  }

  struct LinearCase {
    int m, k, n;
    NormCase norm;
    bool x_f32 = false, bias = false, gate = false, out_f32 = false;
    int residual = 0;  // its rows
    Act act = Act::kNone;
    float scale = 1.0f;
  };
  void linear(const LinearCase& c) {
    const std::string name =
        "linear " + std::to_string(c.m) + " " + std::to_string(c.k) + " " + std::to_string(c.n);
    const DType f32 = DType::kF32, act = DType::kBF16;
    Matrix x(c.m, c.k, c.x_f32 ? f32 : act, c.k % 8 ? 1 : 8), out(c.m, c.n, c.out_f32 ? f32 : act, 5);
    x.normal(1.5f, 0.3f);
    const Normed n = normed(x, c.norm);
    const Packed w(Packing::kStacked, {c.n}, c.k);
    Matrix bias(1, c.n, f32), gate(1, c.n, f32), residual(std::max(1, c.residual), c.n, act, 2);
    bias.normal(), gate.normal(), residual.normal();
    Linear op;
    op.x = x.view(), op.out = out.view(), op.norm = n.norm, op.w = w.weight, op.act = c.act,
    op.scale = c.scale;
    if (c.bias) op.bias = bias.view();
    if (c.gate) op.gate = gate.view();
    if (c.residual) op.residual = residual.view();
    std::vector<double> y = w.times(n.y, c.m, 0);
    for (int i = 0; i < c.m; ++i) {
      for (int j = 0; j < c.n; ++j) {
        double& v = y[size_t(i) * c.n + j];
        v = act_of(c.scale * (v + (c.bias ? bias.at(0, j) : 0.0)), c.act) * (c.gate ? gate.at(0, j) : 1.0);
        if (c.residual) v += residual.at(i % c.residual, j);
      }
    }
    run(name, op, c.m, {&out}, {y});
    if (c.residual == c.m && !c.out_f32) {  // in place
      Linear in_place = op;
      in_place.out = op.residual;
      run(name + " in place", in_place, c.m, {&residual}, {y}, kLimit, [&] { residual.send(); });
    }
  }

  void gated(int m, int k, int n, const NormCase& norm, Act act) {
    Matrix x(m, k, DType::kBF16, 8), out(m, n, DType::kBF16, 4);
    x.normal(0.7f, 0.1f);
    const Normed nx = normed(x, norm);
    const Packed w(Packing::kInterleaved, {n, n}, k);
    GatedLinear op;
    op.x = x.view(), op.out = out.view(), op.norm = nx.norm, op.w = w.weight, op.act = act;
    std::vector<double> g = w.times(nx.y, m, 0), u = w.times(nx.y, m, 1);
    for (size_t i = 0; i < g.size(); ++i) g[i] = act_of(g[i], act) * u[i];
    run("gated " + std::to_string(m) + " " + std::to_string(k) + " " + std::to_string(n), op, m, {&out}, {g},
        5e-3);
  }

  void qkv(int m, int k, const std::vector<int>& heads, int d, const NormCase& norm, bool rope, bool bias) {
    Matrix x(m, k, DType::kBF16);
    x.normal();
    const Normed nx = normed(x, norm);
    std::vector<int> n;
    for (int h : heads) {
      if (h) n.push_back(h * d);
    }
    const Packed w(Packing::kStacked, n, k);
    Matrix table(90, d, DType::kF32), positions(m, 1, DType::kI32, 2);
    positions.fill([](int i, int) { return float((i * 37 + 5) % 90); });
    table.fill([&](int i, int j) {
      const double angle = i / std::pow(10000.0, 2.0 * (j % (d / 2)) / d);
      return float(j < d / 2 ? std::cos(angle) : std::sin(angle));
    });
    Qkv op;
    op.x = x.view(), op.norm = nx.norm, op.w = w.weight, op.head_dim = d;
    if (rope) op.rope = table.view(), op.positions = positions.view();
    View* outs[3] = {&op.q, &op.k, &op.v};
    View* biases[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
    std::vector<Owned> owned, owned_bias;
    std::vector<Matrix*> outputs;
    std::vector<std::vector<double>> expected;
    for (int i = 0, p = 0; i < 3; ++i) {
      if (!heads[i]) continue;
      const int cols = heads[i] * d;
      owned.push_back(make(m, cols, DType::kBF16, 8 * i));
      owned_bias.push_back(make(1, cols, DType::kF32));
      owned_bias.back()->normal();
      *outs[i] = owned.back()->view();
      if (bias) *biases[i] = owned_bias.back()->view();
      std::vector<double> y = w.times(nx.y, m, p++);
      for (int r = 0; r < m; ++r) {
        for (int c = 0; c < cols && bias; ++c) y[size_t(r) * cols + c] += owned_bias.back()->at(0, c);
        for (int h = 0; h < heads[i] && rope && i < 2; ++h) {
          for (int c = 0; c < d / 2; ++c) {
            const int position = int(positions.at(r, 0));
            const double cos = table.at(position, c), sin = table.at(position, c + d / 2);
            double &a = y[size_t(r) * cols + h * d + c], &b = y[size_t(r) * cols + h * d + c + d / 2];
            const double first = a * cos - b * sin;
            b = b * cos + a * sin;
            a = first;
          }
        }
      }
      expected.push_back(std::move(y));
      outputs.push_back(owned.back().get());
    }
    run("qkv " + std::to_string(m) + " " + std::to_string(k) + " head " + std::to_string(d), op, m, outputs,
        expected);
  }

  void euler(int m, int k, int n, bool guided) {
    Matrix h(m, k, DType::kBF16), x(m, n, DType::kF32), previous(m, n, DType::kF32),
        weight(m, 1, DType::kF32), gain(1, 1, DType::kF32), time(1, 1, DType::kF32), bias(1, n, DType::kF32);
    h.normal(2.0f), x.normal(), previous.normal(), bias.normal();
    weight.fill([&](int i, int) { return guided && i < m / 2 ? 1.0f - float(i) / float(m) : 0.0f; });
    gain.fill([](int, int) { return 3.5f; });
    time.fill([](int, int) { return 0.7f; });
    const Normed nx = normed(h, kAdaptive);
    const Packed w(Packing::kStacked, {n}, k);
    Euler op;
    op.h = h.view(), op.bias = bias.view(), op.x = x.view(), op.previous = previous.view();
    op.weight = weight.view(), op.gain = gain.view(), op.time = time.view();
    op.norm = nx.norm, op.w = w.weight, op.dt = -0.1f;
    std::vector<double> y = w.times(nx.y, m, 0);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double& v = y[size_t(i) * n + j];
        v += bias.at(0, j);
        const double error = (previous.at(i, j) - (x.at(i, j) - 0.7 * v)) * weight.at(i, 0);
        v = x.at(i, j) - 0.1 * (v - 3.5 * error);
      }
    }
    run("euler " + std::to_string(m) + " " + std::to_string(k), op, m, {&x}, {y}, 2e-3, [&] { x.send(); });
  }

  void attention(int m, int n, int heads, int kv_heads, int d, int batch, bool blocks) {
    const std::string name = "attention " + std::to_string(m) + " over " + std::to_string(n) + " heads " +
                             std::to_string(heads) + "/" + std::to_string(kv_heads) + " of " +
                             std::to_string(d);
    Matrix q(batch * m, heads * d, DType::kBF16, 8), k(batch * n, kv_heads * d, DType::kBF16, 16),
        v(batch * n, kv_heads * d, DType::kBF16, 8), out(batch * m, heads * d, DType::kBF16, 8),
        q_block(m, 1, DType::kI32), k_block(n, 1, DType::kI32);
    q.normal(1.5f), k.normal(), v.normal(1.0f, 0.5f);
    // the first query sees nothing; some keys are seen by none; later keys by later queries
    q_block.fill([&](int i, int) { return float(i - 1); });
    k_block.fill([&](int j, int) {
      return j % 7 == 3 ? float(1 << 30) : j < n / 2 ? 0.0f : float(j % (m + 1));
    });
    Attention op;
    op.q = q.view(), op.k = k.view(), op.v = v.view(), op.out = out.view();
    op.head_dim = d, op.batch = batch;
    if (blocks) op.q_block = q_block.view(), op.k_block = k_block.view();
    std::vector<double> y(size_t(batch) * m * heads * d, 0.0);
    parallel(batch * heads, [&](int bh) {
      const int b = bh / heads, h = bh % heads, g = h / (heads / kv_heads);
      std::vector<double> p(n);
      for (int i = 0; i < m; ++i) {
        double top = -INFINITY, sum = 0.0;
        for (int j = 0; j < n; ++j) {
          double s = 0.0;
          for (int c = 0; c < d; ++c) s += double(q.at(b * m + i, h * d + c)) * k.at(b * n + j, g * d + c);
          p[j] = blocks && k_block.at(j, 0) > q_block.at(i, 0) ? -INFINITY : s / std::sqrt(double(d));
          top = std::max(top, p[j]);
        }
        if (top == -INFINITY) continue;
        for (double& s : p) s = std::exp(s - top), sum += s;
        for (int j = 0; j < n; ++j) {
          for (int c = 0; c < d; ++c)
            y[size_t(b * m + i) * heads * d + h * d + c] += p[j] / sum * v.at(b * n + j, g * d + c);
        }
      }
    });
    run(name, op, m, {&out}, {y}, 5e-3);
  }

  int all() {
    TEST_CUDA(cudaMalloc(&squares, kSquaresBytes));
    TEST_CUDA(cudaMalloc(&written, kSquaresBytes));
    TEST_CUDA(cudaMalloc(&shift, 1 << 20));
    linear({50, 1024, 512, kNoNorm});
    linear({50, 2048, 1024, kNoNorm, false, false, true, false, 50});
    linear({50, 960, 720, kNoNorm, false, false, false, false, 50});
    linear({51, 4096, 256, kNoNorm, false, true, true, false, 51});
    linear({50, 720, 720, kNoNorm, false, true, false, false, 0, Act::kSilu});
    linear({50, 32, 1024, kNoNorm, true, true});
    linear({1, 32, 720, kNoNorm, true, true});
    linear({10, 256, 96, kNoNorm, false, true, false, true, 0, Act::kSilu});
    linear({10, 1024, 3072, kNoNorm, true, true, false, true});
    linear({33, 144, 304, kLayerNorm, false, true, false, false, 0, Act::kGeluTanh});
    linear({32, 588, 144, kNoNorm, false, true, false, false, 16});
    linear({64, 1024, 96, kAdaptive, false, true, true, false, 64, Act::kNone, 0.5f});
    linear({56, 720, 33, kAdaptive, true});
    linear({130, 96, 35, kPlainRms, false, true, false, false, 65});
    linear({7, 30, 31, kBareRms, false, true});
    linear({3, 5, 1, kLayerNorm, true, true, false, true});
    gated(50, 1024, 4096, kAdaptive, Act::kGeluTanh);
    gated(50, 720, 2048, kPlainRms, Act::kSilu);
    gated(10, 96, 160, kAdaptive, Act::kGeluTanh);
    gated(17, 144, 100, kNoNorm, Act::kSilu);
    gated(64, 200, 9, kBareRms, Act::kNone);
    qkv(50, 1024, {8, 1, 1}, 256, kAdaptive, true, false);
    qkv(50, 720, {15, 5, 5}, 64, kPlainRms, true, false);
    qkv(50, 720, {15, 0, 0}, 64, kPlainRms, true, false);
    qkv(32, 144, {2, 2, 2}, 72, kLayerNorm, false, true);
    qkv(10, 96, {4, 1, 1}, 64, kAdaptive, true, true);
    qkv(47, 128, {0, 1, 1}, 64, kPlainRms, true, false);
    qkv(64, 100, {1, 1, 2}, 128, kPlainRms, true, true);
    qkv(9, 40, {6, 2, 2}, 16, kPlainRms, true, true);
    qkv(70, 40, {2, 1, 0}, 80, kNoNorm, true, false);
    euler(50, 1024, 32, true);
    euler(50, 720, 32, false);
    euler(10, 96, 7, true);
    attention(50, 610, 8, 1, 256, 1, true);
    attention(10, 570, 8, 1, 256, 1, true);
    attention(51, 1019, 8, 1, 256, 1, false);
    attention(50, 227, 15, 5, 64, 1, true);
    attention(50, 177, 15, 5, 64, 1, false);
    attention(16, 16, 2, 2, 72, 2, false);
    attention(49, 50, 3, 3, 72, 3, true);
    attention(10, 47, 4, 1, 64, 1, true);
    attention(64, 5, 2, 1, 128, 2, true);
    attention(1, 1, 1, 1, 64, 1, false);
    attention(64, 2500, 4, 2, 64, 1, true);
    std::printf("small_check: %d checks, %d failures, worst error %.2e\n", report.checks, report.failures,
                report.worst);
    return report.failures ? 1 : 0;
  }
};

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  vla::test::Suite suite;
  suite.quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  cudaDeviceProp properties;
  TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n", properties.name);
  TEST_CUDA(cudaStreamCreateWithFlags(&suite.at.stream, cudaStreamNonBlocking));
  suite.at.sms = properties.multiProcessorCount;
  suite.at.arch = properties.major * 10 + properties.minor;
  return suite.all();
}
