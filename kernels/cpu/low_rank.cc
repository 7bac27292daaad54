// Low-rank adapters beside a frozen matrix: out += s (x A^T) B^T and its gradients, A [r, in], B [out, r], r small.
//
// A packed product pads r to a strip of columns and reads x once for each of its passes. Here what is r wide stays in
// registers or L1, and x and dy pass once forward and twice backward. Sums of a row are taken in an order of their own
// (``dots``, ``spread``), so that a row's bits depend neither on threads nor on other rows; sums over rows are taken by
// blocks of kBlock in the order of the rows (``narrow_sums``).
#include "matmul.h"
#include "vec.h"

namespace {

constexpr int kRows = 4, kRanks = 4;  // of a tile of ``dots``: 16 sums in registers
constexpr int64_t kBlock = 32;       // rows of one sum in registers: 256 KiB of 512 columns, in L2

thread_local FloatBuffer turned_b, summed;

// to[i * ldt + j] = sum over n of x[i * ldx + .] w[j * n + .]
template <int ROWS, int RANKS>
inline void dot_tile(int64_t n, const float *x, int64_t ldx, const float *w, float factor, float *to, int64_t ldt) {
  vf sum[ROWS][RANKS] = {};
  for (int64_t c = 0; c < n; c += W) {
    const int some = static_cast<int>(std::min<int64_t>(W, n - c));
    vf row[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) row[i] = some == W ? load(x + i * ldx + c) : load_part(x + i * ldx + c, some);
#pragma GCC unroll 4
    for (int j = 0; j < RANKS; j++) {
      const vf factors = some == W ? load(w + j * n + c) : load_part(w + j * n + c, some);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) sum[i][j] += row[i] * factors;
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < RANKS; j++) to[i * ldt + j] = factor * sum_lanes(sum[i][j]);
}

// to [m, r] = factor x [m, n] w [r, n]^T
void dots(int64_t m, int64_t r, int64_t n, const float *x, const float *w, float factor, float *to) {
  for (int64_t i = 0; i < m; i += kRows)
    for (int64_t j = 0; j < r; j += kRanks) {
      const float *row = x + i * n, *factors = w + j * n;
      float *at = to + i * r + j;
      if (i + kRows <= m && j + kRanks <= r) {
        dot_tile<kRows, kRanks>(n, row, n, factors, factor, at, r);
        continue;
      }
      for (int64_t a = 0; a < std::min<int64_t>(kRows, m - i); a++)
        for (int64_t b = 0; b < std::min<int64_t>(kRanks, r - j); b++)
          dot_tile<1, 1>(n, row + a * n, n, factors + b * n, factor, at + a * r + b, r);
    }
}

template <int ROWS>
inline void spread_tile(int64_t r, int64_t n, const float *low, const float *w, float *to, bool add) {
  int64_t c = 0;
  for (; c + 2 * W <= n; c += 2 * W) {
    vf sum[ROWS][2] = {};
    if (add)
      for (int i = 0; i < ROWS; i++) sum[i][0] = load(to + i * n + c), sum[i][1] = load(to + i * n + c + W);
    for (int64_t j = 0; j < r; j++) {
      const vf first = load(w + j * n + c), second = load(w + j * n + c + W);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) {
        const vf factor = splat(low[i * r + j]);
        sum[i][0] += factor * first, sum[i][1] += factor * second;
      }
    }
    for (int i = 0; i < ROWS; i++) store(to + i * n + c, sum[i][0]), store(to + i * n + c + W, sum[i][1]);
  }
  for (; c < n; c += W) {
    const int some = static_cast<int>(std::min<int64_t>(W, n - c));
    for (int i = 0; i < ROWS; i++) {
      vf sum = add ? load_part(to + i * n + c, some) : splat(0.0f);
      for (int64_t j = 0; j < r; j++) sum += splat(low[i * r + j]) * load_part(w + j * n + c, some);
      store_part(to + i * n + c, sum, some);
    }
  }
}

// to [m, n] = low [m, r] w [r, n], or with ``add`` that added to it
void spread(int64_t m, int64_t r, int64_t n, const float *low, const float *w, float *to, bool add) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) spread_tile<kRows>(r, n, low + i * r, w, to + i * n, add);
  for (; i < m; i++) spread_tile<1>(r, n, low + i * r, w, to + i * n, add);
}

