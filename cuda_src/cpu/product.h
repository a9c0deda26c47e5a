// The inner product kernel and what surrounds it. Included inside the namespace of an instruction set.
//
// A packed matrix is a row of panels, each kPanel rows of W and all of k: float32 as [k][kPanel], bfloat16 as
// [k / 2][kPanel][2], so that one 32-bit lane holds the two neighbours in k that the bf16 dot product wants.

template <typename T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

inline int panels(int n) { return (n + kPanel - 1) / kPanel; }
inline int even(int k) { return k + (k & 1); }
template <typename T>
inline int64_t panel_size(int k) {
  return static_cast<int64_t>(kPair<T> == 2 ? even(k) : k) * kPanel;
}

inline Vec broadcast_pair(const uint16_t* a, int k, int limit) {
  uint32_t pair = a[k];
  if (k + 1 < limit) pair |= static_cast<uint32_t>(a[k + 1]) << 16;
  return (Vec)(Bits{} + pair);
}

#if defined(__AVX512BF16__)
inline Vec dot(Vec acc, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#else
inline Vec dot(Vec acc, Vec a, Vec b) {
  const Bits x = bits(a), y = bits(b);
  acc += (Vec)(x << 16) * (Vec)(y << 16);
  return acc + (Vec)(x & 0xffff0000u) * (Vec)(y & 0xffff0000u);
}
#endif

// tile (M, kPanel) = A (M, k) times a panel.
template <int M>
void tile_rows(const float* a, int64_t lda, const float* panel, int k, float* tile) {
  Vec acc[M][2];
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec{};
  for (int p = 0; p < k; ++p, panel += kPanel) {
    const Vec b0 = load(panel), b1 = load(panel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Vec x = splat(a[i * lda + p]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  for (int i = 0; i < M; ++i) {
    store(tile + i * kPanel, acc[i][0]);
    store(tile + i * kPanel + kLanes, acc[i][1]);
  }
}

template <int M>
void tile_rows(const uint16_t* a, int64_t lda, const uint16_t* panel, int k, float* tile) {
  Vec acc[M][2];
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec{};
  const int whole = k & ~1;
  for (int p = 0; p < whole; p += 2, panel += 2 * kPanel) {
    Vec b0, b1;
    __builtin_memcpy(&b0, panel, sizeof b0);
    __builtin_memcpy(&b1, panel + kPanel, sizeof b1);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      uint32_t pair;
      __builtin_memcpy(&pair, a + i * lda + p, 4);
      const Vec x = (Vec)(Bits{} + pair);
      acc[i][0] = dot(acc[i][0], x, b0);
      acc[i][1] = dot(acc[i][1], x, b1);
    }
  }
  if (k & 1) {
    Vec b0, b1;
    __builtin_memcpy(&b0, panel, sizeof b0);
    __builtin_memcpy(&b1, panel + kPanel, sizeof b1);
    for (int i = 0; i < M; ++i) {
      const Vec x = broadcast_pair(a + i * lda, whole, k);
      acc[i][0] = dot(acc[i][0], x, b0);
      acc[i][1] = dot(acc[i][1], x, b1);
    }
  }
  for (int i = 0; i < M; ++i) {
    store(tile + i * kPanel, acc[i][0]);
    store(tile + i * kPanel + kLanes, acc[i][1]);
  }
}

// As tile_rows, for a number of rows known at run time, 1 to kRows.
template <typename T>
void product_tile(int rows, const T* a, int64_t lda, const T* panel, int k, float* tile) {
  switch (rows) {
    case 1:
      return tile_rows<1>(a, lda, panel, k, tile);
    case 2:
      return tile_rows<2>(a, lda, panel, k, tile);
    case 3:
      return tile_rows<3>(a, lda, panel, k, tile);
    case 4:
      return tile_rows<4>(a, lda, panel, k, tile);
    case 5:
      return tile_rows<5>(a, lda, panel, k, tile);
    case 6:
      return tile_rows<6>(a, lda, panel, k, tile);
#if defined(__AVX512F__)
    case 7:
      return tile_rows<7>(a, lda, panel, k, tile);
    case 8:
      return tile_rows<8>(a, lda, panel, k, tile);
    case 9:
      return tile_rows<9>(a, lda, panel, k, tile);
    case 10:
      return tile_rows<10>(a, lda, panel, k, tile);
    case 11:
      return tile_rows<11>(a, lda, panel, k, tile);
    case 12:
      return tile_rows<12>(a, lda, panel, k, tile);
#endif
    default:
      return;
  }
}

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

// The left operand of a product as a matrix of T: x itself where it is one already, else norm(x) in scratch.
template <typename T>
struct Left {
  const T* data;
  int64_t ld;
};

inline bool is_plain(const View& x, const Norm& norm, DType act) {
  return norm.kind == NormKind::kNone && x.dtype == act;
}

template <typename T>
Left<T> left_operand(const View& x, const Norm& norm, const Context& c, int step) {
  if (is_plain(x, norm, c.act)) return {x.at<const T>(step), x.ld};
  T* out = reinterpret_cast<T*>(c.scratch);
  constexpr int kRowsAtOnce = 8;
  c.threads->run((x.rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int item, int) {
    for (int i = item * kRowsAtOnce; i < x.rows && i < (item + 1) * kRowsAtOnce; ++i) {
      norm_row(x, i, norm, step, out + static_cast<int64_t>(i) * x.cols);
    }
  });
  return {out, x.cols};
}

inline size_t left_bytes(const View& x, const Norm& norm, DType act) {
  return is_plain(x, norm, act) ? 0 : static_cast<size_t>(x.rows) * x.cols * size_of(act) + 64;
}

// How a product's output is cut into items of work: blocks of rows (kept in the cache of one core) by groups
// of panels. `each(row, rows, panel, thread)` is called for every tile of up to kRows rows.
template <typename Each>
void for_tiles(int m, int panel_count, const Context& c, const Each& each) {
  const int block = 16 * kRows;
  const int blocks = (m + block - 1) / block;
  // Few rows: one panel an item keeps the threads even. Many: fewer, larger items.
  const int group = blocks > 4 ? 4 : 1;
  const int groups = (panel_count + group - 1) / group;
  c.threads->run(blocks * groups, [&](int item, int thread) {
    const int first = item / groups * block, last = first + block < m ? first + block : m;
    const int from = item % groups * group, to = from + group < panel_count ? from + group : panel_count;
    for (int panel = from; panel < to; ++panel) {
      for (int row = first; row < last; row += kRows) {
        each(row, last - row < kRows ? last - row : kRows, panel, thread);
      }
    }
  });
}

// kPanel values of a row starting at column `from`, zeros past the end at `n`.
inline void load_padded(const float* row, int from, int n, float* out) {
  for (int i = 0; i < kPanel; ++i) out[i] = from + i < n ? row[from + i] : 0.0f;
}

// Stores the first `n` of kPanel values into a row of a view.
inline void store_some(const View& v, int step, int row, int col, const float* values, int n) {
  const int64_t at = row * v.ld + col;
  if (v.dtype == DType::kBF16) {
    uint16_t* p = v.at<uint16_t>(step) + at;
    if (n == kPanel) {
      store(p, load(values));
      store(p + kLanes, load(values + kLanes));
    } else {
      for (int i = 0; i < n; ++i) p[i] = to_bf16(values[i]);
    }
  } else {
    float* p = v.at<float>(step) + at;
    for (int i = 0; i < n; ++i) p[i] = values[i];
  }
}

inline void add_some(const View& v, int step, int row, int col, float* values, int n) {
  const int64_t at = row * v.ld + col;
  if (v.dtype == DType::kBF16) {
    const uint16_t* p = v.at<const uint16_t>(step) + at;
    for (int i = 0; i < n; ++i) values[i] += from_bf16(p[i]);
  } else {
    const float* p = v.at<const float>(step) + at;
    for (int i = 0; i < n; ++i) values[i] += p[i];
  }
}
