// A vector of W floats, of the width of the target processor, and its operations.
//
// GCC's vector extensions: the compiler emits AVX-512, AVX2 or SSE instructions by -march. Tails are loaded and stored
// by masks or through a small buffer, so no kernel reads or writes beyond its arrays.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

// x in every lane. Not vf{} + x: the compiler must keep that addition, since -0.0 + 0.0 is 0.0, and a product's inner loop
// then has an addition and a broadcast in registers where a broadcast from memory is an operand of the multiply-add.
static inline vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return x - vf{};  // exact for every x, so that nothing of the subtraction remains
#endif
}
static inline vi splat_int(int32_t x) { return vi{} + x; }
static inline vi lane_numbers() {
  vi x;
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}
static inline vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
// maximum, minimum: b if either is NaN.
#if defined(__AVX512F__)
static inline vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline vf maximum(vf a, vf b) { return select(a > b, a, b); }
static inline vf minimum(vf a, vf b) { return select(a < b, a, b); }
#endif
static inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

static inline vf load(const float *p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float *p, vf x) { std::memcpy(p, &x, sizeof x); }

static inline vf load(const bf16 *p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
// Rounds to nearest, ties to even; a NaN stays one.
static inline vh round_bf16(vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu quiet = (bits >> 16) | 0x40;
  vi nan = x != x;
  return __builtin_convertvector(((vu)nan & quiet) | (~(vu)nan & rounded), vh);
}
static inline void store(bf16 *p, vf x) {
  vh h = round_bf16(x);
  std::memcpy(p, &h, sizeof h);
}

static inline float scalar_load(const float *p) { return *p; }
static inline float scalar_load(const bf16 *p) {
  uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline float scalar_load(const f16 *p) { return float(p->value); }
static inline void scalar_store(float *p, float x) { *p = x; }
static inline void scalar_store(bf16 *p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void scalar_store(f16 *p, float x) { p->value = _Float16(x); }

#if defined(__AVX512F__)
static inline vf load(const f16 *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void store(f16 *p, vf x) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__) && defined(__AVX2__)
static inline vf load(const f16 *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void store(f16 *p, vf x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline vf load(const f16 *p) {
  vf x;
  for (int i = 0; i < W; i++) x[i] = scalar_load(p + i);
  return x;
}
static inline void store(f16 *p, vf x) {
  for (int i = 0; i < W; i++) scalar_store(p + i, x[i]);
}
#endif

// The first n < W elements; the other lanes are 0.
template <typename T>
static inline vf load_part(const T *p, int n) {
  T lanes[W];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T>
static inline void store_part(T *p, vf x, int n) {
  T lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}
#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
template <>
inline vf load_part(const float *p, int n) {
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <>
inline void store_part(float *p, vf x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
}
#endif

// Lanes l of a with bit S in l trade places with lanes l - S of b: one step of a transposition.
template <int S>
static inline void exchange(vf &a, vf &b) {
  vi first, second;
#pragma GCC unroll 16
  for (int l = 0; l < W; l++) first[l] = l & S ? l - S + W : l, second[l] = l & S ? l + W : l + S;
  const vf top = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = top;
}
template <int S>
static inline void exchange_all(vf *rows) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
}

// to = transposed W x W block at ``from``, rows ``stride`` apart: off-diagonal quarters trade places, recursively, in
// log2(W) steps on W registers.
static inline void transpose_block(const float *from, int64_t stride, float *to, int64_t to_stride) {
  vf rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) rows[i] = load(from + i * stride);
  if constexpr (W > 8) exchange_all<8>(rows);
  if constexpr (W > 4) exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(to + i * to_stride, rows[i]);
}

static inline float sum_lanes(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);  // in the order of the loop below
#endif
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
// Lane i of the result is the sum of the lanes of rows[i], which are overwritten; all sums have the same order: halves
// are exchanged and added, W - 1 additions for W sums.
static inline vf sums_of_rows(vf *rows) {
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) {
      vf &a = rows[i], &b = rows[i + half];
      switch (half) {
        case 8: exchange<W / 2 == 8 ? 8 : 1>(a, b); break;
        case 4: exchange<4 % W ? 4 % W : 1>(a, b); break;
        case 2: exchange<2>(a, b); break;
        default: exchange<1>(a, b);
      }
      a += b;
    }
  return rows[0];
}
static inline float max_lanes(vf x) {
  float lanes[W];
  store(lanes, x);
  float most = lanes[0];
  for (int i = 1; i < W; i++) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

#if defined(__AVX512F__)
// Bits of 2^(j/32), j = 0 .. 31, minus j << 18: adding k << 18 with k = 32 n + j gives the bits of 2^(k/32).
alignas(64) static const int32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0,
    0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf,
    0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf,
    0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

// 2^(k/32) (1 + q), 0 where ``kept`` is not set. k is in the low bits of ``t`` = k/32 + kShifter.
static inline vf power(vf t, vf q, __mmask16 kept = 0xffff) {
  const __m512i low = _mm512_load_si512(kPowers), high = _mm512_load_si512(kPowers + W), k = (__m512i)t;
  const __m512i bits = _mm512_add_epi32(_mm512_permutex2var_epi32(low, k, high), _mm512_slli_epi32(k, 18));
  const __m512 scale = (__m512)bits;
  return (vf)_mm512_maskz_fmadd_ps(kept, scale, (__m512)q, scale);
}
constexpr float kShifter = 393216.0f;  // 1.5 * 2^18: adding it rounds to multiples of 1/32, counted in the low bits
// e^r = 1 + r (kFirst + kSecond r) for |r| <= ln(2)/64, minimax, relative error 5e-08.
constexpr float kFirst = 1.00001466f, kSecond = 0.49999997f;
constexpr float kLn2 = 0.693147182f;  // error 1.9e-09, times n in e^x: a unit in the last place at |x| = 22
#endif
constexpr float kLog2E = 1.44269504088896341f;

#if !defined(__AVX512F__)
constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, counted in the low bits
// 2^n e^r with |r| <= ln(2)/2 and n in the low bits of ``t``: e^r = 1 + r + r^2 q(r), q of degree 4, minimax, error 3e-09.
static inline vf near_zero(vf r, vf t) {
  vf p = splat(1.381459879e-03f);
  p = p * r + 8.368716575e-03f;
  p = p * r + 4.166838899e-02f;
  p = p * r + 1.666652113e-01f;
  p = p * r + 4.999999404e-01f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vf)((vi)p + ((vi)t << 23));  // n goes into the exponent
}
#endif

// e^x within 3 units in the last place, 5 beyond |x| = 22; 0 below -87.33654, at most e^88.37 (finite), NaN of NaN.
static inline vf exponential(vf x) {
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
  x = (vf)_mm512_min_ps(_mm512_set1_ps(88.37f), (__m512)x);  // returns the second operand for a NaN
  const vf t = x * kLog2E + kShifter, n = t - kShifter;
  const vf r = x - n * kLn2;
  return power(t, (r * kSecond + kFirst) * r, kept);
#else
  const vi silent = x < splat(-87.33654f), nan = x != x;
  const vf given = x;
  x = minimum(maximum(x, splat(-87.33654f)), splat(88.37f));
  const vf t = x * kLog2E + kInteger;
  const vf n = t - kInteger;
  vf r = x - n * 0.693359375f;  // x = n ln 2 + r, with ln 2 in two parts, the first exact in few bits
  r = r + n * 2.12194440e-4f;  // Cody-Waite reduction
  const vf out = near_zero(r, t);
  return select(nan, given, (vf)(~silent & (vi)out));
#endif
}

// 2^x within 3 units in the last place for x < 127: 0 below -126, NaN of NaN. Cheaper than ``exponential``, since the
// difference from a multiple of 1/32 is exact and x is not limited from above.
static inline vf power_of_two(vf x) {
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const vf t = x + kShifter, r = x - (t - kShifter);
  return power(t, (r * (kSecond * kLn2 * kLn2) + kFirst * kLn2) * r, kept);
#else
  const vi silent = x < splat(-126.0f), nan = x != x;
  const vf level = maximum(x, splat(-126.0f)), t = level + kInteger;
  return select(nan, x, (vf)(~silent & (vi)near_zero((level - (t - kInteger)) * 0.693147182f, t)));
#endif
}

// 1 / x within 1 unit in the last place, for 1 <= x < 2^127: a 14-bit estimate and one Newton step.
static inline vf inverse(vf x) {
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + 2^x), with x clamped to [-126, 126]; for a NaN a number between 0 and 1.
static inline vf gate(vf x) {
#if defined(__AVX512DQ__)
  x = (vf)_mm512_range_ps((__m512)x, _mm512_set1_ps(126.0f), 2);  // min(|x|, 126) with the sign of x
  const vf t = x + kShifter, r = x - (t - kShifter);
  return inverse(1.0f + power(t, (r * (kSecond * kLn2 * kLn2) + kFirst * kLn2) * r));
#else
  return inverse(1.0f + exponential(x * 0.693147182f));
#endif
}

typedef double vd __attribute__((vector_size(W * 8)));

static inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf y;
  for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}
