// Products of rows with an int8 matrix in integers.
//
// Each row is quantized in groups of kGroup columns: q = round(127 x / m), m the largest magnitude of the group. The
// products of a group are summed exactly in 32 bits and enter a float sum by the group's scale m / 127, in the order of
// the groups: the bits of a row depend neither on the other rows nor on the number of threads.
//
// VNNI multiplies unsigned by signed bytes. The matrix gives the unsigned ones, w + 128, by flipping a bit; the sums
// then begin at -128 sum(q), lane by lane, which is known from the row. Without VNNI, 16-bit products give the same
// sums.
#pragma once

#include "types.h"

constexpr int64_t kGroup = 128;     // columns that share a scale
constexpr int64_t kBytes = 4 * W;   // columns per vector: four products are summed in a lane
static_assert(kGroup % kBytes == 0);

#if defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i Bytes;
#elif defined(__AVX2__) && !defined(__AVX512F__)
typedef __m256i Bytes;
#else
struct Bytes {
  int8_t at[kBytes];
};
#endif

inline Bytes load_bytes(const int8_t *p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_loadu_si512(p);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
#else
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return x;
#endif
}

// Factors of the matrix, prepared for dot(): n of them, and zeros.
inline Bytes factors_of(const int8_t *p, int64_t n) {
  Bytes x;
  if (n < kBytes) {
    int8_t room[kBytes] = {};
    std::memcpy(room, p, n);
    x = load_bytes(room);
  } else {
    x = load_bytes(p);
  }
#if defined(__AVX512VNNI__)
  return _mm512_xor_si512(x, _mm512_set1_epi8(-128));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return _mm256_xor_si256(x, _mm256_set1_epi8(-128));
#else
  return x;
#endif
}

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool kUnsigned = true;
#else
constexpr bool kUnsigned = false;
#endif

// sum + the four products of each lane.
inline vi dot(vi sum, Bytes factors, const int8_t *row) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, factors, load_bytes(row));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, factors, load_bytes(row));
#elif defined(__AVX512F__) && defined(__AVX512BW__)
  const Bytes x = load_bytes(row);
  const Bytes even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(factors, 8), 8),
                                       _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const Bytes odd = _mm512_madd_epi16(_mm512_srai_epi16(factors, 8), _mm512_srai_epi16(x, 8));
  return sum + (vi)_mm512_add_epi32(even, odd);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const Bytes x = load_bytes(row);
  const Bytes even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(factors, 8), 8),
                                       _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const Bytes odd = _mm256_madd_epi16(_mm256_srai_epi16(factors, 8), _mm256_srai_epi16(x, 8));
  return sum + (vi)_mm256_add_epi32(even, odd);
#else
  int8_t x[kBytes], w[kBytes];
  std::memcpy(x, row, sizeof x), std::memcpy(w, &factors, sizeof w);
  for (int i = 0; i < W; i++)
    for (int j = 0; j < 4; j++) sum[i] += int32_t(w[4 * i + j]) * x[4 * i + j];
  return sum;
#endif
}
// Rounded to integers, to the even one in the middle.
inline vi nearest(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else
  vi whole;
  for (int i = 0; i < W; i++) whole[i] = static_cast<int32_t>(std::nearbyint(x[i]));
  return whole;
#endif
}
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// Rows of a call, quantized.
struct QuantizedRows {
  int64_t rows, columns, groups, stride;
  std::vector<int8_t, OnLines<int8_t>> values;        // [rows, stride]
  Floats scales;                                      // [rows, groups]
  std::vector<int32_t, OnLines<int32_t>> beginnings;  // [rows, groups, W]: -128 sum(q) of each lane, where needed

