// Products of few rows with a large matrix (decoding), bound by reading the matrix once.
//
// The matrix has the rows' type, or is int8 with a factor per output (rows_int8.h). It is processed in
// strips of W outputs; within a strip, blocks of ROWS rows and W / ROWS outputs have their W sums in registers. Every
// sum runs along its row in the same order, so the bits of a row do not depend on the other rows.
#include <optional>

#include "rows_int8.h"

namespace {

constexpr int64_t kItem = 32768;  // elements of the matrix per task of a thread

template <typename T>
inline vf weights(const T *p) {
  return load(p);
}
template <>
inline vf weights(const int8_t *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = p[i];
  return x;
#endif
}
template <typename T>
inline vf weights(const T *p, int n) {
  T lanes[W];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, n * sizeof(T));
  return weights(lanes);
}

// The rows as float32, a whole number of vectors wide: in place, or a zero-padded copy.
struct FloatRows {
  const float *data;
  int64_t rows, columns, stride;
  Floats room;

  explicit FloatRows(const View &x)
      : data(x.as<float>()), rows(x.rows()), columns(x.columns()), stride((columns + W - 1) / W * W) {
    if (x.dtype == F32 && stride == columns) return;
    room.assign(rows * stride, 0.0f);
    with_type(x.dtype, [&](auto *t) {
      const auto *p = x.as<std::remove_pointer_t<decltype(t)>>();
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i += W)
          store(&room[r * stride + i], get(p + r * columns + i, static_cast<int>(std::min<int64_t>(W, columns - i))));
    });
    data = room.data();
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__)
// The rows as bfloat16, a whole number of vectors of pairs wide: in place, or a zero-padded copy.
struct PairedRows {
  static constexpr int64_t kStep = 2 * W;  // elements of a vector
  const uint16_t *data;
  int64_t rows, columns, stride;
  std::vector<uint16_t, OnLines<uint16_t>> room;

  explicit PairedRows(const View &x)
      : data(x.as<uint16_t>()), rows(x.rows()), columns(x.columns()), stride((columns + kStep - 1) / kStep * kStep) {
    if (stride == columns) return;
    room.assign(rows * stride, 0);
    for (int64_t r = 0; r < rows; r++) std::memcpy(&room[r * stride], data + r * columns, columns * sizeof(uint16_t));
    data = room.data();
  }
};

inline __m512bh pairs_of(const uint16_t *p, int64_t n = PairedRows::kStep) {
  const __mmask32 kept = n < PairedRows::kStep ? (1u << n) - 1 : 0xffffffff;
  return (__m512bh)_mm512_maskz_loadu_epi16(kept, p);
}

// As below, by dot products of bfloat16 pairs with float32 sums.
template <int ROWS, bool AHEAD>
inline vf block(const PairedRows &x, int64_t r, const bf16 *w, int64_t outputs) {
  constexpr int kOutputs = W / ROWS, kAtOnce = std::min(kOutputs, 4);
  const uint16_t *row = x.data + r * x.stride;
  vf sums[W];
  for (int first = 0; first < kOutputs; first += kAtOnce) {
    const uint16_t *rows[kAtOnce];
    __m512 sum[ROWS][kAtOnce] = {};
#pragma GCC unroll 8
    for (int o = 0; o < kAtOnce; o++)
      rows[o] = reinterpret_cast<const uint16_t *>(w) + std::min<int64_t>(first + o, outputs - 1) * x.columns;
    const auto add = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int o = 0; o < kAtOnce; o++) {
        const __m512bh factors = pairs_of(rows[o] + i, n);
        if constexpr (AHEAD) __builtin_prefetch(rows[o] + kAtOnce * x.columns + i);
#pragma GCC unroll 8
        for (int k = 0; k < ROWS; k++)
          sum[k][o] = _mm512_dpbf16_ps(sum[k][o], factors, (__m512bh)_mm512_loadu_si512(row + k * x.stride + i));
      }
    };
    int64_t i = 0;
    for (; i + PairedRows::kStep <= x.columns; i += PairedRows::kStep) add(i, PairedRows::kStep);
    if (i < x.columns) add(i, x.columns - i);
