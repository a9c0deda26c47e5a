// How a product is shared out, and what its epilogues have in common. Included inside the namespace of an
// instruction set.

// How a product's output is cut into items of work: blocks of rows (kept in the second-level cache of one
// core) by panels. `each(row, rows, panel)` is called for every tile of up to kRows rows; all tiles are about
// the same height.
template <typename T, typename Each>
void for_tiles(int m, const Left<T>& a, int panel_count, const Context& c, const Each& each) {
  constexpr int64_t kCache = 384 * 1024;
  const int tiles = (m + kRows - 1) / kRows, height = (m + tiles - 1) / tiles;
  const int64_t fit = kCache / (a.ld * static_cast<int64_t>(sizeof(T)) * height);
  const int block = height * static_cast<int>(fit < 1 ? 1 : fit > 16 ? 16 : fit);
  const int blocks = (m + block - 1) / block;
  c.run(blocks * panel_count, [&](int item, int) {
    const int first = item / panel_count * block, last = first + block < m ? first + block : m;
    for (int row = first; row < last; row += height) {
      each(row, last - row < height ? last - row : height, item % panel_count);
    }
  });
}

// Two vectors of a row beginning at column `col` of `n`: a bias, a gate.
struct Columns {
  Vec v[2];
};
inline Columns columns(const View& row, int step, int col, int n) {
  const float* p = row.at<const float>(step) + col;
  return {load_some(p, n - col), load_some(p + kLanes, n - col - kLanes)};
}

// Vector `part` of kPanel columns from `col`, of a row of a view.
inline Vec load_part(const View& v, int step, int64_t row, int col, int part) {
  const int64_t at = row * v.ld + col + part * kLanes;
  const int n = v.cols - col - part * kLanes;
  return v.dtype == DType::kBF16 ? load_some(v.at<const uint16_t>(step) + at, n)
                                 : load_some(v.at<const float>(step) + at, n);
}
inline void store_part(const View& v, int step, int64_t row, int col, int part, Vec values) {
  const int64_t at = row * v.ld + col + part * kLanes;
  const int n = v.cols - col - part * kLanes;
  v.dtype == DType::kBF16 ? store_some(v.at<uint16_t>(step) + at, values, n)
                          : store_some(v.at<float>(step) + at, values, n);
}
