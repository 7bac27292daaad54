// Declarations shared by the float32 products: by multiply-adds (matmul.cc; few rows: thin.cc) and in tiles
// (split_matmul.cc).
#pragma once

#include "kernel.h"

struct Operand {
  const float *data;
  int64_t row, column;  // strides of the rows and the columns; one of the two is 1
};

// A buffer of floats on cache lines, kept between calls: page faults on fresh memory cost as much as the packing.
struct FloatBuffer {
  float *room(size_t size) {
    if (held.size() < size) {
      Floats().swap(held);  // its numbers are of the call before, and would be copied
      held.resize(size);
    }
    return held.data();
  }
  Floats held;
};

// What is added to a product's sums beside A B: low [m, rank] times w [rank, n], as further steps of k.
struct LowRank {
  const float *low;
  Operand w;
  int64_t rank;
};

// C [m, n] = A [m, k] B [k, n] + bias (null for zero) + low w; ``add``: C += A B + low w, without a bias. k is not zero. The
// bits of a row of C depend neither on the number of threads nor on the other rows.
void float_product(int64_t m, int64_t n, int64_t k, const Operand &a, const Operand &b, const float *bias, float *c,
                   bool add, const LowRank &more = {nullptr, {}, 0});

// Whether float32 products use tiles: the processor has them, the system grants them, and the process did not refuse them.
bool split_serves();

// C [m, n] = A [m, k] W^T + bias (null for zero), W [n, k]; ``add``: C += A W^T, without a bias. k is not zero. The bits
// of a row of C depend neither on the number of threads nor on the other rows.
void split_product(int64_t m, int64_t n, int64_t k, const Operand &a, const Operand &w, const float *bias, float *c,
                   bool add);

// C [m, n] = X [m, k] W^T + bias (null for zero), W [n, k], both contiguous, for as few rows as ``thin_serves`` says
// (thin.cc). k is not zero. The bits of a row of C depend neither on the number of threads nor on the other rows.
bool thin_serves(int64_t m, int64_t k);
void thin_product(int64_t m, int64_t n, int64_t k, const float *x, const float *w, const float *bias, float *c);
