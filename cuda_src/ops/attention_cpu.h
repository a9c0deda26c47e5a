// out = softmax(q k^T / sqrt(d) + mask) v by head; see ops.h for shapes.
//
// Keys and values of one head are laid out as packed matrices (K as W (n, d), V^T as W (d, n)), so that both
// products run on the product kernel, kRows queries at a time: their scores stay in the cache of one core.

//
// P is what the products read: the type of q, k and v, or bytes (int8): then q and k have a scale for each
// row, v for each column, and a probability p is the byte round(255 p); softmax divides by the sum of what
// was rounded.

template <typename P>
struct AttentionPlan {
  int heads, kv_heads, n, m, d;  // n keys and m queries a batch
  int64_t k_size, v_size, score_ld, q_ld;

  explicit AttentionPlan(const Attention& op)
      : heads(op.q.cols / op.head_dim),
        kv_heads(op.k.cols / op.head_dim),
        n(op.k.rows / op.batch),
        m(op.q.rows / op.batch),
        d(op.head_dim),
        k_size(panels(n) * panel_size<P>(d)),
        v_size(panels(d) * panel_size<P>(n)),
        score_ld(scratch_ld<float>(panels(n) * kPanel)),
        q_ld(sizeof(P) == 1 ? scratch_ld<P>(d) : 0) {}

  // Packed keys and values of every head; then for each thread, of kRows queries: float scores, probabilities
  // and in int8 the queries.
  size_t packed_bytes(int batch) const {
    return whole_lines(sizeof(P) * batch * kv_heads * (k_size + v_size));
  }
  size_t thread_bytes() const {
    return whole_lines(kRows * (score_ld * (sizeof(float) + sizeof(P)) + q_ld * sizeof(P)));
  }
  size_t bytes(int batch, int threads) const { return packed_bytes(batch) + threads * thread_bytes() + 64; }
};

// Heads lie beside each other in a row: that of the next row is far away, and is fetched some rows before its
// turn. Beyond the last row this asks for memory that may not be there, which does no harm.
constexpr int kRowsAhead = 8;
template <typename T>
inline void fetch_row(const T* row, int n) {
  for (int i = 0; i < n; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + i, 0, 3);
}

// Keys of one head as W (n, d): a transposition, of 32-bit lanes while pairs are whole.
template <typename T>
void pack_keys(const T* k, int64_t ld, int n, int d, T* out) {
  const int64_t size = panel_size<T>(d);
  const int whole = d / kPair<T>;
  for (int first = 0; first < n; first += kPanel) {
    T* panel = out + first / kPanel * size;
    const int rows = n - first < kPanel ? n - first : kPanel;
    if (rows < kPanel) __builtin_memset(panel, 0, sizeof(T) * size);
    for (int j = 0; j < rows; ++j) {
      const T* from = k + (first + j) * ld;
      fetch_row(from + kRowsAhead * ld, d);
      T* to = panel + j * kPair<T>;
      for (int p = 0; p < whole; ++p, to += kPanel * kPair<T>) {
        __builtin_memcpy(to, from + p * kPair<T>, 4);
      }
      for (int p = whole * kPair<T>; p < d + d % kPair<T>; ++p) *to++ = p < d ? from[p] : T{};
    }
  }
}

// Values of one head as W (d, n): rows as they are, in bfloat16 two by two.
template <typename T>
void pack_values(const T* v, int64_t ld, int n, int d, T* out) {
  const int64_t size = panel_size<T>(n);
  for (int first = 0; first < d; first += kPanel) {
    T* panel = out + first / kPanel * size;
    const int cols = d - first < kPanel ? d - first : kPanel;
    for (int j = 0; j < n; j += kPair<T>, panel += kPanel * kPair<T>) {
      const T* a = v + j * ld + first;
      fetch_row(a + kRowsAhead * ld, kPanel);
      if constexpr (sizeof(T) == 2) {
        const T* b = a + ld;
        fetch_row(b + kRowsAhead * ld, kPanel);
        const bool last = j + 1 >= n;
        if (cols == kPanel && !last) {
          for (int i = 0; i < kPanel; ++i) {
            const uint32_t pair = a[i] | static_cast<uint32_t>(b[i]) << 16;
            __builtin_memcpy(panel + 2 * i, &pair, 4);
          }
          continue;
        }
        for (int i = 0; i < kPanel; ++i) {
          panel[2 * i] = i < cols ? a[i] : T{};
          panel[2 * i + 1] = i < cols && !last ? b[i] : T{};
        }
      } else {
        for (int i = 0; i < kPanel; ++i) panel[i] = i < cols ? a[i] : T{};
      }
    }
  }
}

