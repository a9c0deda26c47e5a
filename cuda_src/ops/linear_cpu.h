// out = residual + gate * act(scale * (norm(x) W^T + bias)); see ops.h for shapes.

template <typename T>
void run_linear(const Linear& op, const Context& c, int step) {
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int n = op.out.cols, k = op.x.cols;
  const T* w = static_cast<const T*>(op.w.data);
  const float* bias = op.bias ? op.bias.at<const float>(step) : nullptr;
  const float* gate = op.gate ? op.gate.at<const float>(step) : nullptr;
  for_tiles(op.x.rows, panels(n), c, [&](int row, int rows, int panel, int) {
    float tile[kRows * kPanel], b[kPanel], g[kPanel];
    product_tile(rows, a.data + row * a.ld, a.ld, w + panel * panel_size<T>(k), k, tile);
    const int col = panel * kPanel, width = n - col < kPanel ? n - col : kPanel;
    if (bias) load_padded(bias, col, n, b);
    if (gate) load_padded(gate, col, n, g);
    for (int i = 0; i < rows; ++i) {
      float* values = tile + i * kPanel;
      for (int j = 0; j < kPanel; j += kLanes) {
        Vec v = load(values + j);
        if (bias) v += load(b + j);
        v = activate(v * op.scale, op.act);
        if (gate) v *= load(g + j);
        store(values + j, v);
      }
      if (op.residual) add_some(op.residual, step, (row + i) % op.residual.rows, col, values, width);
      store_some(op.out, step, row + i, col, values, width);
    }
  });
}

// out = act(norm(x) G^T) * (norm(x) U^T); panels of G and U alternate.
template <typename T>
void run_gated_linear(const GatedLinear& op, const Context& c, int step) {
  const Left<T> a = left_operand<T>(op.x, op.norm, c, step);
  const int n = op.out.cols, k = op.x.cols;
  const T* w = static_cast<const T*>(op.w.data);
  for_tiles(op.x.rows, panels(n), c, [&](int row, int rows, int panel, int) {
    float gate[kRows * kPanel], up[kRows * kPanel];
    const T* x = a.data + row * a.ld;
    product_tile(rows, x, a.ld, w + 2 * panel * panel_size<T>(k), k, gate);
    product_tile(rows, x, a.ld, w + (2 * panel + 1) * panel_size<T>(k), k, up);
    const int col = panel * kPanel, width = n - col < kPanel ? n - col : kPanel;
    for (int i = 0; i < rows; ++i) {
      float* values = gate + i * kPanel;
      for (int j = 0; j < kPanel; j += kLanes) {
        store(values + j, activate(load(values + j), op.act) * load(up + i * kPanel + j));
      }
      store_some(op.out, step, row + i, col, values, width);
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
  for_tiles(op.h.rows, panels(n), c, [&](int row, int rows, int panel, int) {
    float tile[kRows * kPanel];
    product_tile(rows, a.data + row * a.ld, a.ld, w + panel * panel_size<T>(k), k, tile);
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