// to[j * n + c] += sum over ``rows`` of low[. * r + j] x[. * n + c], for VECTORS vectors of columns from c, the last
// of them with ``some`` elements.
template <int RANKS, int VECTORS>
inline void narrow_tile(int64_t rows, int64_t r, int64_t n, const float *low, const float *x, int some, float *to) {
  vf sum[RANKS][VECTORS] = {};
  for (int64_t i = 0; i < rows; i++) {
    vf row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      const float *from = x + i * n + v * W;
      row[v] = v + 1 < VECTORS || some == W ? load(from) : load_part(from, some);
    }
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; j++) {
      const vf factor = splat(low[i * r + j]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) sum[j][v] += factor * row[v];
    }
  }
  for (int j = 0; j < RANKS; j++)
    for (int v = 0; v < VECTORS; v++) {
      float *at = to + j * n + v * W;
      const int wide = v + 1 < VECTORS ? W : some;
      store_part(at, load_part(at, wide) + sum[j][v], wide);
    }
}

template <int VECTORS>
inline void narrow_columns(int64_t rows, int64_t r, int64_t n, const float *low, const float *x, int some, float *to) {
  int64_t j = 0;
  for (; j + 8 <= r; j += 8) narrow_tile<8, VECTORS>(rows, r, n, low + j, x, some, to + j * n);
  for (; j + 2 <= r; j += 2) narrow_tile<2, VECTORS>(rows, r, n, low + j, x, some, to + j * n);
  for (; j < r; j++) narrow_tile<1, VECTORS>(rows, r, n, low + j, x, some, to + j * n);
}

// to [r, n] = low [m, r]^T x [m, n]. Threads divide the columns: the order of a sum is that of the rows.
void narrow_sums(int64_t m, int64_t r, int64_t n, const float *low, const float *x, float *to) {
  std::fill(to, to + r * n, 0.0f);
  const int64_t vectors = (n + W - 1) / W;
  parallel((vectors + 1) / 2, 4, [&](int64_t first, int64_t last, int) {
    for (int64_t row = 0; row < m; row += kBlock)
      for (int64_t pair = first; pair < last; pair++) {
        const int64_t rows = std::min(kBlock, m - row), c = 2 * W * pair, left = n - c;
        const float *l = low + row * r, *at = x + row * n + c;
        if (left > W)
          narrow_columns<2>(rows, r, n, l, at, static_cast<int>(std::min<int64_t>(W, left - W)), to + c);
        else
          narrow_columns<1>(rows, r, n, l, at, static_cast<int>(left), to + c);
      }
  });
}

void turn(int64_t rows, int64_t columns, const float *from, float *to) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
}

constexpr int64_t kGrain = 32;  // rows of a piece

}  // namespace

// in: y [m, n], which s x A^T B^T is added to; x [m, k]; A [r, k]; B [n, r]; all float32; out: s x A^T [m, r]; scalar: s
KERNEL(low_rank, 4, 1, 1) {
  const int64_t m = in[1].shape[0], k = in[1].shape[1], r = in[2].shape[0], n = in[3].shape[0];
  float *b = turned_b.room(r * n), *low = out[0].as<float>(), *y = in[0].as<float>();
  const float *x = in[1].as<float>(), *a = in[2].as<float>(), factor = static_cast<float>(scalar[0]);
  turn(n, r, in[3].as<float>(), b);
  parallel(m, kGrain, [&](int64_t first, int64_t last, int) {
    dots(last - first, r, k, x + first * k, a, factor, low + first * r);
    spread(last - first, r, n, low + first * r, b, y + first * n, true);
  });
}

// in: dx [m, k], written (scalar[1] 1) or added to (2) with s dy B A, or left alone (0); dy [m, n]; x [m, k];
// low [m, r] = s x A^T; A [r, k]; B [n, r]; all float32; out: dA [r, k] = (s dy B)^T x, dB [n, r] = dy^T low; scalars: s,
// what to do with dx
KERNEL(low_rank_backward, 6, 2, 2) {
  const int64_t m = in[2].shape[0], k = in[2].shape[1], r = in[4].shape[0], n = in[5].shape[0];
  const float *dy = in[1].as<float>(), *x = in[2].as<float>(), *low = in[3].as<float>(), *a = in[4].as<float>();
  float *dx = in[0].as<float>(), *b = turned_b.room(r * n), *room = summed.room(m * r + r * n), *dlow = room + r * n;
  const float factor = static_cast<float>(scalar[0]);
  const int what = static_cast<int>(scalar[1]);
  turn(n, r, in[5].as<float>(), b);
  parallel(m, kGrain, [&](int64_t first, int64_t last, int) {
    dots(last - first, r, n, dy + first * n, b, factor, dlow + first * r);
    if (what) spread(last - first, r, k, dlow + first * r, a, dx + first * k, what == 2);
  });
  narrow_sums(m, r, k, dlow, x, out[0].as<float>());
  narrow_sums(m, r, n, low, dy, room);
  turn(r, n, room, out[1].as<float>());
}
