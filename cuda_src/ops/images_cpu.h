// Pictures to patches, squares of patches to rows, tokens to rows; see ops.h for shapes.

// Where a bilinear sample of one output index reads from: half-pixel centres, clamped at the edges.
struct Sample {
  int low, high;
  float part;  // weight of `high`
};

inline Sample sample(int i, int from, int to) {
  const float at =
      (static_cast<float>(i) + 0.5f) * (static_cast<float>(from) / static_cast<float>(to)) - 0.5f;
  const float position = at > 0.0f ? at : 0.0f;
  int low = static_cast<int>(position);
  if (low > from - 1) low = from - 1;
  return {low, low + 1 < from ? low + 1 : low, position - static_cast<float>(low)};
}

template <typename T>
void run_image_patches(const ImagePatches& op, const Context& c, int step) {
  const int p = op.patch, across = op.width / p, down = op.height / p;
  // An item is a row of patches: `across` rows of out.
  c.run(op.frames.rows * down, [&](int item, int) {
    const int camera = item / down, band = item % down;
    const int32_t* g = op.geometry.at<const int32_t>(step) + camera * op.geometry.ld;
    const int h = g[0], w = g[1], stride = g[2], new_h = g[3], new_w = g[4], top = g[5], left = g[6];
    // What a caller says of a picture that would not fit its memory makes it absent.
    const bool here = g[7] && h > 0 && w > 0 && 3 * int64_t{w} <= stride &&
                      int64_t{h - 1} * stride + 3 * int64_t{w} <= op.frames.cols;
    const uint8_t* pixels = op.frames.at<const uint8_t>(step) + camera * op.frames.ld;
    T* out = op.out.at<T>(step) + static_cast<int64_t>(item) * across * op.out.ld;
    for (int y = 0; y < p; ++y) {
      const int64_t row = int64_t{band} * p + y - top;
      const bool blank = !here || row < 0 || row >= new_h;
      const Sample v = blank ? Sample{} : sample(static_cast<int>(row), h, new_h);
      const uint8_t* upper = pixels + static_cast<int64_t>(v.low) * stride;
      const uint8_t* lower = pixels + static_cast<int64_t>(v.high) * stride;
      for (int x = 0; x < op.width; ++x) {
        const int64_t col = int64_t{x} - left;
        T* at = out + (x / p) * op.out.ld + y * p + x % p;
        if (blank || col < 0 || col >= new_w) {
          for (int channel = 0; channel < 3; ++channel) put(at + channel * p * p, -1.0f);
          continue;
        }
        const Sample u = sample(static_cast<int>(col), w, new_w);
        for (int channel = 0; channel < 3; ++channel) {
          const float a = upper[3 * u.low + channel], b = upper[3 * u.high + channel];
          const float e = lower[3 * u.low + channel], f = lower[3 * u.high + channel];
          const float above = a * (1.0f - u.part) + b * u.part, below = e * (1.0f - u.part) + f * u.part;
          const float value = above * (1.0f - v.part) + below * v.part;
          put(at + channel * p * p, value / 255.0f * 2.0f - 1.0f);
        }
      }
    }
  });
}

template <typename T>
void run_space_to_depth(const SpaceToDepth& op, const Context& c, int step) {
  const int f = op.factor, d = op.x.cols, across = op.width / f, down = op.height / f;
  c.run(op.out.rows, [&](int item, int) {
    const int batch = item / (across * down), y = item / across % down, x = item % across;
    for (int i = 0; i < f * f; ++i) {
      const int row = (batch * op.height + y * f + i / f) * op.width + x * f + i % f;
      norm_row(op.x, row, op.norm, step, op.out.at<T>(step) + item * op.out.ld + i * d);
    }
  });
}

template <typename T>
void run_embed(const Embed& op, const Context& c, int step) {
  c.run(op.tokens.rows, [&](int item, int) {
    int token = op.tokens.at<const int32_t>(step)[item * op.tokens.ld];
    if (token < 0 || token >= op.table.rows) token = 0;
    const T* row = op.table.at<const T>(step) + static_cast<int64_t>(token) * op.table.ld;
    T* out = op.out.at<T>(step) + item * op.out.ld;
    for (int i = 0; i < op.table.cols; ++i) put(out + i, get(row + i) * op.scale);
  });
}
