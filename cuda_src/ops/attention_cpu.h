// out = softmax(q k^T / sqrt(d) + mask) v by head; see ops.h for shapes.
//
// Keys and values of one head are laid out as packed matrices (K as W (n, d), V^T as W (d, n)), so that both
// products run on the product kernel, kRows queries at a time: their scores stay in the cache of one core.

template <typename T>
struct AttentionPlan {
  int heads, kv_heads, n, m, d;  // n keys and m queries a batch
  int64_t k_size, v_size, score_size;

  explicit AttentionPlan(const Attention& op)
      : heads(op.q.cols / op.head_dim),
        kv_heads(op.k.cols / op.head_dim),
        n(op.k.rows / op.batch),
        m(op.q.rows / op.batch),
        d(op.head_dim),
        k_size(panels(n) * panel_size<T>(d)),
        v_size(panels(d) * panel_size<T>(n)),
        score_size(static_cast<int64_t>(panels(n)) * kPanel) {}

  size_t bytes(int batch, int threads) const {
    // packed keys and values of every head, then float scores and T probabilities of kRows queries a thread
    return sizeof(T) * batch * kv_heads * (k_size + v_size) + 64 +
           static_cast<size_t>(threads) * kRows * score_size * (sizeof(float) + sizeof(T)) + 64;
  }
};

// One element of a panel: row j of W, column p of k.
template <typename T>
T& packed(T* panel_base, int64_t size, int j, int p) {
  T* panel = panel_base + j / kPanel * size;
  return panel[(p / kPair<T> * kPanel + j % kPanel) * kPair<T> + p % kPair<T>];
}

template <typename T>
void pack_head(const Attention& op, const AttentionPlan<T>& plan, int batch, int head, int step, T* keys,
               T* values) {
  const int64_t k_panel = panel_size<T>(plan.d), v_panel = panel_size<T>(plan.n);
  __builtin_memset(keys, 0, sizeof(T) * plan.k_size);
  __builtin_memset(values, 0, sizeof(T) * plan.v_size);
  for (int j = 0; j < plan.n; ++j) {
    const int64_t row = static_cast<int64_t>(batch) * plan.n + j;
    const T* k = op.k.at<const T>(step) + row * op.k.ld + head * plan.d;
    const T* v = op.v.at<const T>(step) + row * op.v.ld + head * plan.d;
    for (int p = 0; p < plan.d; ++p) {
      packed(keys, k_panel, j, p) = k[p];
      packed(values, v_panel, p, j) = v[p];
    }
  }
}

// Softmax of one row of scores, masked, as unnormalised T; returns 1 / sum, or 0 where nothing is seen.
template <typename T>
float softmax_row(float* scores, int n, float scale, const int32_t* blocks, int64_t blocks_ld, int seen,
                  T* p) {
  Vec top = splat(-__builtin_inff());
  if (blocks) {
    for (int j = 0; j < n; ++j) {
      if (blocks[j * blocks_ld] > seen) scores[j] = -__builtin_inff();
    }
  }
  const int padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int j = n; j < padded; ++j) scores[j] = -__builtin_inff();
  bool broken = false;
  for (int j = 0; j < padded; j += kLanes) top = max(load(scores + j), top);
  float highest = top[0];
  for (int i = 1; i < kLanes; ++i) highest = top[i] > highest ? top[i] : highest;
  if (highest == -__builtin_inff()) {
    for (int j = 0; j < n; ++j) broken = broken || scores[j] != scores[j];
    for (int j = 0; j < padded; ++j) put(p + j, broken ? __builtin_nanf("") : 0.0f);
    return broken ? __builtin_nanf("") : 0.0f;
  }
  Vec total{};
  for (int j = 0; j < padded; j += kLanes) {
    const Vec s = load(scores + j);
    const Ints unseen = s == -__builtin_inff();
    const Vec e = exp((s - highest) * scale);
    const Vec v = (Vec)((Ints)e & ~unseen);
    store(p + j, v);
    total += v;
  }
  return 1.0f / sum(total);
}

template <typename T>
void run_attention(const Attention& op, const Context& c, int step) {
  const AttentionPlan<T> plan(op);
  const int n = plan.n, d = plan.d, group = plan.heads / plan.kv_heads;
  T* const keys = reinterpret_cast<T*>(c.scratch);
  T* const values = keys + op.batch * plan.kv_heads * plan.k_size;
  const size_t packed_bytes = sizeof(T) * op.batch * plan.kv_heads * (plan.k_size + plan.v_size);
  float* const scores = reinterpret_cast<float*>(c.scratch + (packed_bytes + 63) / 64 * 64);
  T* const probabilities =
      reinterpret_cast<T*>(scores + static_cast<int64_t>(c.threads->count()) * kRows * plan.score_size);
  c.threads->run(op.batch * plan.kv_heads, [&](int item, int) {
    pack_head(op, plan, item / plan.kv_heads, item % plan.kv_heads, step, keys + item * plan.k_size,
              values + item * plan.v_size);
  });
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
  const int row_tiles = (plan.m + kRows - 1) / kRows;
  c.threads->run(op.batch * plan.heads * row_tiles, [&](int item, int thread) {
    const int tile_row = item % row_tiles * kRows, head = item / row_tiles % plan.heads;
    const int batch = item / row_tiles / plan.heads, kv = batch * plan.kv_heads + head / group;
    const int rows = plan.m - tile_row < kRows ? plan.m - tile_row : kRows;
    const int64_t row = static_cast<int64_t>(batch) * plan.m + tile_row;
    float* s = scores + static_cast<int64_t>(thread) * kRows * plan.score_size;
    T* p = probabilities + static_cast<int64_t>(thread) * kRows * plan.score_size;
    float tile[kRows * kPanel], factor[kRows];
    const T* q = op.q.at<const T>(step) + row * op.q.ld + head * d;
    for (int panel = 0; panel < panels(n); ++panel) {
      product_tile(rows, q, op.q.ld, keys + kv * plan.k_size + panel * panel_size<T>(d), d, tile);
      for (int i = 0; i < rows; ++i) {
        float* out = s + i * plan.score_size + panel * kPanel;
        for (int j = 0; j < kPanel; j += kLanes) store(out + j, load(tile + i * kPanel + j));
      }
    }
    for (int i = 0; i < rows; ++i) {
      const int seen = op.q_block ? op.q_block.at<const int32_t>(step)[(tile_row + i) * op.q_block.ld] : 0;
      const int32_t* blocks = op.k_block ? op.k_block.at<const int32_t>(step) : nullptr;
      const int64_t ld = op.k_block ? op.k_block.ld : 0;
      factor[i] = softmax_row(s + i * plan.score_size, n, scale, blocks, ld, seen, p + i * plan.score_size);
    }
    for (int panel = 0; panel < panels(d); ++panel) {
      product_tile(rows, p, plan.score_size, values + kv * plan.v_size + panel * panel_size<T>(n), n, tile);
      const int col = panel * kPanel, width = d - col < kPanel ? d - col : kPanel;
      for (int i = 0; i < rows; ++i) {
        float* out = tile + i * kPanel;
        for (int j = 0; j < kPanel; j += kLanes) store(out + j, load(out + j) * factor[i]);
        store_some(op.out, step, static_cast<int>(row) + i, head * d + col, out, width);
      }
    }
  });
}
