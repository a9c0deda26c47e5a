// Vectors of float32 in the compiler's own notation, the widest that the instruction set holds, and what the
// kernels do with them. Included inside the namespace of an instruction set.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;  // rows of a product's register tile: 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of the tile

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

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
  const Bits u = bits(v);
  const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits quiet = (u >> 16) | 0x40u;
  const Ints nan = (u & 0x7fffffffu) > 0x7f800000u;
  const Halves h = __builtin_convertvector((Bits)((nan & (Ints)quiet) | (~nan & (Ints)rounded)), Halves);
  __builtin_memcpy(p, &h, sizeof h);
}

// A row of n values, whatever its type, by vectors and a tail.
inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) { return from_bf16(*p); }
inline void put(float* p, float v) { *p = v; }
inline void put(uint16_t* p, float v) { *p = to_bf16(v); }

inline float sum(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// exp(x) to about 1 ulp: x = n ln 2 + r, a polynomial in r, n into the exponent. NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec bounded = min(max(x, splat(-87.3f)), splat(88.3f));
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (bounded * 1.44269504f + shifter) - shifter;
  const Vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = __builtin_convertvector(n, Ints) << 23;
  const Vec y = (Vec)((Ints)p + exponent);
  return x == x ? y : x;
}

// gelu with tanh (Hendrycks & Gimpel 2016): 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)).
inline Vec activate(Vec x, Act act) {
  switch (act) {
    case Act::kGeluTanh:
      return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case Act::kSilu:
      return x / (1.0f + exp(-x));
    case Act::kNone:
      break;
  }
  return x;
}