// The same in int8, from whatever type the keys have.
template <typename T>
void pack_keys(const T* k, int64_t ld, int n, int d, uint8_t* out) {
  const int64_t size = panel_size<uint8_t>(d);
  for (int first = 0; first < n; first += kPanel) {
    uint8_t* panel = out + first / kPanel * size;
    float* scales = reinterpret_cast<float*>(panel);
    int32_t* starts = reinterpret_cast<int32_t*>(scales + kPanel);
    const int rows = n - first < kPanel ? n - first : kPanel;
    if (rows < kPanel) __builtin_memset(panel, 0, size);
    for (int j = 0; j < rows; ++j) {
      uint8_t row[kMaxHead + kLanes];
      int32_t sum;
      fetch_row(k + (first + j + kRowsAhead) * ld, d);
      scales[j] = quantize_row(k + (first + j) * ld, d, 0, row, &sum);
      starts[j] = -kOffset * sum;
      uint8_t* to = panel + 8 * kPanel + j * 4;
      for (int p = 0; p < d; p += 4, to += 4 * kPanel) __builtin_memcpy(to, row + p, 4);
    }
  }
}

template <typename T>
void pack_values(const T* v, int64_t ld, int n, int d, uint8_t* out) {
  const int64_t size = panel_size<uint8_t>(n);
  for (int first = 0; first < d; first += kPanel) {
    uint8_t* panel = out + first / kPanel * size;
    for (int part = 0; part < 2; ++part) {
      const int at = first + part * kLanes;
      const int cols = at < d ? d - at : 0;
      Bits top{};
      for (int j = 0; j < n; ++j) {
        fetch_row(v + (j + kRowsAhead) * ld + at, kLanes);
        top = max(magnitude(load_some(v + j * ld + at, cols)), top);
      }
      Vec factor;
      for (int i = 0; i < kLanes; ++i) {
        const Scale scale = scale_of(top[i]);
        reinterpret_cast<float*>(panel)[part * kLanes + i] = scale.scale;
        factor[i] = scale.inverse;
      }
      Ints sums{};
      uint8_t* to = panel + 8 * kPanel + part * kLanes * 4;
      for (int j = 0; j < n; j += 4, to += 4 * kPanel) {
        Bits four{};
        for (int i = 0; i < 4 && j + i < n; ++i) {
          const Bits q = to_int8(load_some(v + (j + i) * ld + at, cols), factor);
          sums += (Ints)(q << 24) >> 24;
          four |= (q & 0xffu) << (8 * i);
        }
        __builtin_memcpy(to, &four, sizeof four);
      }
      sums *= 128 - kOffset;  // a probability's byte stands for 128 more than it says where it is signed
      __builtin_memcpy(panel + 4 * kPanel + part * sizeof sums, &sums, sizeof sums);
    }
  }
}

// Hides the scores of keys whose block is above the query's.
inline void mask_row(float* scores, int n, const int32_t* blocks, int64_t ld, int seen) {
  if (ld != 1) {
    for (int j = 0; j < n; ++j) {
      if (blocks[j * ld] > seen) scores[j] = -__builtin_inff();
    }
    return;
  }
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Ints block;
    __builtin_memcpy(&block, blocks + j, sizeof block);
    store(scores + j, block > Ints{} + seen ? splat(-__builtin_inff()) : load(scores + j));
  }
  for (; j < n; ++j) {
    if (blocks[j] > seen) scores[j] = -__builtin_inff();
  }
}

inline void put(uint8_t* p, float v) {
  *p = static_cast<uint8_t>(static_cast<int>(255.0f * v) + kOffset - 128);
}

// Writes exp(x) as P; returns what was written.
template <typename P>
inline Vec put_exp(P* p, Vec e) {
  store(p, e);
  return e;
}
inline Vec put_exp(uint8_t* p, Vec e) {
  const Vec shifted = e * 255.0f + splat(12582912.0f);
  store_bytes(p, bits(shifted) + static_cast<uint32_t>(kOffset - 128));
  return shifted - 12582912.0f;
}

// Where scores lie among floats, and softmax of those of one row as unnormalised P.
struct Scores {
  float* first;
  int64_t ld;
  int n, padded;

  Scores(float* to, int64_t apart, int count)
      : first(to), ld(apart), n(count), padded((count + kLanes - 1) / kLanes * kLanes) {}