#pragma GCC unroll 8
    for (int k = 0; k < ROWS; k++)
#pragma GCC unroll 8
      for (int o = 0; o < kAtOnce; o++) sums[k * kOutputs + first + o] = (vf)sum[k][o];
  }
  return sums_of_rows(sums);
}
#else
using PairedRows = FloatRows;
#endif

// Keeps x in a register; otherwise the compiler reloads it for every product.
inline void keep([[maybe_unused]] vf &x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
}

// Dot products of ROWS rows of x, from first_row on, with W / ROWS rows of w, in lane r * (W / ROWS) + o. At most 4
// outputs at a time, so that their addresses stay in general-purpose registers. AHEAD: the next outputs' rows of w are
// prefetched, since rows of w are streams too short for the processor's own prefetch to find the next ones.
template <int ROWS, bool AHEAD, typename T>
inline vf block(const FloatRows &given, int64_t first_row, const T *w, int64_t outputs) {
  constexpr int kOutputs = W / ROWS, kAtOnce = std::min(kOutputs, 4);
  const int64_t x_row = given.stride, columns = given.columns;
  const float *x = given.data + first_row * x_row;
  const int64_t whole = columns / W * W;
  vf sums[W];
  for (int first = 0; first < kOutputs; first += kAtOnce) {
    const T *rows[kAtOnce];
    vf sum[ROWS][kAtOnce] = {};
#pragma GCC unroll 8
    for (int o = 0; o < kAtOnce; o++) rows[o] = w + std::min<int64_t>(first + o, outputs - 1) * columns;
    for (int64_t i = 0; i < whole; i += W) {
      vf value[ROWS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) value[r] = load(x + r * x_row + i);
#pragma GCC unroll 8
      for (int o = 0; o < kAtOnce; o++) {
        vf factor = weights(rows[o] + i);
        keep(factor);
        if constexpr (AHEAD) __builtin_prefetch(rows[o] + kAtOnce * columns + i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r][o] += value[r] * factor;
      }
    }
    if (whole < columns) {
      const int rest = static_cast<int>(columns - whole);
#pragma GCC unroll 8
      for (int o = 0; o < kAtOnce; o++) {
        const vf factor = weights(rows[o] + whole, rest);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r][o] += load(x + r * x_row + whole) * factor;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int o = 0; o < kAtOnce; o++) sums[r * kOutputs + first + o] = sum[r][o];
  }
  return sums_of_rows(sums);
}

// out [ROWS, W]: ROWS rows of x, from row r on, times a strip of ``some`` outputs. Only the first rows find the strip
// outside the caches.
template <int ROWS, typename X, typename T>
inline void strip(const X &x, int64_t r, const T *w, int64_t some, float *out) {
  constexpr int kOutputs = W / ROWS;
  for (int64_t o = 0; o < some; o += kOutputs) {
    float lanes[W];
    const T *from = w + o * x.columns;
    store(lanes, r ? block<ROWS, false>(x, r, from, some - o) : block<ROWS, true>(x, r, from, some - o));
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < kOutputs; j++) out[i * W + o + j] = lanes[i * kOutputs + j];
  }
}

