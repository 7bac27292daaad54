// float32 matrix products by multiply-adds, in the blocking of BLIS (Van Zee and van de Geijn, 2015); split_matmul.cc
// computes them where the processor has matrix tiles.
//
// B [k, n] is packed into panels [depth][kColumns] in the order of use, which makes a transposed operand free; the bias
// is the initial value of the sums. A is packed too, into panels [depth][kRows], because rows a power of two apart
// evict each other from the cache, unless C is too narrow to amortise the copy.
#include "matmul.h"
#include "vec.h"

namespace {

// A tile of C in registers: AVX-512 12 x 2 accumulators + 2 vectors of B + 1 broadcast of A of 32 registers; AVX2
// 6 x 2 + 3 of 16.
constexpr int kRows = W == 16 ? 12 : 6, kVectors = 2;
constexpr int kColumns = kVectors * W;
constexpr int kPart = W == 16 ? 4 : 2;  // rows of the tiles of an incomplete panel of A
constexpr int64_t kWorthCopying = 8;    // strips of C from which on packing A pays
// Steps of k per pass. A panel of B (64 KiB with AVX-512) then comes from L2, which feeds the tiles as fast as L1, and
// C is read and written again in fewer passes.
constexpr int64_t kDepth = 512;
constexpr int64_t kPanels = 8;   // of A per pass, at most: the packed block (192 KiB with AVX-512) stays in L2
constexpr int64_t kAbreast = 4;  // panels of a transposed A packed together: they share its cache lines
constexpr int64_t kPacked = 1 << 20;  // floats of B packed at a time, 4 MiB: they stay in L3, and in memory afterwards
constexpr int64_t kLeastStrips = 64;  // of which A is packed anew for each part of B that holds fewer strips than C

thread_local FloatBuffer packed_a, packed_b;

// Where kRows <= W: to [W, kRows] = the transposed kRows x W block at ``from``; up to W - kRows floats beyond it are overwritten.
inline void turn_block(const float *from, int64_t stride, float *to) {
  vf rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) rows[i] = i < kRows ? load(from + i * stride) : splat(0.0f);
  if constexpr (W > 8) exchange_all<8>(rows);
  if constexpr (W > 4) exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(to + i * kRows, rows[i]);
}

// Rows [first, first + rows) and k [from, from + depth) of A as panels [rows / kRows][depth][kRows], zero-padded; up to
// W floats beyond them are overwritten.
void pack_a(const Operand &a, int64_t first, int64_t rows, int64_t from, int64_t depth, float *to) {
  const float *begin = a.data + first * a.row + from * a.column;
  const int64_t whole = rows / kRows * kRows;
  if (a.row == 1)
    for (int64_t panel = 0; panel < whole; panel += kAbreast * kRows) {
      const int64_t last = std::min(whole, panel + kAbreast * kRows);
      for (int64_t j = 0; j < depth; j++)
        for (int64_t at = panel; at < last; at += kRows)
          std::memcpy(to + at * depth + j * kRows, begin + at + j * a.column, kRows * sizeof(float));
    }
  for (int64_t panel = a.row == 1 ? whole : 0; panel < rows; panel += kRows) {
    const int64_t some = std::min<int64_t>(kRows, rows - panel);
    const float *p = begin + panel * a.row;
    float *at = to + panel * depth;
    int64_t done = 0;
    if (kRows <= W && some == kRows && a.column == 1)
      for (; done + W <= depth; done += W) turn_block(p + done, a.row, at + done * kRows);
    for (int64_t j = done; j < depth; j++)
      for (int i = 0; i < kRows; i++) at[j * kRows + i] = i < some ? p[i * a.row + j * a.column] : 0.0f;
  }
}

// A strip of B, columns [first, first + kColumns), as a panel [depth][kColumns], zero-padded.
void pack_b(const Operand &b, int64_t first, int64_t columns, int64_t from, int64_t depth, float *to) {
  const float *p = b.data + from * b.row + first * b.column;
  if (columns == kColumns && b.column == 1) {
    for (int64_t j = 0; j < depth; j++) std::memcpy(to + j * kColumns, p + j * b.row, kColumns * sizeof(float));
    return;
  }
  int64_t done = 0;
  if (columns == kColumns && b.row == 1)
    for (; done + W <= depth; done += W)
      for (int64_t c = 0; c < kColumns; c += W)
        transpose_block(p + c * b.column + done, b.column, to + done * kColumns + c, kColumns);
  for (int64_t c = 0; c < kColumns; c++)
    if (c < columns)
      for (int64_t j = done; j < depth; j++) to[j * kColumns + c] = p[j * b.row + c * b.column];
    else
      for (int64_t j = done; j < depth; j++) to[j * kColumns + c] = 0.0f;
}

