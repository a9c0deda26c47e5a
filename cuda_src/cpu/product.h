// How a product is shared out, and what its epilogues have in common. Included inside the namespace of an
// instruction set.

// One tile of a product: up to kRows rows by a panel.
template <typename T>
struct Tile {
  int row, rows, panel;
  const T* w;             // of the panel
  const std::byte* next;  // see prefetch_next
};

// How a product's output is cut into items of work: blocks of rows (kept in the second-level cache of one
// core) by `count` panels from w on, or groups of panels. `each(tile)` is called for every tile; all are
// about the same height.
template <typename T, int kGroup = 1, typename Each>
void for_tiles(int m, int k, const Left<T>& a, const T* w, int count, const Context& c, const Each& each) {
  constexpr int64_t kCache = 384 * 1024;
  const int tiles = (m + kRows - 1) / kRows, height = (m + tiles - 1) / tiles;
  const int64_t fit = kCache / (a.ld * static_cast<int64_t>(sizeof(T)) * height);
  const int block = height * static_cast<int>(fit < 1 ? 1 : fit > 16 ? 16 : fit);
  const int blocks = (m + block - 1) / block, threads = c.alone ? 1 : c.threads->count();
  const int64_t size = kGroup * panel_size<T>(k);
  c.run(blocks * count, [&](int item, int) {
    const int first = item / count * block, last = first + block < m ? first + block : m,
              panel = item % count;
    // While all threads are about as quick, a thread's next panel is as many further as there are threads.
    // One tile fetches half of it, every other line it reads, and the next tile the other half.
    const auto* next = reinterpret_cast<const std::byte*>(w + (panel + threads) % count * size);
    const int64_t half = panel_size<T>(k) / 2 * static_cast<int64_t>(sizeof(T));
    for (int row = first, upper = 0; row < last; row += height, upper = !upper) {
      each(Tile<T>{row, last - row < height ? last - row : height, panel, w + panel * size,
                   next + upper * half});
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

// Calls f with a null pointer to what a view holds.
template <typename F>
inline void with_type(DType type, const F& f) {
  type == DType::kBF16 ? f(static_cast<uint16_t*>(nullptr)) : f(static_cast<float*>(nullptr));
}

// Fetches the place of a tile in a view, so that it is there when the sums are: its cache lines are a row
// apart, and the processor does not see a row coming.
inline void fetch_tile(const View& v, int step, int64_t row, int rows, int col) {
  const int64_t size = v.dtype == DType::kBF16 ? 2 : 4, row_bytes = v.ld * size;
  const std::byte* p = v.base + step * v.step_bytes + row * row_bytes + col * size;
  for (int i = 0; i < rows; ++i, p += row_bytes) {
    __builtin_prefetch(p, 1, 3);
    __builtin_prefetch(p + kPanel * size - 1, 1, 3);
  }
}

// Writes a tile to its place in a view: value(i, part) is vector `part` of row i. What value() needs it holds
// by value, and nothing is looked up in the operation between two stores: any of them might have changed it,
// as far as the compiler knows.
template <typename Value>
inline void put_tile(const View& out, int step, int64_t row, int rows, int col, const Value& value) {
  const int64_t ld = out.ld;
  const int n = out.cols - col;
  with_type(out.dtype, [=]<typename T>(T* to) {
    to = out.at<T>(step) + row * ld + col;
    if (n >= kPanel) {
      for (int i = 0; i < rows; ++i, to += ld) {
        store(to, value(i, 0));
        store(to + kLanes, value(i, 1));
      }
    } else {
      for (int i = 0; i < rows; ++i, to += ld) {
        store_some(to, value(i, 0), n);
        store_some(to + kLanes, value(i, 1), n - kLanes);
      }
    }
  });
}