  // The greatest of a row; hides what follows its n scores. Not a number counts as none.
  float highest(int row) const {
    float* at = first + row * ld;
    for (int j = n; j < padded; ++j) at[j] = -__builtin_inff();
    Vec tops[4];
    for (Vec& top : tops) top = splat(-__builtin_inff());
    int j = 0;
    for (; j + 4 * kLanes <= padded; j += 4 * kLanes) {
      for (int i = 0; i < 4; ++i) tops[i] = max(load(at + j + i * kLanes), tops[i]);
    }
    for (; j < padded; j += kLanes) tops[0] = max(load(at + j), tops[0]);
    return highest_of(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  }

  // Softmax of a row as unnormalised P; returns 1 / sum, or 0 where nothing is seen. factor: of a score in
  // the exponent of 2.
  template <typename P>
  float softmax(int row, float highest, float factor, P* p) const {
    const float* at = first + row * ld;
    if (highest == -__builtin_inff()) {
      bool broken = false;
      for (int j = 0; j < n; ++j) broken = broken || at[j] != at[j];
      for (int j = 0; j < padded; ++j) put(p + j, 0.0f);
      return broken ? __builtin_nanf("") : 0.0f;
    }
    constexpr bool kExact = sizeof(P) == 4;
    const float most = kExact ? highest : highest * factor;
    Vec total{};
    for (int j = 0; j < padded; j += kLanes) {
      const Vec x = load(at + j);
      total += put_exp(p + j, exp2<kExact>(kExact ? (x - most) * factor : x * factor - most));
    }
    return 1.0f / sum(total);
  }
};

// P: what the products read, T: what q, k and v are.
template <typename P, typename T>
void run_attention(const Attention& op, const Context& c, int step) {
  const AttentionPlan<P> plan(op);
  const int n = plan.n, d = plan.d, group = plan.heads / plan.kv_heads, packs = op.batch * plan.kv_heads;
  P* const keys = reinterpret_cast<P*>(c.scratch);
  P* const values = keys + packs * plan.k_size;
  std::byte* const own = c.scratch + plan.packed_bytes(op.batch);
  c.run(2 * packs, [&](int item, int) {
    const int pack = item / 2, batch = pack / plan.kv_heads, head = pack % plan.kv_heads;
    const View& from = item % 2 ? op.v : op.k;
    const T* rows = from.at<const T>(step) + int64_t{batch} * n * from.ld + head * d;
    if (item % 2) {
      pack_values(rows, from.ld, n, d, values + pack * plan.v_size);
    } else {
      pack_keys(rows, from.ld, n, d, keys + pack * plan.k_size);
    }
  });
  const float factor = 1.44269504f / __builtin_sqrtf(static_cast<float>(d));
  const int tiles = (plan.m + kRows - 1) / kRows, height = (plan.m + tiles - 1) / tiles;
  c.run(op.batch * plan.heads * tiles, [&](int item, int thread) {
    const int first = item % tiles * height, head = item / tiles % plan.heads;
    const int batch = item / tiles / plan.heads, kv = batch * plan.kv_heads + head / group;
    const int rows = plan.m - first < height ? plan.m - first : height;
    if (rows <= 0) return;
    const int64_t row = int64_t{batch} * plan.m + first;
    for (int col = head * d; col < (head + 1) * d; col += kPanel) {
      fetch_tile(op.q, step, row, rows, col);
      fetch_tile(op.out, step, row, rows, col);
    }
    float* s = reinterpret_cast<float*>(own + thread * plan.thread_bytes());
    P* p = reinterpret_cast<P*>(s + kRows * plan.score_ld);
    const T* queries = op.q.at<const T>(step) + row * op.q.ld + head * d;
    float scales[kRows];
    Left<P> q{};
    if constexpr (sizeof(P) == 1) {
      P* bytes = p + kRows * plan.score_ld;
      for (int i = 0; i < rows; ++i) {
        scales[i] = quantize_row(queries + i * op.q.ld, d, kOffset, bytes + i * plan.q_ld);
      }
      q = {bytes, plan.q_ld, scales};
    } else {
      q = {queries, op.q.ld};
    }
    for (int panel = 0; panel < panels(n); ++panel) {
      product_tile(rows, q, 0, keys + kv * plan.k_size + panel * panel_size<P>(d), d, s + panel * kPanel,
                   plan.score_ld);
    }
    for (int i = 0; i < rows && op.q_block; ++i) {
      const int seen = op.q_block.at<const int32_t>(step)[(first + i) * op.q_block.ld];
      mask_row(s + i * plan.score_ld, n, op.k_block.at<const int32_t>(step), op.k_block.ld, seen);
    }
    // All maxima first: each waits for its last steps, not for those of the others.
    const Scores scores(s, plan.score_ld, n);
    float highest[kRows], inverse[kRows];
    for (int i = 0; i < rows; ++i) highest[i] = scores.highest(i);
    for (int i = 0; i < rows; ++i) inverse[i] = scores.softmax(i, highest[i], factor, p + i * plan.score_ld);
    const Left<P> weights{p, plan.score_ld, inverse};
    View out = op.out;
    out.cols = (head + 1) * d;  // a panel past the head's last column must not write into the next head
    for (int panel = 0; panel < panels(d); ++panel) {
      float tile[kRows * kPanel];
      product_tile(rows, weights, 0, values + kv * plan.v_size + panel * panel_size<P>(n), n, tile);
      put_tile(out, step, row, rows, head * d + panel * kPanel,
               [sums = &tile[0], by = &inverse[0]](int i, int part) {
                 const Vec v = load(sums + i * kPanel + part * kLanes);
                 return sizeof(P) == 1 ? v : v * by[i];  // int8: the scale of the row
               });
    }
  });
}
