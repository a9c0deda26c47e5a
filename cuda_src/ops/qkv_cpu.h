// q, k, v = norm(x) W^T + bias, then rotary embedding on the heads of q and k; see ops.h for shapes.

// Rotates the heads of rows [first, last) in place, by pairs half a head apart.
template <typename T>
void rotate_rows(const View& v, const Qkv& op, int step, int first, int last) {
  const int d = op.head_dim, half = d / 2;
  for (int i = first; i < last; ++i) {
    int position = op.positions.at<const int32_t>(step)[i * op.positions.ld];
    if (position < 0 || position >= op.rope.rows) position = 0;
    const float* cos = op.rope.at<const float>(step) + position * op.rope.ld;
    const float* sin = cos + half;
    T* row = v.at<T>(step) + i * v.ld;
    for (T* head = row; head < row + v.cols; head += d) {
      int j = 0;
      for (; j + kLanes <= half; j += kLanes) {
        const Vec a = load(head + j), b = load(head + half + j), x = load(cos + j), y = load(sin + j);
        store(head + j, a * x - b * y);
        store(head + half + j, b * x + a * y);
      }
      for (; j < half; ++j) {
        const float a = get(head + j), b = get(head + half + j);
        put(head + j, a * cos[j] - b * sin[j]);
        put(head + half + j, b * cos[j] + a * sin[j]);
      }
    }
  }
}

template <typename T>
void run_qkv(const Qkv& op, const Context& c, int step) {
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int k = op.x.cols, m = op.x.rows;
  const T* w = static_cast<const T*>(op.w.data);
  const View* const outs[3] = {&op.q, &op.k, &op.v};
  const View* const biases[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
  int first[3], total = 0;  // each part begins at a panel of its own
  for (int part = 0; part < 3; ++part) {
    first[part] = total;
    total += *outs[part] ? panels(outs[part]->cols) : 0;
  }
  for_tiles(m, total, c, [&](int row, int rows, int panel, int) {
    int part = 2;
    while (!*outs[part] || panel < first[part]) --part;
    const View& out = *outs[part];
    const int n = out.cols, col = (panel - first[part]) * kPanel, width = n - col < kPanel ? n - col : kPanel;
    float tile[kRows * kPanel];
    product_tile(rows, a.data + row * a.ld, a.ld, w + panel * panel_size<T>(k), k, tile);
    for (int i = 0; i < rows; ++i) {
      if (*biases[part]) add_some(*biases[part], step, 0, col, tile + i * kPanel, width);
      store_some(out, step, row + i, col, tile + i * kPanel, width);
    }
  });
  if (!op.rope) return;
  constexpr int kRowsAtOnce = 8;
  c.threads->run((m + kRowsAtOnce - 1) / kRowsAtOnce, [&](int item, int) {
    const int from = item * kRowsAtOnce, to = from + kRowsAtOnce < m ? from + kRowsAtOnce : m;
    for (int part = 0; part < 2; ++part) {
      if (*outs[part]) rotate_rows<T>(*outs[part], op, step, from, to);
    }
  });
}
