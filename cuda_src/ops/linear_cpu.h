// out = residual + gate * act(scale * (norm(x) W^T + bias)); see ops.h for shapes.

template <typename T>
void run_linear(const Linear& op, const Context& c, int step) {
  constexpr bool kExact = sizeof(T) == 4;
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int n = op.out.cols, k = op.x.cols;
  const T* w = static_cast<const T*>(op.w.data);
  for_tiles(op.x.rows, a, panels(n), c, [&](int row, int rows, int panel) {
    float tile[kRows * kPanel];
    product_tile(rows, a, row, w + panel * panel_size<T>(k), k, tile);
    const int col = panel * kPanel;
    Columns bias{}, gate{};
    if (op.bias) bias = columns(op.bias, step, col, n);
    if (op.gate) gate = columns(op.gate, step, col, n);
    for (int i = 0; i < rows; ++i) {
      for (int part = 0; part < 2; ++part) {
        Vec v = load(tile + i * kPanel + part * kLanes);
        if (op.bias) v += bias.v[part];
        v = activate<kExact>(v * op.scale, op.act);
        if (op.gate) v *= gate.v[part];
        if (op.residual) v += load_part(op.residual, step, (row + i) % op.residual.rows, col, part);
        store_part(op.out, step, row + i, col, part, v);
      }
    }
  });
}

// out = act(norm(x) G^T) * (norm(x) U^T); panels of G and U alternate.
template <typename T>
void run_gated_linear(const GatedLinear& op, const Context& c, int step) {
  constexpr bool kExact = sizeof(T) == 4;
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int n = op.out.cols, k = op.x.cols;
  const T* w = static_cast<const T*>(op.w.data);
  for_tiles(op.x.rows, a, panels(n), c, [&](int row, int rows, int panel) {
    float gate[kRows * kPanel], up[kRows * kPanel];
    product_tile(rows, a, row, w + 2 * panel * panel_size<T>(k), k, gate);
    product_tile(rows, a, row, w + (2 * panel + 1) * panel_size<T>(k), k, up);
    for (int i = 0; i < rows; ++i) {
      for (int part = 0; part < 2; ++part) {
        const int at = i * kPanel + part * kLanes;
        const Vec v = activate<kExact>(load(gate + at), op.act) * load(up + at);
        store_part(op.out, step, row + i, panel * kPanel, part, v);
      }
    }
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
  for_tiles(op.h.rows, a, panels(n), c, [&](int row, int rows, int panel) {
    float tile[kRows * kPanel];
    product_tile(rows, a, row, w + panel * panel_size<T>(k), k, tile);
    const int col = panel * kPanel, width = n - col < kPanel ? n - col : kPanel;
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
