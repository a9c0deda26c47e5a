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

// Q: what the product reads, T: what q, k and v are.
template <typename Q, typename T>
void run_qkv(const Qkv& op, const Context& c, int step) {
  const Left<Q> a = left_operand<Q>(op.x, op.norm, c, step);
  const int k = op.x.cols, m = op.x.rows;
  const Q* w = static_cast<const Q*>(op.w.data);
  const View* const outs[3] = {&op.q, &op.k, &op.v};
  const View* const biases[3] = {&op.q_bias, &op.k_bias, &op.v_bias};
  int first[3], total = 0;  // each part begins at a panel of its own
  for (int part = 0; part < 3; ++part) {
    first[part] = total;
    total += *outs[part] ? panels(outs[part]->cols) : 0;
  }
  for_tiles(m, k, a, w, total, c, [&](const Tile<Q>& t) {
    const int row = t.row, rows = t.rows, panel = t.panel;
    int part = 2;
    while (!*outs[part] || panel < first[part]) --part;
    const View &out = *outs[part], &given = *biases[part];
    const int col = (panel - first[part]) * kPanel;
    float tile[kRows * kPanel];
    fetch_tile(out, step, row, rows, col);
    product_tile(rows, a, row, t.w, k, tile, kPanel, t.next);
    Columns bias{};
    if (given) bias = columns(given, step, col, out.cols);
    put_tile(out, step, row, rows, col, [sums = &tile[0], bias](int i, int h) {
      return load(sums + i * kPanel + h * kLanes) + bias.v[h];
    });
  });
  if (!op.rope) return;
  constexpr int kRowsAtOnce = 8;
  c.run((m + kRowsAtOnce - 1) / kRowsAtOnce, [&](int item, int) {
    const int from = item * kRowsAtOnce, to = from + kRowsAtOnce < m ? from + kRowsAtOnce : m;
    for (int part = 0; part < 2; ++part) {
      if (*outs[part]) rotate_rows<T>(*outs[part], op, step, from, to);
    }
  });
}
