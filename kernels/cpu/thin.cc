// Products of some dozen to some hundred float32 rows with a large matrix (prompts beside decoding): the matrix is
// packed strip by strip on its way through the caches, where matmul.cc packs all of it before it begins. For so few
// rows that copy, written to memory and read again, costs a fifth of the product.
//
// Sums run along k one by one from the bias on: the bits of a row depend neither on the number of threads nor on the
// other rows.
#include <type_traits>

#include "matmul.h"
#include "vec.h"

namespace {

// As in matmul.cc: accumulators, two vectors of the matrix and a broadcast element in 32 registers, or in 16.
constexpr int kRows = W == 16 ? 12 : 6;
constexpr int64_t kColumns = 2 * W;        // outputs of a strip
constexpr int64_t kDepth = 192;            // steps of k of a panel (24 KiB with AVX-512), which stays in L1
constexpr int64_t kMostRows = 384;         // beyond, packing the matrix once for all blocks of rows is worth its copy
constexpr int64_t kMostFloats = 4 << 20;   // of packed rows, which every strip reads again

thread_local FloatBuffer packed_rows, packed_panel;

// c [ROWS, kColumns] = begin + a [ROWS, depth] times a panel [depth, kColumns]; rows of ``begin`` begin_row apart, null
// for zero; element (i, p) of a is a[p * kRows + i].
template <int ROWS>
inline void tile(int64_t depth, const float *a, const float *panel, const float *begin, int64_t begin_row, float *c,
                 int64_t c_row) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) sum[i][j] = begin ? load(begin + i * begin_row + j * W) : splat(0.0f);
  for (int64_t p = 0; p < depth; p++, a += kRows, panel += kColumns) {
    const vf first = load(panel), second = load(panel + W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const vf factor = splat(a[i]);
      sum[i][0] += factor * first, sum[i][1] += factor * second;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) store(c + i * c_row + j * W, sum[i][j]);
}

// ``rows`` of a tile, at most kRows. One by one the last of them would wait for their own additions: two sums are fewer
// than a multiply-add takes cycles.
inline void tiles(int64_t rows, int64_t depth, const float *a, const float *panel, const float *begin,
                  int64_t begin_row, float *c, int64_t c_row) {
  int64_t r = 0;
  const auto take = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; r + kCount <= rows; r += kCount)
      tile<kCount>(depth, a + r, panel, begin ? begin + r * begin_row : nullptr, begin_row, c + r * c_row, c_row);
  };
  take(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 8) take(std::integral_constant<int, 8>{});
  take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

// Rows [first, last) of x [m, k] as [k][kRows]; what does not exist is never read.
void pack_rows(const float *x, int64_t k, int64_t first, int64_t last, float *to) {
  for (int64_t i = first; i < last; i++)
    for (int64_t p = 0; p < k; p++) to[p * kRows + i - first] = x[i * k + p];
}

// Steps [from, from + depth) of k of ``columns`` rows of w as a panel [depth, kColumns], zero where there is no row.
void pack_panel(const float *w, int64_t k, int64_t columns, int64_t from, int64_t depth, float *to) {
  int64_t done = 0;
  if (columns == kColumns)
    for (; done + W <= depth; done += W)
      for (int64_t c = 0; c < kColumns; c += W)
        transpose_block(w + c * k + from + done, k, to + done * kColumns + c, kColumns);
  for (int64_t c = 0; c < kColumns; c++)
    for (int64_t p = done; p < depth; p++) to[p * kColumns + c] = c < columns ? w[c * k + from + p] : 0.0f;
}

// out [m, columns], its rows n apart, of one strip.
void strip(int64_t m, int64_t n, int64_t k, const float *x, const float *w, int64_t columns, const float *bias,
           float *out) {
  float *panel = packed_panel.room(kDepth * kColumns);
  alignas(64) float edge[kRows * kColumns], start[kColumns] = {};
  const bool whole = columns == kColumns;
  if (bias) std::memcpy(start, bias, columns * sizeof(float));
  for (int64_t from = 0; from < k; from += kDepth) {
    const int64_t depth = std::min(kDepth, k - from);
    pack_panel(w, k, columns, from, depth, panel);
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, m - i);
      const float *a = x + i * k + from * kRows;
      float *to = out + i * n;
      if (whole) {
        tiles(rows, depth, a, panel, from ? to : start, from ? n : 0, to, n);
        continue;
      }
      if (from)
        for (int64_t r = 0; r < rows; r++) std::memcpy(edge + r * kColumns, to + r * n, columns * sizeof(float));
      tiles(rows, depth, a, panel, from ? edge : start, from ? kColumns : 0, edge, kColumns);
      for (int64_t r = 0; r < rows; r++) std::memcpy(to + r * n, edge + r * kColumns, columns * sizeof(float));
    }
  }
}

}  // namespace

bool thin_serves(int64_t m, int64_t k) { return m <= kMostRows && m * k <= kMostFloats; }

void thin_product(int64_t m, int64_t n, int64_t k, const float *x, const float *w, const float *bias, float *c) {
  const int64_t panels = (m + kRows - 1) / kRows, strips = (n + kColumns - 1) / kColumns;
  float *rows = packed_rows.room(panels * kRows * k);
  parallel(panels, std::max<int64_t>(1, 16384 / (kRows * k)), [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; i++) pack_rows(x, k, i * kRows, std::min(m, (i + 1) * kRows), rows + i * kRows * k);
  });
  parallel_guided(strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; s++) {
      const int64_t column = s * kColumns, columns = std::min<int64_t>(kColumns, n - column);
      strip(m, n, k, rows, w + column * k, columns, bias ? bias + column : nullptr, c + column);
    }
  });
}
