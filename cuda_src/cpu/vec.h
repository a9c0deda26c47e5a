// Vectors of float32 in the compiler's own notation, the widest that the instruction set holds, and what the
// kernels do with them. Included inside the namespace of an instruction set.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;  // rows of a product's register tile: 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRows = 12;  // 32 registers here too
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of the tile
constexpr int kMaxHead = 1024;      // columns of a head that int8 attention takes

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Keeps a value in a register: without it the compiler reads an operand of several products from memory again
// for each of them, and loads become what the loop waits for.
#if defined(__AVX512F__)
#define VLA_KEEP(value) asm("" : "+v"(value))
#elif defined(__SSE2__)
#define VLA_KEEP(value) asm("" : "+x"(value))
#elif defined(__aarch64__)
#define VLA_KEEP(value) asm("" : "+w"(value))
#else
#define VLA_KEEP(value)
#endif

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
// Through integers: adding 0.0f would cost an instruction, since it turns -0 into +0.
inline Vec splat(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return (Vec)(Bits{} + u);
}
inline Bits bits(Vec v) { return (Bits)v; }

inline float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline Vec load(const uint16_t* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}
inline void store(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // denormal numbers become zero
  __builtin_memcpy(p, &h, sizeof h);
#else
  const Bits u = bits(v);
  const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits quiet = (u >> 16) | 0x40u;
  const Ints nan = (u & 0x7fffffffu) > 0x7f800000u;
  const Halves h = __builtin_convertvector((Bits)((nan & (Ints)quiet) | (~nan & (Ints)rounded)), Halves);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

// One value, whatever its type.
inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) { return from_bf16(*p); }
inline void put(float* p, float v) { *p = v; }
inline void put(uint16_t* p, float v) { *p = to_bf16(v); }

// The lowest byte of each lane. In two steps: the compiler does one at once element by element.
inline void store_bytes(uint8_t* p, Bits v) {
#if defined(__AVX512F__)
  const __m128i b = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#else
  const Bytes b = __builtin_convertvector(__builtin_convertvector(v, Halves), Bytes);
#endif
  __builtin_memcpy(p, &b, sizeof b);
}

// The first n values at p and zeros, n from 0 to kLanes and more; and their way back.
template <typename T>
inline Vec load_some(const T* p, int n) {
  if (n >= kLanes) return load(p);
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = get(p + i);
  return v;
}
template <typename T>
inline void store_some(T* p, Vec v, int n) {
  if (n >= kLanes) return store(p, v);
  for (int i = 0; i < n; ++i) put(p + i, v[i]);
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
inline int32_t sum(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
inline float highest_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float highest = v[0];
  for (int i = 1; i < kLanes; ++i) highest = v[i] > highest ? v[i] : highest;
  return highest;
#endif
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// 2^x for x <= 127; kExact: to about 1 ulp, else to 1e-4, which is enough where the result becomes a
// bfloat16. Below -126 it goes to 0. NaN stays NaN. x = n + r with |r| <= 1/2, or 0 <= r < 1: a polynomial in
// r (least largest relative error on that interval: 7.5e-8 and 7.5e-5), n into the exponent.
template <bool kExact>
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  // With r = x - floor(x), which is one instruction, and so is what follows the polynomial.
  if constexpr (!kExact) {
    const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 9);
    Vec p = splat(7.802452262e-2f);
    p = p * r + 2.260671555e-1f;
    p = p * r + 6.958335405e-1f;
    p = p * r + 9.999252185e-1f;
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
#endif
#if defined(__AVX512F__)
  const Vec bounded =
      (Vec)_mm512_max_ps((__m512)splat(-160.0f), (__m512)x);    // of a NaN and a number: the NaN
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)bounded, 8);  // to the nearest integer
  const Vec r = bounded - n;
#else
  const Vec low = splat(-126.0f);
  const Vec bounded = x < low ? low : x;
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (bounded + shifter) - shifter;
  const Vec r = bounded - n;
#endif
  Vec p;
  if constexpr (kExact) {
    p = splat(1.327647199e-3f);
    p = p * r + 9.675541334e-3f;
    p = p * r + 5.550713274e-2f;
    p = p * r + 2.402211972e-1f;
    p = p * r + 6.931469671e-1f;
    p = p * r + 1.000000072f;
  } else {
    p = splat(5.517166904e-2f);
    p = p * r + 2.426111222e-1f;
    p = p * r + 6.932609855e-1f;
    p = p * r + 9.999280735e-1f;
  }
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Ints exponent = __builtin_convertvector(n, Ints) << 23;
  const Vec y = (Vec)((Ints)p + exponent);
  return x == x ? (x < low ? Vec{} : y) : x;
#endif
}

// 1 / x, in the same two precisions.
template <bool kExact>
inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
  if constexpr (!kExact) return (Vec)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.0f / x;
}

// gelu with tanh (Hendrycks & Gimpel 2016): 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)); silu: x / (1 +
// exp(-x)). The exponent is bounded where 2^x is good to 127, and not infinite beyond.
template <bool kExact>
inline Vec activate(Vec x, Act act) {
  if (act == Act::kNone) return x;
  constexpr float kLog2e = 1.44269504f;
  Vec t = act == Act::kSilu ? x * -kLog2e : x * (-1.5957691216f * kLog2e - 0.071354816f * kLog2e * x * x);
#if defined(__AVX512DQ__)
  if constexpr (!kExact) return x * inverse<false>(1.0f + exp2<false>(t));
#endif
  return x * inverse<kExact>(1.0f + exp2<kExact>(min(t, splat(126.0f))));
}