// out [rows, outputs] = factor * (x w^T) + bias, strip by strip.
template <typename T, typename X>
void product(const X &x, const View &w, const float *factor, const View *bias, const View &out) {
  const int64_t rows = x.rows, outputs = w.shape[0], columns = w.shape[1], strips = (outputs + W - 1) / W;
  const int64_t at_once = std::max<int64_t>(1, kItem / (W * std::max<int64_t>(1, columns)));
  parallel_items((strips + at_once - 1) / at_once, [&](int64_t item, int) {
    Floats room(rows * W);
    for (int64_t s = item * at_once; s < std::min(strips, (item + 1) * at_once); s++) {
      const int64_t first = s * W, some = std::min<int64_t>(W, outputs - first);
      const T *from = w.as<T>() + first * columns;
      int64_t r = 0;
      // Blocks of 8 floating-point rows pay while the matrix comes from memory. With more rows the first-level cache is
      // the limit, and blocks of 4 leave more of it to the strip.
      if constexpr (W == 16)
        if (rows < 16 || std::is_same_v<X, QuantizedRows>)
          for (; r + 8 <= rows; r += 8) strip<8>(x, r, from, some, &room[r * W]);
      for (; r + 4 <= rows; r += 4) strip<4>(x, r, from, some, &room[r * W]);
      if (r + 2 <= rows) strip<2>(x, r, from, some, &room[r * W]), r += 2;
      if (r < rows) strip<1>(x, r, from, some, &room[r * W]);
      const int n = static_cast<int>(some);
      const vf scale = factor ? get(factor + first, n) : splat(1.0f);
      vf more = splat(0.0f);
      if (bias) with_type(bias->dtype, [&](auto *t) { more = get(bias->as<std::remove_pointer_t<decltype(t)>>() + first, n); });
      with_type(out.dtype, [&](auto *t) {
        auto *to = out.as<std::remove_pointer_t<decltype(t)>>() + first;
        for (int64_t i = 0; i < rows; i++) put(to + i * outputs, load(&room[i * W]) * scale + more, n);
      });
    }
  });
}

// The rows of a call in the forms that its matrices are multiplied with, each made once.
struct GivenRows {
  const View &x;
  std::optional<FloatRows> floats;
  std::optional<PairedRows> pairs;
  std::optional<QuantizedRows> whole;

  const FloatRows &as_floats() { return floats ? *floats : floats.emplace(x); }
  const PairedRows &as_pairs() { return pairs ? *pairs : pairs.emplace(x); }
  const QuantizedRows &quantized() {
    if (whole) return *whole;
    const FloatRows &rows = as_floats();
    return whole.emplace(rows.data, rows.rows, rows.stride, rows.columns);
  }
};

// The matrices of a call. given: for each the matrix, factors of its outputs, bias; has: are there factors, a bias.
void matrices(const View &x, const View *given, const double *has, const View *out, int count) {
  GivenRows rows{x};
  for (; count--; given += 3, has += 2, out++) {
    const float *factor = has[0] ? given[1].as<float>() : nullptr;
    const View *bias = has[1] ? &given[2] : nullptr;
    switch (given[0].dtype) {
      case I8: product<int8_t>(rows.quantized(), given[0], factor, bias, *out); break;
      case BF16: product<bf16>(rows.as_pairs(), given[0], factor, bias, *out); break;
      case F16: product<f16>(rows.as_floats(), given[0], factor, bias, *out); break;
      default: product<float>(rows.as_floats(), given[0], factor, bias, *out);
    }
  }
}

}  // namespace

// in: x [..., k], and for each matrix: w [m, k] of x's dtype or int8, factors float32 [m] of int8 outputs, bias [m];
// out: [..., m] in x's dtype; scalars, for each: has factors, has bias
KERNEL(linear_rows, 4, 1, 2) { matrices(in[0], in + 1, scalar, out, 1); }
KERNEL(linear_rows_2, 7, 2, 4) { matrices(in[0], in + 1, scalar, out, 2); }
KERNEL(linear_rows_3, 10, 3, 6) { matrices(in[0], in + 1, scalar, out, 3); }

// in: w int8 [m, k], factors float32 [m]; out: w * factors [m, k]
KERNEL(dequantize, 2, 1, 0) {
  const int64_t rows = in[0].shape[0], columns = in[0].shape[1];
  with_type(out[0].dtype, [&](auto *t) {
    auto *to = out[0].as<std::remove_pointer_t<decltype(t)>>();
    parallel(rows, std::max<int64_t>(1, kItem / std::max<int64_t>(1, columns)), [&](int64_t first, int64_t last, int) {
      for (int64_t r = first; r < last; r++)
        for (int64_t i = 0; i < columns; i += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, columns - i));
          const int8_t *p = in[0].as<int8_t>() + r * columns + i;
          put(to + r * columns + i, (n == W ? weights(p) : weights(p, n)) * in[1].as<float>()[r], n);
        }
    });
  });
}
