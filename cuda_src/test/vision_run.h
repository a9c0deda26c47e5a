// Running the persistent vision encoder in its check and its timing: a case's operations and memory on the
// device, the same layers by launches and in double precision, its counter, the report of waits that were
// given up.
#pragma once

#include <cstring>

#include "../cuda/vision/vision.h"
#include "harness.h"
#include "vision_exact.h"

namespace vla::test::vision {

namespace vis = cuda::vision;
using vis::Bits;
using vis::Kind;
using vis::Table;

struct Sizes {
  const char* name;
  int layers, cameras, keys, heads, head_dim, mlp;
  int width() const { return heads * head_dim; }
  int rows() const { return cameras * keys; }
};

class Case {
 public:
  explicit Case(const Sizes& s) : s_(s) {
    const int m = s.rows(), n = s.width();
    input = matrix(m, n, DType::kBF16, 1.0f, 0.3f, true);
    const View q = matrix(m, n), k = matrix(m, n), v = matrix(m, n), mixed = matrix(m, n),
               h = matrix(m, s.mlp);
    const View one = matrix(m, n), two = matrix(m, n);
    View state = input;
    for (int i = 0; i < s.layers; ++i) {
      Qkv qkv;
      qkv.x = state, qkv.q = q, qkv.k = k, qkv.v = v, qkv.head_dim = s.head_dim, qkv.norm = norm();
      qkv.q_bias = vector(n), qkv.k_bias = vector(n), qkv.v_bias = vector(n);
      qkv.w = weight({n, n, n}, n, 1.5f);
      ops.push_back(qkv);
      Attention a;
      a.q = q, a.k = k, a.v = v, a.out = mixed, a.head_dim = s.head_dim, a.batch = s.cameras;
      ops.push_back(a);
      Linear o;
      o.x = mixed, o.out = one, o.residual = state, o.bias = vector(n), o.w = weight({n}, n, 1.5f);
      ops.push_back(o);
      Linear fc1;
      fc1.x = one, fc1.out = h, fc1.bias = vector(s.mlp), fc1.norm = norm(), fc1.act = Act::kGeluTanh;
      fc1.w = weight({s.mlp}, n, 1.5f);
      ops.push_back(fc1);
      Linear fc2;
      fc2.x = h, fc2.out = state = two, fc2.residual = one, fc2.bias = vector(n),
      fc2.w = weight({n}, s.mlp, 1.5f);
      ops.push_back(fc2);
    }
    output = state;
    TEST_CUDA(cudaMallocHost(reinterpret_cast<void**>(&report_), kReportWords * 4));  // as in a plan
    TEST_CUDA(cudaMemset(report_, 0, kReportWords * 4));
    TEST_CUDA(cudaDeviceSynchronize());
  }
  ~Case() {
    for (std::byte* p : memory_) cudaFree(p);
    cudaFreeHost(report_);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  std::string make(const vis::Settings& settings) {
    const vis::Memory memory{[this](size_t bytes) {
                               scratch_.push_back({take(bytes), bytes});
                               return scratch_.back().first;
                             },
                             [this](const vis::Matrix& w, const vis::Folded& f) {
                               auto* to = reinterpret_cast<vis::Term*>(take(sizeof(vis::Term) * w.n));
                               TEST_CUDA(vis::fold(to, w, f, nullptr));
                               return static_cast<const vis::Term*>(to);
                             },
                             [this](int n, const vis::Folded& f) {
                               auto* to = reinterpret_cast<vis::Term*>(take(sizeof(vis::Term) * n));
                               TEST_CUDA(vis::pair_up(to, n, f, nullptr));
                               return static_cast<const vis::Term*>(to);
                             }};
    scratch_.clear();
    std::vector<vis::Matrix> weights;
    if (const std::string why = vis::build(table, weights, ops, vis::find_layers(ops), settings, memory);
        !why.empty())
      return why;
    table.counter = reinterpret_cast<unsigned*>(take(cuda::head::kCounterWords * 4));
    table.report = report_, table.patience = 1'000'000'000;
    TEST_CUDA(cudaDeviceSynchronize());
    weights_ = weights;
    TEST_CUDA(encoder.make(table, weights_));
    return {};
  }
  // NaN where anything is written.
  void poison() {
    for (const View& v : {output}) TEST_CUDA(cudaMemset(v.base, 0xff, size_t(v.rows) * v.ld * 2));
    for (const auto& [p, bytes] : scratch_)
      if (p != reinterpret_cast<std::byte*>(table.parts)) TEST_CUDA(cudaMemset(p, 0xff, bytes));
    TEST_CUDA(cudaDeviceSynchronize());  // what runs next may be on a stream that waits for no other
  }
  bool ended(const std::string& what) {
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
      std::printf("FAIL %s: %s\n", what.c_str(), cudaGetErrorString(error));
      std::exit(2);
    }
    if (report_[0] == 0) return true;
    std::printf("GAVE UP %s: %u waits\n", what.c_str(), report_[0]);
    for (unsigned i = 0; i < report_[0] && i < 16; ++i) {
      const unsigned* l = &report_[8 + 8 * i];
      std::printf("  block %u thread %u, phase %u: waits for kind %u, %u, has %u\n", l[2], l[3], l[1], l[0],
                  l[4], l[5]);
    }
    TEST_CUDA(cudaMemset(report_, 0, kReportWords * 4));
    return false;
  }
  bool run(const std::string& what) {
    TEST_CUDA(encoder.launch(nullptr));
    return ended(what);
  }
  std::vector<Bits> bits() const {
    std::vector<Bits> got(size_t(output.rows) * output.cols);
    TEST_CUDA(cudaMemcpy2D(got.data(), output.cols * 2, output.base, output.ld * 2, output.cols * 2,
                           output.rows, cudaMemcpyDeviceToHost));
    return got;
  }
  static std::vector<double> doubles(const void* base, int64_t ld, int rows, int cols) {
    std::vector<Bits> raw(size_t(rows) * cols);
    TEST_CUDA(cudaMemcpy2D(raw.data(), cols * 2, base, ld * 2, cols * 2, rows, cudaMemcpyDeviceToHost));
    std::vector<double> all;
    for (const Bits b : raw) {
      const uint32_t u = uint32_t(b) << 16;
      float f;
      std::memcpy(&f, &u, 4);
      all.push_back(double(f));
    }
    return all;
  }
  static std::vector<double> doubles(const View& v) { return doubles(v.base, v.ld, v.rows, v.cols); }

