// What the checks of E4M3 share: operands quantised on the host as the device quantises them, and results in
// E4M3.
#pragma once

#include <functional>

#include "../cuda/large/product.cuh"
#include "compare.cuh"

namespace vla::check {

using Run = std::function<cudaError_t(const cuda::QuantisedProduct&, const Launch&)>;

inline bool quick = false;

// What sums of k products in the matrix unit may add to the error: 2^-13 of a sum for each 32 of k at the
// worst, half of it on average, some of which cancels.
inline double limit_of(int k) { return 6e-3 + 1.5e-6 * k; }

// Columns past `cols` such that rows of E4M3 start on multiples of 16, some of them poison.
inline int aligned_pad(int cols) { return (16 - cols % 16) % 16 + 16; }
inline int pad_of(DType type, int cols, int pad) { return type == DType::kE4M3 ? aligned_pad(cols) : pad; }

// ---- operands as the product sees them
// `v`, a row, in units of `scale` and rounded as the device rounds it.
inline std::vector<double> quantised(const std::vector<double>& v, float scale) {
  std::vector<double> codes;
  for (double e : v) codes.push_back(from_e4m3(to_e4m3(static_cast<float>(e) * (1.0f / scale))));
  return codes;
}

struct PackedE4M3 {
  Weight weight;
  std::vector<std::vector<float>> codes, scales;  // of each part: (n, k), (n)
  double at(int part, int row, const std::vector<double>& x) const {
    const float* w = codes[part].data() + x.size() * row;
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += x[i] * w[i];
    return sum * scales[part][row];
  }
};
// A row as `vla_infer.fp8` quantises it.
inline float quantise_row(const float* row, int k, float* codes) {
  float top = 0.0f;
  for (int i = 0; i < k; ++i)
    top = std::isnan(row[i]) || std::isnan(top) ? NAN : std::max(top, std::fabs(row[i]));
  float scale = top / 448.0f;
  if (scale < 1.17549435e-38f) scale = 1.0f;
  for (int i = 0; i < k; ++i) codes[i] = from_e4m3(to_e4m3(row[i] / scale));
  return scale;
}
// `given`: what the device has, taken for the parts instead of random numbers.
inline PackedE4M3 pack(Packing packing, std::vector<Matrix> given) {
  PackedE4M3 p;
  std::vector<cuda::RawMatrix> raw;
  std::vector<int> n;
  const int k = given[0].view.cols;
  for (Matrix& m : given) {
    const int rows = m.view.rows;
    raw.push_back({m.view.base, m.view.dtype, rows, k, m.view.ld});
    n.push_back(rows);
    p.codes.emplace_back(static_cast<size_t>(rows) * k);
    p.scales.emplace_back(rows);
    for (float& v : m.values) v = std::isnan(v) ? v : from_bf16(to_bf16(v));
    for (int r = 0; r < rows; ++r) {
      const size_t at = static_cast<size_t>(r) * k;
      p.scales.back()[r] = quantise_row(m.values.data() + at, k, p.codes.back().data() + at);
    }
  }
  void* to = device(cuda::packed_bytes_e4m3(packing, n, k));
  CUDA_OK(cuda::pack_e4m3(to, packing, raw, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  p.weight = {to, DType::kE4M3, packing, k, n};
  return p;
}
inline PackedE4M3 random_pack(Packing packing, const std::vector<int>& n, int k) {
  std::vector<Matrix> parts;
  const float size = std::sqrt(3.0f / static_cast<float>(k));
  for (int rows : n) parts.push_back(Matrix::random(rows, k, DType::kBF16, 0, -size, size));
  return pack(packing, std::move(parts));
}

// ---- results
// An E4M3 result, in units of its scale: only what is beyond half a step from `want` counts.
inline void add_code(Result& r, double got, double want) {
  want = std::clamp(want, -448.0, 448.0);
  const double half = 0.5 * power_of_two(spacing_e4m3(static_cast<float>(std::fabs(want))));
  r.nan |= std::isnan(got);
  const double beyond = std::max(0.0, std::fabs(got - want) - half);
  r.error += beyond * beyond;
  r.norm += want * want;
}
inline void add(Result& r, const Matrix& out, int row, int column, double want, float out_scale) {
  if (out.view.dtype == DType::kE4M3) {
    add_code(r, out.at(row, column), want / out_scale);
  } else {
    r.add(out.at(row, column), want);
  }
}
inline const char* type_name(DType t) {
  return t == DType::kF32 ? "f32" : t == DType::kBF16 ? "bf16" : "e4m3";
}

// run: nullptr means by the launcher; otherwise what make_product makes goes to `run`.
template <typename T>
void launch_product(const T& op, const Launch& launch, const Run& run) {
  Launch at = launch;
  cuda::QuantisedProduct p;
  if constexpr (requires { cuda::make_product(op, at, &p); }) {
    if (run) {
      CUDA_OK(cuda::make_product(op, at, &p));
      CUDA_OK(run(p, at));
      CUDA_OK(cudaDeviceSynchronize());
      return;
    }
  }
  CUDA_OK(cuda::launch_large(op, launch));
  CUDA_OK(cudaDeviceSynchronize());
}
// The same bytes again, over other poison and after the scratch was overwritten.
template <typename T>
bool same_bits(const T& op, const Matrix& out, const Launch& launch, const Run& run) {
  const View& v = out.view;
  const size_t row = v.cols * size_of(v.dtype), stride = v.ld * size_of(v.dtype);
  const auto fetch = [&] {
    std::vector<std::byte> bytes(row * v.rows);
    CUDA_OK(cudaMemcpy2D(bytes.data(), row, v.base, stride, row, v.rows, cudaMemcpyDeviceToHost));
    return bytes;
  };
  const auto first = fetch();
  for (int turn = 0; turn < 5; ++turn) {
    CUDA_OK(cudaMemset2D(v.base, stride, 0x11 * turn, row, v.rows));
    CUDA_OK(cudaMemset(launch.scratch, 0x33 * turn, std::min<size_t>(launch.scratch_bytes, 1 << 20)));
    launch_product(op, launch, run);
    if (fetch() != first) return false;
  }
  return true;
}
inline void report_bits(const std::string& name, bool same) {
  if (same) return;
  ++failures;
  std::printf("FAIL %-74s other bits the second time\n", name.c_str());
}

}  // namespace vla::check
