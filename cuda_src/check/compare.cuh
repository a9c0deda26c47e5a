// What the programs that check the large kernels share: cases dealt among processes, errors against double
// precision, norms and activations in it.
#pragma once

#include <algorithm>
#include <cmath>

#include "device.cuh"

namespace vla::check {

using cuda::Launch;

inline int failures = 0;
inline Launch base;

// Cases are dealt among processes: this one runs every `parts`-th.
inline int part = 0, parts = 1, cases = 0;
inline bool mine() { return cases++ % parts == part; }

// Rows and columns at which an output is compared.
inline std::vector<int> sample(int size, int count) {
  std::vector<int> at;
  if (size <= count) {
    for (int i = 0; i < size; ++i) at.push_back(i);
    return at;
  }
  for (int i = 0; i < count / 4; ++i) at.push_back(size - 1 - i);
  while (static_cast<int>(at.size()) < count) at.push_back(static_cast<int>(generator()() % size));
  return at;
}

struct Result {
  double error = 0, norm = 0;
  bool nan = false;
  void add(double got, double want) {
    nan |= std::isnan(got);
    error += (got - want) * (got - want);
    norm += want * want;
  }
};

inline void report(const std::string& name, const Result& r, std::vector<Matrix*> outs, double limit) {
  bool nan = r.nan, outside = false;
  for (Matrix* out : outs) {
    for (float v : out->values) nan |= std::isnan(v);
    outside |= out->touched_outside;
  }
  const double relative = std::sqrt(r.error / std::max(r.norm, 1e-300));
  const bool ok = !nan && !outside && relative <= limit;
  failures += !ok;
  std::printf("%-4s %-74s %.2e%s%s\n", ok ? "ok" : "FAIL", name.c_str(), relative, nan ? " NaN" : "",
              outside ? " wrote outside" : "");
}

struct NormCase {
  Norm norm;
  Matrix weight, bias;
};
inline NormCase make_norm(NormKind kind, int k) {
  NormCase n;
  n.norm.kind = kind;
  if (kind == NormKind::kNone) return n;
  n.norm.eps = 1e-6f;
  n.norm.plus = kind == NormKind::kRms ? 1.0f : 0.0f;
  n.weight = Matrix::random(1, k, DType::kF32, 3, -1, 1);
  n.norm.weight = n.weight.view;
  if (kind == NormKind::kLayer) {
    n.bias = Matrix::random(1, k, DType::kF32, 0, -1, 1);
    n.norm.bias = n.bias.view;
  }
  return n;
}
inline std::vector<double> normed(const NormCase& n, const Matrix& x, int row) {
  const int k = x.view.cols;
  std::vector<double> v(k);
  double mean = 0, squares = 0;
  for (int i = 0; i < k; ++i) mean += v[i] = x.at(row, i);
  if (n.norm.kind == NormKind::kNone) return v;
  mean = n.norm.kind == NormKind::kLayer ? mean / k : 0;
  for (double& e : v) e -= mean;
  for (double e : v) squares += e * e;
  const double scale = 1 / std::sqrt(squares / k + n.norm.eps);
  for (int i = 0; i < k; ++i) {
    v[i] = v[i] * scale * (n.weight.at(0, i) + n.norm.plus) + (n.norm.bias ? n.bias.at(0, i) : 0);
  }
  return v;
}
inline double activated(double x, Act act) {
  if (act == Act::kSilu) return x / (1 + std::exp(-x));
  if (act == Act::kGeluTanh)
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return x;
}
inline double dot(const std::vector<double>& x, const Matrix& w, int row) {
  double sum = 0;
  const float* from = w.values.data() + static_cast<size_t>(row) * w.view.cols;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * from[i];
  return sum;
}

inline const char* const kActs[] = {"none", "gelu", "silu"};
inline const char* const kNorms[] = {"none", "layer", "rms"};

}  // namespace vla::check
