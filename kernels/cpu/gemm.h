// Matrix products of blocks in cache: C[m, n] (+)= A[m, k] B[k, n].
//
// A is read element by element, with any strides, and broadcast to the lanes; rows of B and C are contiguous and n is a
// multiple of the vector width. Attention's layouts need no packing. The sum over k is taken in registers and then
// added to C: a single running sum over thousands of keys would accumulate their rounding errors.
#pragma once

#include "vec.h"

// Rows of a tile of C in registers, of two vectors each. AVX-512: 12 x 2 accumulators, 2 vectors of B and the broadcast
// element of A are 27 of 32 registers; AVX2: 4 x 2 + 3 of 16.
constexpr int kTileRows = W == 16 ? 12 : 4;

// C tile [ROWS, VECTORS * W]: per step of k, VECTORS loads of B and ROWS broadcasts of A for ROWS * VECTORS
// multiply-adds.
template <int ROWS, int VECTORS>
static inline void tile(int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb, float *c,
                        int64_t ldc, bool add) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) sum[i][j] = splat(0.0f);
  for (int64_t p = 0; p < k; p++) {
    vf row[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) row[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const vf factor = splat(a[i * a_row + p * a_col]);
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) sum[i][j] += factor * row[j];
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
template <int ROWS>
static inline void strip(int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                         float *c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) tile<ROWS, 2>(k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);
  for (; j < n; j += W) tile<ROWS, 1>(k, a, a_row, a_col, b + j, ldb, c + j, ldc, add);
}

// C[m, n] = A B, or C += A B with ``add``; A(i, p) = a[i * a_row + p * a_col].
static inline void gemm(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                        int64_t ldb, float *c, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    strip<kTileRows>(n, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
  for (; i + 4 <= m; i += 4) strip<4>(n, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; i++) strip<1>(n, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
}
