// out = residual + gate * act(scale * (norm(x) W^T + bias)); see ops.h for shapes.

template <typename T>
void run_linear(const Linear& op, const Context& c, int step) {
  constexpr bool kExact = sizeof(T) == 4;
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int n = op.out.cols, k = op.x.cols;
  const T* w = static_cast<const T*>(op.w.data);
  const View& residual = op.residual;
  for_tiles(op.x.rows, k, a, w, panels(n), c, [&](const Tile<T>& t) {
    const int row = t.row, rows = t.rows;
    float tile[kRows * kPanel];
    const int col = t.panel * kPanel, beside = residual ? row % residual.rows : 0;
    fetch_tile(op.out, step, row, rows, col);
    // Of rows that begin again at the top only those before it: the others are not worth a loop.
    if (residual && residual.base != op.out.base) {
      fetch_tile(residual, step, beside, rows < residual.rows - beside ? rows : residual.rows - beside, col);
    }
    product_tile(rows, a, row, t.w, k, tile, kPanel, t.next);
    Columns bias{}, gate{splat(1.0f), splat(1.0f)};
    if (op.bias) bias = columns(op.bias, step, col, n);
    if (op.gate) gate = columns(op.gate, step, col, n);
    const auto value = [=, sums = &tile[0], scale = op.scale, act = op.act](int i, int part) {
      const Vec v = load(sums + i * kPanel + part * kLanes) + bias.v[part];
      return activate<kExact>(v * scale, act) * gate.v[part];
    };
    if (!residual) return put_tile(op.out, step, row, rows, col, value);
    with_type(residual.dtype, [&]<typename R>(R*) {
      const R* top = residual.at<const R>(step) + col;
      put_tile(op.out, step, row, rows, col, [=, ld = residual.ld, count = residual.rows](int i, int part) {
        const int at = beside + i < count ? beside + i : (beside + i) % count;
        return value(i, part) + load_some(top + at * ld + part * kLanes, n - col - part * kLanes);
      });
    });
  });
}

// out = act(norm(x) G^T) * (norm(x) U^T); panels of G and U alternate.
template <typename T>
void run_gated_linear(const GatedLinear& op, const Context& c, int step) {
  constexpr bool kExact = sizeof(T) == 4;
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int n = op.out.cols, k = op.x.cols;
  const T* w = static_cast<const T*>(op.w.data);
  for_tiles<T, 2>(op.x.rows, k, a, w, panels(n), c, [&](const Tile<T>& t) {
    const int row = t.row, rows = t.rows, col = t.panel * kPanel;
    float gate[kRows * kPanel], up[kRows * kPanel];
    fetch_tile(op.out, step, row, rows, col);
    product_tile(rows, a, row, t.w, k, gate, kPanel, t.next);
    product_tile(rows, a, row, t.w + panel_size<T>(k), k, up, kPanel, t.next + panel_size<T>(k) * sizeof(T));
    put_tile(op.out, step, row, rows, col, [g = &gate[0], u = &up[0], act = op.act](int i, int part) {
      const int at = i * kPanel + part * kLanes;
      return activate<kExact>(load(g + at), act) * load(u + at);
    });
  });
}

// x += dt * (v - gain * weight * (previous - (x - time * v))), v = norm(h) W^T + bias.
template <typename T>
void run_euler(const Euler& op, const Context& c, int step) {
  const Left<T> a = left_operand<T>(op.h, op.norm, c, step);
  const int n = op.x.cols, k = op.h.cols;
  const T* w = static_cast<const T*>(op.w.data);
  const float gain = *op.gain.at<const float>(step), time = *op.time.at<const float>(step);
  const float* bias = op.bias.at<const float>(step);
  for_tiles(op.h.rows, k, a, w, panels(n), c, [&](const Tile<T>& t) {
    const int row = t.row, rows = t.rows;
    float tile[kRows * kPanel];
    product_tile(rows, a, row, t.w, k, tile, kPanel, t.next);
    const int col = t.panel * kPanel, width = n - col < kPanel ? n - col : kPanel;
    for (int i = 0; i < rows; ++i) {
      float* x = op.x.at<float>(step) + (row + i) * op.x.ld + col;
      const float* previous = op.previous.at<const float>(step) + (row + i) * op.previous.ld + col;
      const float guide = gain * op.weight.at<const float>(step)[(row + i) * op.weight.ld];
      for (int j = 0; j < width; ++j) {
        const float v = tile[i * kPanel + j] + bias[col + j];
        const float error = previous[j] - (x[j] - time * v);
        x[j] += op.dt * (v - (guide != 0.0f ? guide * error : 0.0f));
      }
    }
  });
}
