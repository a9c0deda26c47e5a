// The register tile of a product: up to kRows rows of A by a panel of W over all of k, in float32, bfloat16
// and 8-bit integers. Included inside the namespace of an instruction set.
//
// A packed matrix is a row of panels, each kPanel rows of W and all of k: float32 as [k][kPanel], bfloat16 as
// [k / 2][kPanel][2], so that one 32-bit lane holds the two neighbours in k that the bf16 dot product wants,
// and int8 as kPanel scales (float32), kPanel starting sums (int32), then [k / 4][kPanel][4].

template <typename T>
constexpr int kPair = 4 / static_cast<int>(sizeof(T));  // neighbours in k in one 32-bit lane

inline int panels(int n) { return (n + kPanel - 1) / kPanel; }
template <typename T>
inline int64_t panel_size(int k) {  // in elements
  constexpr int pair = kPair<T>;
  return static_cast<int64_t>((k + pair - 1) / pair) * pair * kPanel + (pair == 4 ? 8 * kPanel : 0);
}

// The left operand of a product, row-major. int8: bytes of value + kOffset, each row with its own scale.
template <typename T>
struct Left {
  const T* data;
  int64_t ld;
  const float* scales = nullptr;
};

// The 32-bit lane that starts at a row's element p, in every lane.
inline Bits broadcast32(const void* a) {
  uint32_t u;
  __builtin_memcpy(&u, a, 4);
  return Bits{} + u;
}

// What a tile fetches while it multiplies: its own panel some way ahead, and from `next` on a line for each
// step of k, what its thread will read after this panel. That comes from memory, which takes longer than the
// tile would see ahead, and is not asked for all of it at once.
#if defined(__AVX512F__)
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_next(const std::byte* next) { __builtin_prefetch(next, 0, 2); }
constexpr int kAhead = 2048;  // bytes: what the third-level cache takes to answer
#else
inline void prefetch(const void*) {}
inline void prefetch_next(const std::byte*) {}
constexpr int kAhead = 0;
#endif
constexpr int kLine = 64;

template <int M>
void write_tile(const Vec (&acc)[M][2], float* tile, int64_t ldt) {
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    store(tile + i * ldt, acc[i][0]);
    store(tile + i * ldt + kLanes, acc[i][1]);
  }
}

// tile (M, kPanel) = A (M, k) times a panel; rows of the tile are `ldt` apart.
template <int M>
void tile_rows(const float* a, int64_t lda, const float* panel, int k, float* tile, int64_t ldt,
               const std::byte* next) {
  Vec acc[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec{};
  for (int p = 0; p < k; ++p, panel += kPanel, next += kLine) {
    prefetch_next(next);
    prefetch(reinterpret_cast<const char*>(panel) + kAhead);
    prefetch(reinterpret_cast<const char*>(panel + kLanes) + kAhead);
    Vec b0 = load(panel), b1 = load(panel + kLanes);
    VLA_KEEP(b0);
    VLA_KEEP(b1);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      Vec x = (Vec)broadcast32(a + i * lda + p);
      VLA_KEEP(x);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  write_tile<M>(acc, tile, ldt);
}

// One step of k in bfloat16: two neighbours. `pair(i)` gives those of row i in every lane.
template <int M, typename Pair>
inline void bf16_step(Vec (&acc)[M][2], const uint16_t* panel, const Pair& pair) {
  Bits b0, b1;
  __builtin_memcpy(&b0, panel, sizeof b0);
  __builtin_memcpy(&b1, panel + kPanel, sizeof b1);
#if defined(__AVX512BF16__)
  VLA_KEEP(b0);
  VLA_KEEP(b1);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    Bits x = pair(i);
    VLA_KEEP(x);
    acc[i][0] = (Vec)_mm512_dpbf16_ps((__m512)acc[i][0], (__m512bh)x, (__m512bh)b0);
    acc[i][1] = (Vec)_mm512_dpbf16_ps((__m512)acc[i][1], (__m512bh)x, (__m512bh)b1);
  }
#else
  // First the lower halves, then the upper ones: the registers do not hold both.
#pragma GCC unroll 2
  for (int upper = 0; upper < 2; ++upper) {
    Vec c0 = (Vec)(upper ? b0 & 0xffff0000u : b0 << 16), c1 = (Vec)(upper ? b1 & 0xffff0000u : b1 << 16);
    VLA_KEEP(c0);
    VLA_KEEP(c1);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const Bits x = pair(i);
      Vec y = (Vec)(upper ? x & 0xffff0000u : x << 16);
      VLA_KEEP(y);
      acc[i][0] += y * c0;
      acc[i][1] += y * c1;
    }
  }
#endif
}