  void launches(cuda::Launch at) const {
    at.pdl = false;
    for (const Op& op : ops) {
      TEST_CUDA(std::visit(
          [&](const auto& o) -> cudaError_t {
            if constexpr (requires { cuda::launch_large(o, at); }) {
              return cuda::launch_large(o, at);
            } else {
              return cudaErrorNotSupported;
            }
          },
          op));
      at.pdl = true;
    }
  }

  // The layers in double precision; q, k and v, attention and fc1 are the last layer's.
  struct Exact {
    std::vector<double> qkv, attention, fc1, out;
  };
  Exact exact() const {
    const int m = s_.rows(), n = s_.width();
    double *x, *y, *qkv, *mixed, *h;
    for (double** p : {&x, &y, &mixed}) TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(p), size_t(m) * n * 8));
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&qkv), size_t(m) * 3 * n * 8));
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&h), size_t(m) * s_.mlp * 8));
    const int64_t all = int64_t(m) * n;
    widen_kernel<<<unsigned((all + 255) / 256), 256>>>(x, reinterpret_cast<const bf16*>(input.base), m, n,
                                                       input.ld);
    const auto f = [](const View& v) { return reinterpret_cast<const float*>(v.base); };
    const auto product = [&](double* out, const double* from, const Linear& o, const double* residual,
                             int cols, int k) {
      product_kernel<<<dim3((cols + 15) / 16, (m + 15) / 16), dim3(16, 16)>>>(
          out, from, static_cast<const bf16*>(o.w.data), f(o.bias), residual, m, cols, k, (k + 7) / 8 * 8,
          o.act == Act::kGeluTanh);
    };
    for (size_t i = 0; i < ops.size(); i += 5) {
      const Qkv& a = std::get<Qkv>(ops[i]);
      norm_kernel<<<m, 256>>>(y, x, n, a.norm.eps, f(a.norm.weight), f(a.norm.bias));
      const View* biases[] = {&a.q_bias, &a.k_bias, &a.v_bias};
      double* part;
      TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&part), size_t(m) * n * 8));
      for (int j = 0; j < 3; ++j) {
        product_kernel<<<dim3((n + 15) / 16, (m + 15) / 16), dim3(16, 16)>>>(
            part, y, static_cast<const bf16*>(a.w.data) + int64_t(j) * n * n, f(*biases[j]), nullptr, m, n, n,
            n, false);
        TEST_CUDA(cudaMemcpy2D(qkv + j * n, size_t(3) * n * 8, part, size_t(n) * 8, size_t(n) * 8, m,
                               cudaMemcpyDeviceToDevice));
      }
      cudaFree(part);
      attention_kernel<<<dim3(m, s_.heads), 128, s_.keys * 8>>>(mixed, qkv, s_.keys, s_.heads, s_.head_dim);
      product(y, mixed, std::get<Linear>(ops[i + 2]), x, n, n);
      std::swap(x, y);
      const Linear& fc1 = std::get<Linear>(ops[i + 3]);
      norm_kernel<<<m, 256>>>(y, x, n, fc1.norm.eps, f(fc1.norm.weight), f(fc1.norm.bias));
      product(h, y, fc1, nullptr, s_.mlp, n);
      product(y, h, std::get<Linear>(ops[i + 4]), x, n, s_.mlp);
      std::swap(x, y);
    }
    TEST_CUDA(cudaDeviceSynchronize());
    const auto read = [&](const double* p, int cols) {
      std::vector<double> v(size_t(m) * cols);
      TEST_CUDA(cudaMemcpy(v.data(), p, v.size() * 8, cudaMemcpyDeviceToHost));
      return v;
    };
    Exact e{read(qkv, 3 * n), read(mixed, n), read(h, s_.mlp), read(x, n)};
    for (double* p : {x, y, qkv, mixed, h}) cudaFree(p);
    return e;
  }

  void stamp(bool on) {
    const size_t bytes = size_t(1 + table.layers * vis::kKinds) * vis::kStamps * 8;
    if (on && !stamps_) stamps_ = reinterpret_cast<int64_t*>(take(bytes));
    table.stamps = on ? stamps_ : nullptr;
    TEST_CUDA(encoder.make(table, weights_));
  }
  std::vector<int64_t> stamps() const {
    std::vector<int64_t> s(size_t(1 + table.layers * vis::kKinds) * vis::kStamps);
    TEST_CUDA(cudaMemcpy(s.data(), stamps_, s.size() * 8, cudaMemcpyDeviceToHost));
    return s;
  }
  // NaN into, or the first number back into, an element of the input.
  void set_input(Bits b) {
    TEST_CUDA(cudaMemcpy(input.base + ((input.rows - 2) * input.ld + 3) * 2, &b, 2, cudaMemcpyHostToDevice));
  }
  Bits get_input() const {
    Bits b;
    TEST_CUDA(cudaMemcpy(&b, input.base + ((input.rows - 2) * input.ld + 3) * 2, 2, cudaMemcpyDeviceToHost));
    return b;
  }

  std::vector<Op> ops;
  View input, output;
  Table table;
  vis::Encoder encoder;
  const Sizes& sizes() const { return s_; }

 private:
  static constexpr int kReportWords = 8 + 8 * 64;
  std::byte* take(size_t bytes) {
    std::byte* p;
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&p), bytes + 256));
    TEST_CUDA(cudaMemset(p, 0, bytes + 256));
    memory_.push_back(p);
    return p;
  }
  View matrix(int rows, int cols, DType type = DType::kBF16, float scale = 0.0f, float mean = 0.0f,
              bool outliers = false) {
    View v{take(size_t(rows) * cols * size_of(type)), rows, cols, cols, 0, type};
    const int64_t all = int64_t(rows) * cols;
    if (scale != 0.0f)
      fill_kernel<<<unsigned((all + 255) / 256), 256>>>(v.base, type == DType::kF32, rows, cols, cols, scale,
                                                        mean, ++seed_, outliers);
    return v;
  }
  View vector(int n, float mean = 0.0f) { return matrix(1, n, DType::kF32, 0.3f, mean); }
  Norm norm() {
    Norm n;
    n.kind = NormKind::kLayer, n.eps = 1e-6f, n.weight = vector(s_.width(), 1.0f),
    n.bias = vector(s_.width());
    return n;
  }
  Weight weight(const std::vector<int>& n, int k, float scale) {
    int rows = 0;
    for (int part : n) rows += part;
    const int ld = (k + 7) / 8 * 8;
    std::byte* p = take(size_t(rows) * ld * 2);
    const int64_t all = int64_t(rows) * k;
    fill_kernel<<<unsigned((all + 255) / 256), 256>>>(p, false, rows, k, ld, scale / std::sqrt(float(k)),
                                                      0.0f, ++seed_, false);
    return {p, DType::kBF16, Packing::kStacked, k, n};
  }

  Sizes s_;
  std::vector<std::byte*> memory_;
  std::vector<std::pair<std::byte*, size_t>> scratch_;
  std::vector<vis::Matrix> weights_;
  unsigned* report_ = nullptr;
  int64_t* stamps_ = nullptr;
  uint32_t seed_ = 20261123;
};

}  // namespace vla::test::vision