// C tile [ROWS, kColumns] = begin + A [ROWS, depth] B panel, where ``begin`` is the tile itself, one row (a bias) for
// all rows, or null for zero. Per step of k: 2 loads of B, ROWS broadcasts of A, 2 ROWS multiply-adds. Meanwhile ``share``
// floats a step from ``ahead`` on, which need not exist, are brought into L2. Inlined, because constant strides of a
// packed A leave the registers to the sums.
template <int ROWS>
__attribute__((always_inline)) inline void tile(int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                                                const float *b, const float *begin, int64_t begin_row, float *c,
                                                int64_t ldc, const float *ahead, int64_t share) {
  vf sum[ROWS][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) sum[i][j] = begin ? load(begin + i * begin_row + j * W) : splat(0.0f);
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)  // the lines of C, which is written at the end
    for (int j : {0, W, kColumns - 1}) __builtin_prefetch(c + i * ldc + j, 1);
  for (int64_t p = 0; p < depth; p++, a += a_column, b += kColumns, ahead += share) {
    const vf first = load(b), second = load(b + W);
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const vf factor = splat(a[i * a_row]);
      sum[i][0] += factor * first, sum[i][1] += factor * second;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) store(c + i * ldc + j * W, sum[i][j]);
}

// ``rows`` <= kRows rows and ``columns`` <= kColumns columns of C. An incomplete tile is computed in ``edge`` from the
// elements that exist, its sums in the order of a whole one's.
template <bool PACKED>
inline void tiles(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                  const float *b, const float *begin, int64_t begin_row, float *c, int64_t ldc, const float *ahead,
                  int64_t share) {
  if (PACKED) a_row = 1, a_column = kRows;
  if (rows == kRows && columns == kColumns)
    return tile<kRows>(depth, a, a_row, a_column, b, begin, begin_row, c, ldc, ahead, share);
  alignas(64) float edge[kRows * kColumns];
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t j = 0; j < kColumns; j++)
      edge[r * kColumns + j] = begin && r < rows && j < columns ? begin[r * begin_row + j] : 0.0f;
  if (rows == kRows) {
    tile<kRows>(depth, a, a_row, a_column, b, edge, kColumns, edge, kColumns, ahead, share);
  } else {
    constexpr int kSome = PACKED ? kPart : 1;  // a packed panel has rows of zeros
    for (int64_t r = 0; r < rows; r += kSome) {
      float *at = edge + r * kColumns;
      tile<kSome>(depth, a + r * a_row, a_row, a_column, b, at, kColumns, at, kColumns, ahead, share);
    }
  }
  for (int64_t r = 0; r < rows; r++) std::memcpy(c + r * ldc, edge + r * kColumns, columns * sizeof(float));
}

// Whether a product is too narrow for tiles to repay the splitting of its operands into parts, as those of low-rank
// adapters are: packing takes 0.8 ns an element, tiles save 12 ps a step of k and element of C. The number of rows of a
// batch (m, unless A is turned) does not count: a row's bits must not depend on it.
inline bool narrow(int64_t m, int64_t n, int64_t k, const Operand &a) {
  constexpr int64_t kLeast = 64;
  return n < kLeast || k < kLeast / 2 || (a.row == 1 && a.column != 1 && m < kLeast);
}

// Rows [row, row + rows) of a product C [m, n], and of the ``some`` strips from ``strip`` on, whose B is packed, those
// numbered begin to end.
struct Block {
  float *c;
  int64_t n, row, rows;
  const float *bias;
  int64_t strip, some, begin, end;

  // C = start + A B over steps [from, from + steps) of k, where ``start`` is C itself with ``add``, else the bias.
  void multiply(const Operand &a, int64_t from, int64_t steps, const float *panels, bool packs, bool add) const {
    float *packed = packs ? packed_a.room((rows + kRows - 1) / kRows * kRows * kDepth + W) : nullptr;
    for (int64_t step = 0; step < steps; step += kDepth, add = true) {
      const int64_t depth = std::min(kDepth, steps - step);
      if (packs) pack_a(a, row, rows, from + step, depth, packed);
      // Panels of kRows packed rows begin kRows * depth apart.
      const Operand x = packs ? Operand{packed, depth, kRows}
                              : Operand{a.data + row * a.row + (from + step) * a.column, a.row, a.column};
      for (int64_t s = begin; s < end; s++)
        strip_of(x, depth, panels + (step * some + s * depth) * kColumns, (strip + s) * kColumns, packs, add);
    }
  }

  void strip_of(const Operand &x, int64_t depth, const float *panel, int64_t column, bool packs, bool add) const {
    const int64_t columns = std::min<int64_t>(kColumns, n - column), share = kColumns * kRows / rows;
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t height = std::min<int64_t>(kRows, rows - i);
      const float *ahead = panel + depth * (kColumns + i / kRows * share);  // a share of the next panel of B
      float *to = c + (row + i) * n + column;
      const float *start = add ? to : bias ? bias + column : nullptr;
      const auto some_tiles = packs ? tiles<true> : tiles<false>;
      some_tiles(height, columns, depth, x.data + i * x.row, x.row, x.column, panel, start, add ? n : 0, to, n, ahead, share);
    }
  }
};