template <int M>
void tile_rows(const uint16_t* a, int64_t lda, const uint16_t* panel, int k, float* tile, int64_t ldt,
               const std::byte* next) {
  Vec acc[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = Vec{};
  const int whole = k & ~1;
  for (int p = 0; p < whole; p += 2, panel += 2 * kPanel, next += kLine) {
    prefetch_next(next);
    prefetch(reinterpret_cast<const char*>(panel) + kAhead);
    prefetch(reinterpret_cast<const char*>(panel + kPanel) + kAhead);
    bf16_step<M>(acc, panel, [&](int i) { return broadcast32(a + i * lda + p); });
  }
  if (k & 1) bf16_step<M>(acc, panel, [&](int i) { return Bits{} + a[i * lda + whole]; });
  write_tile<M>(acc, tile, ldt);
}

// ---- 8-bit integers: sums are exact in int32 (k up to 65 000), so they do not depend on how they are taken.
#if defined(__AVX512VNNI__)
constexpr int kOffset = 128;  // the instruction takes unsigned by signed
inline Ints dot8(Ints acc, Bits a, Bits b) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#else
constexpr int kOffset = 0;
#if defined(__SSE2__)
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
// Bytes of even or odd places as 16 bits: two products of them always fit into 32, where the instruction that
// multiplies bytes would saturate at 16.
template <bool kOdd>
inline Shorts spread(Bits v) {
  return kOdd ? (Shorts)v >> 8 : ((Shorts)v << 8) >> 8;
}
inline Ints dot16(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
inline Ints dot8(Ints acc, Bits a, Bits b) {
  return acc + dot16(spread<false>(a), spread<false>(b)) + dot16(spread<true>(a), spread<true>(b));
}
#else
inline Ints dot8(Ints acc, Bits a, Bits b) {
  for (int shift = 24; shift >= 0; shift -= 8) acc += ((Ints)(a << shift) >> 24) * ((Ints)(b << shift) >> 24);
  return acc;
}
#endif
#endif

// tile = (A panel + starting sums) * scale of the row * scale of the column.
template <int M>
void tile_rows(const uint8_t* a, int64_t lda, const float* row_scales, const uint8_t* panel, int k,
               float* tile, int64_t ldt, const std::byte* next) {
  const float* scales = reinterpret_cast<const float*>(panel);
  Ints start[2];
  __builtin_memcpy(start, panel + 4 * kPanel, sizeof start);
  Ints acc[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    acc[i][0] = start[0];
    acc[i][1] = start[1];
  }
  panel += 8 * kPanel;
  for (int p = 0; p < k; p += 4, panel += 4 * kPanel, next += kLine) {
    prefetch_next(next);
    prefetch(panel + kAhead);
    prefetch(panel + 2 * kPanel + kAhead);
    Bits b0, b1;
    __builtin_memcpy(&b0, panel, sizeof b0);
    __builtin_memcpy(&b1, panel + 2 * kPanel, sizeof b1);
    VLA_KEEP(b0);
    VLA_KEEP(b1);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      Bits x = broadcast32(a + i * lda + p);
      VLA_KEEP(x);
      acc[i][0] = dot8(acc[i][0], x, b0);
      acc[i][1] = dot8(acc[i][1], x, b1);
    }
  }
  const Vec s0 = load(scales), s1 = load(scales + kLanes);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    store(tile + i * ldt, __builtin_convertvector(acc[i][0], Vec) * (s0 * row_scales[i]));
    store(tile + i * ldt + kLanes, __builtin_convertvector(acc[i][1], Vec) * (s1 * row_scales[i]));
  }
}

// Quantises a vector: the low bytes of the result are the nearest integers to x * factor (at most 127 in
// size).
inline Bits to_int8(Vec x, Vec factor) { return (Bits)(x * factor + splat(12582912.0f)); }

// The scale of values whose largest magnitude is given as bits: magnitude / 127, and its inverse. Bits of a
// NaN are above all others, so that the scale is NaN and with it all that it multiplies; next to nothing is
// 0.
struct Scale {
  float scale, inverse;
};
inline Scale scale_of(uint32_t top) {
  float highest;
  __builtin_memcpy(&highest, &top, 4);
  if (highest < 1e-30f) return {0.0f, 0.0f};
  return {highest / 127.0f, 127.0f / highest};
}
inline Bits magnitude(Vec x) { return bits(x) & 0x7fffffffu; }
inline Bits max(Bits a, Bits b) { return (Ints)a > (Ints)b ? a : b; }
inline uint32_t highest_of(Bits v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)v);
#else
  uint32_t highest = v[0];
  for (int i = 1; i < kLanes; ++i) highest = v[i] > highest ? v[i] : highest;
  return highest;
#endif
}

// One row of n values as bytes with an offset, padded with zeros to a whole vector; returns the scale.
// `total`, where given, gets the sum of the integers.
template <typename T>
inline float quantize_row(const T* x, int n, int offset, uint8_t* q, int32_t* total = nullptr) {
  Bits top{};
  for (int i = 0; i < n; i += kLanes) top = max(magnitude(load_some(x + i, n - i)), top);
  const Scale scale = scale_of(highest_of(top));
  const Vec factor = splat(scale.inverse);
  Ints sums{};
  for (int i = 0; i < n; i += kLanes) {
    const Bits v = to_int8(load_some(x + i, n - i), factor);
    if (total) sums += (Ints)(v << 24) >> 24;
    store_bytes(q + i, v + static_cast<uint32_t>(offset));
  }
  if (total) *total = sum(sums);
  return scale.scale;
}

// For a number of rows known at run time, 1 to kRows.
template <typename Do, int M = 1>
inline void with_rows(int rows, const Do& run) {
  if constexpr (M == kRows) {
    run.template operator()<M>();
  } else {
    if (rows == M) return run.template operator()<M>();
    with_rows<Do, M + 1>(rows, run);
  }
}

// next: see prefetch_next; nullptr where nothing is known.
template <typename T>
void product_tile(int rows, const Left<T>& a, int64_t row, const T* panel, int k, float* tile,
                  int64_t ldt = kPanel, const std::byte* next = nullptr) {
  const T* first = a.data + row * a.ld;
  if (!next) next = reinterpret_cast<const std::byte*>(panel);
  with_rows(rows, [&]<int M>() {
    if constexpr (sizeof(T) == 1) {
      tile_rows<M>(first, a.ld, a.scales + row, panel, k, tile, ldt, next);
    } else {
      tile_rows<M>(first, a.ld, panel, k, tile, ldt, next);
    }
  });
}
