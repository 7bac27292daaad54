// Matrix products of bfloat16 operands with float32 sums, by AVX512-BF16 dot products where available.
#include "types.h"

namespace {

constexpr int64_t kRows = 8;  // rows of x per register tile, times two vectors of outputs: 16 accumulators

// w of C [m, n] = x [m, k] w [n, k]^T, packed as [n / 2W][k / 2][2W][2]: pairs along k, the operand of the dot-product
// instruction; without it the pairs are widened to float32.
struct Packed {
  std::vector<uint16_t> data;
  int64_t n, k, pairs, strips;
};

Packed pack(const View &w, bool transposed) {
  // Rows of the packed matrix are outputs; ``transposed``: w is [k, n].
  Packed p;
  p.n = transposed ? w.shape[1] : w.shape[0], p.k = transposed ? w.shape[0] : w.shape[1];
  p.pairs = (p.k + 1) / 2, p.strips = (p.n + 2 * W - 1) / (2 * W);
  p.data.assign(p.strips * p.pairs * 4 * W, 0);
  const uint16_t *from = w.as<uint16_t>();
  const int64_t row = transposed ? 1 : p.k, column = transposed ? p.n : 1;
  parallel(p.strips, 1, [&](int64_t a, int64_t b, int) {
    for (int64_t strip = a; strip < b; strip++)
      for (int64_t pair = 0; pair < p.pairs; pair++)
        for (int64_t j = 0; j < 2 * W; j++) {
          const int64_t o = strip * 2 * W + j;
          if (o >= p.n) continue;
          uint16_t *to = &p.data[((strip * p.pairs + pair) * 2 * W + j) * 2];
          to[0] = from[o * row + 2 * pair * column];
          if (2 * pair + 1 < p.k) to[1] = from[o * row + (2 * pair + 1) * column];
        }
  });
  return p;
}

// sum + low(pair) * w[., 0] + high(pair) * w[., 1] per lane; ``pair`` holds two bfloat16 of x.
inline vf dot_pairs(vf sum, uint32_t pair, const uint16_t *w) {
#if defined(__AVX512BF16__)
  __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
  __m512bh b = (__m512bh)_mm512_loadu_si512(w);
  return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
#else
  vu both;
  std::memcpy(&both, w, sizeof both);
  const uint32_t low = pair << 16, high = pair & 0xffff0000u;
  float first, second;
  std::memcpy(&first, &low, 4), std::memcpy(&second, &high, 4);
  sum += (vf)(both << 16) * first;
  return sum + (vf)(both & 0xffff0000u) * second;
#endif
}

// out [ROWS, 2W] = x [ROWS, k] w^T of one strip of 2W outputs.
template <int ROWS>
void block(const uint32_t *x, int64_t pairs, const uint16_t *w, float *out) {
  vf sum[ROWS][2] = {};
  for (int64_t p = 0; p < pairs; p++, w += 4 * W)
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      const uint32_t pair = x[i * pairs + p];
      sum[i][0] = dot_pairs(sum[i][0], pair, w), sum[i][1] = dot_pairs(sum[i][1], pair, w + 2 * W);
    }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 2; j++) store(out + (i * 2 + j) * W, sum[i][j]);
}

}  // namespace

// in: a [m, k] or, with scalar[0], [k, m]; w [n, k] or, with scalar[1], [k, n]; both bfloat16; out: [m, n] in the dtype
// of the output, sums in float32
KERNEL(matmul_bf16, 2, 1, 2) {
  const bool turned = scalar[0] != 0;
  const Packed w = pack(in[1], scalar[1] != 0);
  const int64_t m = turned ? in[0].shape[1] : in[0].shape[0];
  const uint16_t *a = in[0].as<uint16_t>();
  const int64_t row = turned ? 1 : w.k, column = turned ? m : 1;
  constexpr int64_t kBlock = 64;  // rows whose pairs stay in L2 while the strips of w pass
  const int64_t blocks = (m + kBlock - 1) / kBlock;
  const bool by_rows = blocks >= threads_for(blocks * w.strips, 1);
  const int64_t items = by_rows ? blocks : w.strips;
  parallel(items, 1, [&](int64_t first, int64_t last, int) {
    std::vector<uint32_t> x(kBlock * w.pairs);
    float sums[kRows * 2 * W];
    for (int64_t at = by_rows ? first : 0; at < (by_rows ? last : blocks); at++) {
      const int64_t from = at * kBlock, rows = std::min(kBlock, m - from);
      for (int64_t i = 0; i < rows; i++)
        for (int64_t p = 0; p < w.pairs; p++) {
          const uint32_t low = a[(from + i) * row + 2 * p * column];
          const uint32_t high = 2 * p + 1 < w.k ? a[(from + i) * row + (2 * p + 1) * column] : 0;
          x[i * w.pairs + p] = low | high << 16;
        }
      for (int64_t strip = by_rows ? 0 : first; strip < (by_rows ? w.strips : last); strip++) {
        const uint16_t *ws = &w.data[strip * w.pairs * 4 * W];
        const int64_t columns = std::min<int64_t>(2 * W, w.n - strip * 2 * W);
        for (int64_t i = 0; i < rows; i += kRows) {
          const int64_t some = std::min(kRows, rows - i);
          if (some == kRows)
            block<kRows>(&x[i * w.pairs], w.pairs, ws, sums);
          else
            for (int64_t r = 0; r < some; r++) block<1>(&x[(i + r) * w.pairs], w.pairs, ws, sums + r * 2 * W);
          with_type(out[0].dtype, [&](auto *t) {
            auto *o = out[0].as<std::remove_pointer_t<decltype(t)>>() + (from + i) * w.n + strip * 2 * W;
            for (int64_t r = 0; r < some; r++)
              for (int64_t j = 0; j < columns; j += W)
                put(o + r * w.n + j, load(sums + r * 2 * W + j), static_cast<int>(std::min<int64_t>(W, columns - j)));
          });
        }
      }
    }
  });
}