  // x [rows, x_row] float32, zeros from ``columns`` to a whole number of vectors.
  QuantizedRows(const float *x, int64_t rows, int64_t x_row, int64_t columns)
      : rows(rows), columns(columns), groups((columns + kGroup - 1) / kGroup),
        stride((columns + kBytes - 1) / kBytes * kBytes), values(rows * stride), scales(rows * groups),
        beginnings(kUnsigned ? rows * groups * W : 0) {
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns));
    parallel(rows, grain, [&](int64_t first, int64_t last, int) {
      for (int64_t r = first; r < last; r++)
        for (int64_t g = 0; g < groups; g++) group(x + r * x_row, r, g, x_row);
    });
  }

 private:
  void group(const float *x, int64_t r, int64_t g, int64_t x_row) {
    const int64_t from = g * kGroup, to = std::min(from + kGroup, x_row), end = std::min(from + kGroup, stride);
    vi most = {};
    for (int64_t i = from; i < to; i += W) {
      const vi bits = (vi)load(x + i) & 0x7fffffff;  // as integers, a NaN is above infinity, and that above the others
      most = (vi)select(bits > most, (vf)bits, (vf)most);
    }
    int32_t top = 0;
    for (int i = 0; i < W; i++) top = std::max(top, most[i]);
    float magnitude;
    std::memcpy(&magnitude, &top, 4);
    // Rows that are not finite must remain visible in the result: 0 times such a scale is NaN.
    const bool quantizable = magnitude >= 0x1p-100f && top < 0x7f800000;
    const float inverse = quantizable ? 127.0f / magnitude : 0.0f;
    scales[r * groups + g] = quantizable || top >= 0x7f800000 ? magnitude / 127.0f : 0.0f;
    int8_t *out = &values[r * stride];
    if (!quantizable) {
      std::memset(out + from, 0, end - from);
    } else {
      for (int64_t i = from; i < to; i += W) {
        const vi whole = nearest(load(x + i) * inverse);
        typedef int8_t Narrow __attribute__((vector_size(W)));
        const Narrow bytes = __builtin_convertvector(whole, Narrow);
        std::memcpy(out + i, &bytes, W);
      }
      if (to < end) std::memset(out + to, 0, end - to);
    }
    if (!kUnsigned) return;
    int32_t *begin = &beginnings[(r * groups + g) * W];
    vi sum = {};
    for (int64_t i = from; i < end; i += kBytes)
      for (int l = 0; l < W; l++)
        for (int j = 0; j < 4; j++) sum[l] += out[i + 4 * l + j];
    sum *= -128;
    std::memcpy(begin, &sum, sizeof sum);
  }
};

// Products of ROWS rows, from row r on, with W / ROWS rows of w, in lane row * (W / ROWS) + output. AHEAD: the next
// outputs' rows of w are prefetched (rows.cc).
template <int ROWS, bool AHEAD>
inline vf block(const QuantizedRows &x, int64_t r, const int8_t *w, int64_t outputs) {
  constexpr int kOutputs = W / ROWS, kAtOnce = std::min(kOutputs, 4);
  const int64_t columns = x.columns;
  const int8_t *row = &x.values[r * x.stride];
  vf sums[W];
  for (int first = 0; first < kOutputs; first += kAtOnce) {
    const int8_t *rows[kAtOnce];
    vf sum[ROWS][kAtOnce] = {};
#pragma GCC unroll 8
    for (int o = 0; o < kAtOnce; o++) rows[o] = w + std::min<int64_t>(first + o, outputs - 1) * columns;
    for (int64_t g = 0; g < x.groups; g++) {
      vi exact[ROWS][kAtOnce];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        vi begin = {};
        if (kUnsigned) std::memcpy(&begin, &x.beginnings[((r + i) * x.groups + g) * W], sizeof begin);
#pragma GCC unroll 8
        for (int o = 0; o < kAtOnce; o++) exact[i][o] = begin;
      }
      const int64_t from = g * kGroup, to = std::min(from + kGroup, columns), whole = to / kBytes * kBytes;
      for (int64_t c = from; c < whole; c += kBytes)
#pragma GCC unroll 8
        for (int o = 0; o < kAtOnce; o++) {
          const Bytes factors = factors_of(rows[o] + c, kBytes);
          if constexpr (AHEAD) __builtin_prefetch(rows[o] + kAtOnce * columns + c);
#pragma GCC unroll 8
          for (int i = 0; i < ROWS; i++) exact[i][o] = dot(exact[i][o], factors, row + i * x.stride + c);
        }
      if (whole < to)
#pragma GCC unroll 8
        for (int o = 0; o < kAtOnce; o++) {
          const Bytes factors = factors_of(rows[o] + whole, to - whole);
#pragma GCC unroll 8
          for (int i = 0; i < ROWS; i++) exact[i][o] = dot(exact[i][o], factors, row + i * x.stride + whole);
        }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        const vf scale = splat(x.scales[(r + i) * x.groups + g]);
#pragma GCC unroll 8
        for (int o = 0; o < kAtOnce; o++) sum[i][o] += to_float(exact[i][o]) * scale;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
      for (int o = 0; o < kAtOnce; o++) sums[i * kOutputs + first + o] = sum[i][o];
  }
  return sums_of_rows(sums);
}
