// The left operand of a product: norm(x), as the matrix that the product kernel reads. Included inside the
// namespace of an instruction set.

// Writes one row of norm(x) as T. x has `n` values.
template <typename In, typename Out>
void norm_row(const In* x, int n, const Norm& norm, int step, Out* y) {
  const float* weight = norm.weight ? norm.weight.at<float>(step) : nullptr;
  const float* bias = norm.bias ? norm.bias.at<float>(step) : nullptr;
  float mean = 0.0f;
  const int whole = n - n % kLanes;
  if (norm.kind == NormKind::kLayer) {
    Vec total{};
    for (int i = 0; i < whole; i += kLanes) total += load(x + i);
    mean = sum(total);
    for (int i = whole; i < n; ++i) mean += get(x + i);
    mean /= static_cast<float>(n);
  }
  float factor = 1.0f;
  if (norm.kind != NormKind::kNone) {
    Vec total{};
    for (int i = 0; i < whole; i += kLanes) {
      const Vec d = load(x + i) - mean;
      total += d * d;
    }
    float squares = sum(total);
    for (int i = whole; i < n; ++i) squares += (get(x + i) - mean) * (get(x + i) - mean);
    factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + norm.eps);
  }
  for (int i = 0; i < whole; i += kLanes) {
    Vec v = (load(x + i) - mean) * factor;
    if (weight) v *= load(weight + i) + norm.plus;
    if (bias) v += load(bias + i);
    store(y + i, v);
  }
  for (int i = whole; i < n; ++i) {
    float v = (get(x + i) - mean) * factor;
    if (weight) v *= weight[i] + norm.plus;
    if (bias) v += bias[i];
    put(y + i, v);
  }
}

template <typename Out>
void norm_row(const View& x, int row, const Norm& norm, int step, Out* y) {
  if (x.dtype == DType::kBF16) {
    norm_row(x.at<const uint16_t>(step) + row * x.ld, x.cols, norm, step, y);
  } else {
    norm_row(x.at<const float>(step) + row * x.ld, x.cols, norm, step, y);
  }
}

// Rows of a matrix in scratch: a whole number of cache lines, and an odd one, so that the rows of a tile do
// not all fall into the same few places of the first-level cache.
template <typename T>
inline int64_t scratch_ld(int cols) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (cols + line - 1) / line;
  return (lines | 1) * line;
}

// x itself where it is a matrix of T already and its rows lie well.
template <typename T>
inline bool is_plain(const View& x, const Norm& norm) {
  if (x.dtype != (sizeof(T) == 2 ? DType::kBF16 : DType::kF32) || sizeof(T) == 1) return false;
  return norm.kind == NormKind::kNone && (x.ld * sizeof(T) % 2048 != 0 || x.rows < kRows);
}

inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// int8: the bytes, then a scale for each row, then a row of float32 for each thread.
template <typename T>
inline size_t left_bytes(const View& x, const Norm& norm, int threads) {
  if (is_plain<T>(x, norm)) return 0;
  const size_t matrix = static_cast<size_t>(x.rows * scratch_ld<T>(x.cols)) * sizeof(T) + 64;
  if (sizeof(T) != 1) return matrix;
  return matrix + whole_lines(x.rows * sizeof(float)) + threads * whole_lines(x.cols * sizeof(float)) + 64;
}

template <typename T>
Left<T> left_operand(const View& x, const Norm& norm, const Context& c, int step) {
  if (is_plain<T>(x, norm)) return {x.at<const T>(step), x.ld};
  T* out = reinterpret_cast<T*>(c.scratch);
  const int64_t ld = scratch_ld<T>(x.cols);
  [[maybe_unused]] float* scales = reinterpret_cast<float*>(c.scratch + whole_lines(x.rows * ld * sizeof(T)));
  [[maybe_unused]] std::byte* rows =
      reinterpret_cast<std::byte*>(scales) + whole_lines(x.rows * sizeof(float));
  constexpr int kRowsAtOnce = 8;
  c.run((x.rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int item, [[maybe_unused]] int thread) {
    for (int i = item * kRowsAtOnce; i < x.rows && i < (item + 1) * kRowsAtOnce; ++i) {
      if constexpr (sizeof(T) == 1) {
        if (norm.kind == NormKind::kNone && x.dtype == DType::kBF16) {
          scales[i] = quantize_row(x.at<const uint16_t>(step) + i * x.ld, x.cols, kOffset, out + i * ld);
          continue;
        }
        float* row = reinterpret_cast<float*>(rows + thread * whole_lines(x.cols * sizeof(float)));
        norm_row(x, i, norm, step, row);
        scales[i] = quantize_row(row, x.cols, kOffset, out + i * ld);
      } else {
        norm_row(x, i, norm, step, out + i * ld);
      }
    }
  });
  return {out, ld, scales};
}