// Steps [from, from + depth) of k of the ``some`` strips of B from ``strip`` on as panels [depths of kDepth at most][some]
// [a depth's steps][kColumns].
void pack_depths(const Operand &b, int64_t n, int64_t strip, int64_t some, int64_t from, int64_t depth, float *to) {
  const int64_t depths = (depth + kDepth - 1) / kDepth;
  parallel(some * depths, 4, [&](int64_t first, int64_t last, int) {
    for (int64_t item = first; item < last; item++) {
      const int64_t at = item / some * kDepth, s = item % some, steps = std::min(kDepth, depth - at);
      const int64_t column = (strip + s) * kColumns;
      pack_b(b, column, std::min<int64_t>(kColumns, n - column), from + at, steps, to + (at * some + s * steps) * kColumns);
    }
  });
}

}  // namespace

// Loops: parts of B of at most ``kPacked``, blocks of rows (A block in L2), depths of k, strips of columns (B panel in L2),
// tiles of kRows rows (C in registers).
void float_product(int64_t m, int64_t n, int64_t k, const Operand &a, const Operand &b, const float *bias, float *c,
                   bool add, const LowRank &more) {
  const Operand low{more.low, more.rank, 1};
  const bool split = !narrow(m, n, k, a) && split_serves();
  if (split || (!add && a.column == 1 && b.row == 1 && thin_serves(m, k))) {
    if (split)
      split_product(m, n, k, a, {b.data, b.column, b.row}, bias, c, add);
    else
      thin_product(m, n, k, a.data, b.data, bias, c);
    if (more.rank) float_product(m, n, more.rank, low, more.w, nullptr, c, true);
    return;
  }
  const int64_t strips = (n + kColumns - 1) / kColumns, row_panels = (m + kRows - 1) / kRows;
  const int64_t wide = std::min(strips, std::max(kLeastStrips, kPacked / (kColumns * k)));
  const int64_t deep = std::min(k, std::max(kDepth, kPacked / (kColumns * wide) / kDepth * kDepth));
  float *panels = packed_b.room(wide * kColumns * (deep + more.rank)), *low_panels = panels + wide * kColumns * deep;
  for (int64_t strip = 0; strip < strips; strip += wide)
    for (int64_t from = 0; from < k; from += deep) {
      const int64_t some = std::min(wide, strips - strip), steps = std::min(deep, k - from);
      const int64_t rank = from + steps == k ? more.rank : 0;
      pack_depths(b, n, strip, some, from, steps, panels);
      pack_depths(more.w, n, strip, some, 0, rank, low_panels);
      // Threads divide the rows, or the columns where there are too few rows.
      const int64_t threads = threads_for(row_panels * some, 2);
      const bool by_rows = row_panels >= 2 * threads || row_panels >= some;
      parallel_guided(by_rows ? row_panels : some, 1, [&](int64_t first, int64_t last) {
        const int64_t row_first = by_rows ? first * kRows : 0, row_last = by_rows ? std::min(m, last * kRows) : m;
        const int64_t begin = by_rows ? 0 : first, end = by_rows ? some : last;
        const bool packs = (a.row == 1 && a.column != 1) || end - begin >= kWorthCopying;
        const int64_t all = (row_last - row_first + kRows - 1) / kRows, blocks = (all + kPanels - 1) / kPanels;
        const int64_t height = (all + blocks - 1) / blocks * kRows;  // of blocks of rows, as equal as possible
        for (int64_t row = row_first; row < row_last; row += height) {
          const Block block{c, n, row, std::min(height, row_last - row), bias, strip, some, begin, end};
          block.multiply(a, from, steps, panels, packs, from || add);
          block.multiply(low, 0, rank, low_panels, false, true);
        }
      });
    }
}

namespace {
Operand left(const View &a, bool turned) {
  return {a.as<float>(), turned ? 1 : a.shape[1], turned ? a.shape[1] : 1};
}
Operand right(const View &w, bool turned) {
  return {w.as<float>(), turned ? w.shape[1] : 1, turned ? 1 : w.shape[1]};
}
}  // namespace

// in: a [m, k] or, with scalar[0], [k, m]; w [n, k] or, with scalar[1], [k, n]; bias [n]; all float32; out: a w^T +
// bias [m, n]; scalars: turn a, turn w, has bias
KERNEL(matmul, 3, 1, 3) {
  const bool turn_a = scalar[0] != 0, turn_w = scalar[1] != 0;
  const int64_t m = in[0].shape[turn_a ? 1 : 0], k = in[0].shape[turn_a ? 0 : 1], n = in[1].shape[turn_w ? 1 : 0];
  const float *bias = scalar[2] ? in[2].as<float>() : nullptr;
  if (k == 0) {
    for (int64_t i = 0; i < m * n; i++) out[0].as<float>()[i] = bias ? bias[i % n] : 0.0f;
    return;
  }
  float_product(m, n, k, left(in[0], turn_a), right(in[1], turn_w), bias, out[0].as<float>(), false);
}

// in: c [m, n], a [m, k], w [k, n], all float32; adds a w to c, which is written over
KERNEL(matmul_add, 3, 0, 0) {
  const int64_t m = in[1].shape[0], k = in[1].shape[1], n = in[2].shape[1];
  if (k) float_product(m, n, k, left(in[1], false), right(in[2], true), nullptr, in[0].as<float>(), true);
}
