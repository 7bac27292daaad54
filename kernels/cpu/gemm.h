// Matrix products of blocks in cache: C[m, n] (+)= A[m, k] B[k, n].
//
// A is read element by element and broadcast to the lanes. Its rows (a_col is 1) or its columns (a_row is 1, DOWN) are
// contiguous, and so are the rows of B and C; n is a multiple of the vector width. Attention's layouts need no packing.
// The sum over k is taken in registers and then added to C: a single running sum over thousands of keys would accumulate
// their rounding errors.
#pragma once

#include <type_traits>

#include "vec.h"

// Rows of a tile of C in registers, of two vectors each. AVX-512: 12 x 2 accumulators, 2 vectors of B and the broadcast
// element of A are 27 of 32 registers; AVX2: 4 x 2 + 3 of 16.
constexpr int kTileRows = W == 16 ? 12 : 4;

// C tile [ROWS, VECTORS * W]: per step of k, VECTORS loads of B and ROWS broadcasts of A for ROWS * VECTORS
// multiply-adds.
template <int ROWS, int VECTORS, bool DOWN>
static inline void tile(int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb, float *c,
                        int64_t ldc, bool add) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) sum[i][j] = splat(0.0f);
  // Every third row of A has a pointer: the two after it are one and two strides away, which an address can say. DOWN,
  // rows are constants away from one pointer. An addition for each row and step took up to a tenth of a product.
  const float *third[(ROWS + 2) / 3];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i += 3) third[i / 3] = a + i * a_row;
  for (int64_t p = 0; p < k; p++, b += ldb) {
    vf row[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) row[j] = load(b + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const vf factor = splat(DOWN ? a[i] : third[i / 3][i % 3 * a_row]);
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) sum[i][j] += factor * row[j];
    }
    if (DOWN) {
      a += a_col;
    } else {
#pragma GCC unroll 12
      for (auto &p3 : third) p3 += 1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) {
      float *p = c + i * ldc + j * W;
      store(p, add ? load(p) + sum[i][j] : sum[i][j]);
    }
}

// ROWS rows of C, by pairs of vectors.
template <int ROWS, bool DOWN>
static inline void strip(int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                         float *c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) tile<ROWS, 2, DOWN>(k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);
  for (; j < n; j += W) tile<ROWS, 1, DOWN>(k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);
}

// C[m, n] = A B, or C += A B with ``add``; A(i, p) = a[i * a_row + p * a_col], where one of the strides is 1.
template <bool DOWN>
static inline void strips(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                          int64_t ldb, float *c, int64_t ldc, bool add) {
  const auto at = [&](auto rows, int64_t i) {
    strip<rows, DOWN>(n, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
  };
  int64_t i = 0;
  if constexpr (kTileRows > 8) {  // of 16 rows twice 8: a tile of 4 takes the time of one of 8
    for (; i + kTileRows <= m && m - i != 16; i += kTileRows) at(std::integral_constant<int, kTileRows>(), i);
    for (; i + 8 <= m; i += 8) at(std::integral_constant<int, 8>(), i);
  }
  for (; i + 4 <= m; i += 4) at(std::integral_constant<int, 4>(), i);
  for (; i < m; i++) at(std::integral_constant<int, 1>(), i);
}
static inline void gemm(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                        int64_t ldb, float *c, int64_t ldc, bool add) {
  if (a_row == 1)
    strips<true>(m, n, k, a, 1, a_col, b, ldb, c, ldc, add);
  else
    strips<false>(m, n, k, a, a_row, 1, b, ldb, c, ldc, add);
}
