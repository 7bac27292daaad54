// Linear layers with low-rank adapters: x W^T + s (x A^T) B^T and its gradients, W [out, in] frozen, A [r, in], B [out, r],
// r small.
//
// What is r wide is computed in registers. Its products with B and A are r further steps of those with W, so that results
// pass once. Sums of a row are taken in an order of their own (``dots``, ``float_product``), so that a row's bits depend
// neither on threads nor on other rows; sums over rows are taken by parts that follow from the shapes, added in their order.
#include "matmul.h"
#include "vec.h"

namespace {

constexpr int kRows = 4, kRanks = 4;  // of a tile of ``dots``: 16 sums in registers
constexpr int64_t kBlock = 32;        // rows of one sum in registers, while they are in L2
constexpr int64_t kPartRows = 128, kMostParts = 16, kPartFloats = 1 << 22;  // of sums over rows

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

// to [r, n] += low [rows, r]^T x [rows, n], rows at most kBlock.
void narrow_sums(int64_t rows, int64_t r, int64_t n, const float *low, const float *x, float *to) {
  for (int64_t c = 0; c < n; c += 2 * W)
    if (n - c > W)
      narrow_columns<2>(rows, r, n, low, x + c, static_cast<int>(std::min<int64_t>(W, n - c - W)), to + c);
    else
      narrow_columns<1>(rows, r, n, low, x + c, static_cast<int>(n - c), to + c);
}

void turn(int64_t rows, int64_t columns, const float *from, float *to) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
}

constexpr int64_t kGrain = 32;  // rows of a piece

// An adapter's part of a backward pass: x [m, k] and dy [m, n] as it read and got them, low [m, r] = s x A^T.
struct Gradients {
  int64_t m, k, n, r;
  const float *dy, *x, *low, *b;  // b [r, n]: B turned
  float factor, *dlow;            // dlow [m, r] = s dy B

  // sums [r, k] = dlow^T x and, behind it, [r, n] = low^T dy over rows [first, last), which are read once.
  void part(int64_t first, int64_t last, float *sums) const {
    std::fill(sums, sums + r * (k + n), 0.0f);
    for (int64_t row = first; row < last; row += kBlock) {
      const int64_t rows = std::min(kBlock, last - row);
      dots(rows, r, n, dy + row * n, b, factor, dlow + row * r);
      narrow_sums(rows, r, n, low + row * r, dy + row * n, sums + r * k);
      narrow_sums(rows, r, k, dlow + row * r, x + row * k, sums);
    }
  }

  // Number of parts that the rows are cut into, a function of the shapes alone.
  int64_t parts() const {
    const int64_t most = std::min(kMostParts, kPartFloats / (r * (k + n)));
    return std::max<int64_t>(1, std::min(most, m / kPartRows));
  }
};

}  // namespace

// in: x [m, k]; read [m, k], what the adapter reads; w [n, k]; bias [n]; A [r, k]; B [n, r]; all float32; out: x w^T + bias
// + s read A^T B^T [m, n], s read A^T [m, r]; scalars: s, has bias
KERNEL(adapted, 6, 2, 2) {
  const int64_t m = in[0].shape[0], k = in[0].shape[1], n = in[2].shape[0], r = in[4].shape[0];
  const float *read = in[1].as<float>(), *a = in[4].as<float>(), factor = static_cast<float>(scalar[0]);
  float *low = out[1].as<float>();
  parallel(m, kGrain, [&](int64_t first, int64_t last, int) {
    dots(last - first, r, k, read + first * k, a, factor, low + first * r);
  });
  const float *bias = scalar[1] ? in[3].as<float>() : nullptr;
  float_product(m, n, k, {in[0].as<float>(), k, 1}, {in[2].as<float>(), 1, k}, bias, out[0].as<float>(), false,
                {low, {in[5].as<float>(), 1, r}, r});
}

// in: dx [m, k], written (scalar[1] 1) or added to (2) with dy w, or left alone (0); dread [m, k] likewise (scalar[2]) with
// s dy B A, or 3: that belongs to dx; dy [m, n]; read [m, k]; low [m, r] = s read A^T; w [n, k]; A [r, k]; B [n, r]; all
// float32; out: dA [r, k] = (s dy B)^T read, dB [n, r] = dy^T low; scalars: s, what to do with dx, with dread
KERNEL(adapted_backward, 8, 2, 3) {
  const int64_t m = in[3].shape[0], k = in[3].shape[1], r = in[6].shape[0], n = in[7].shape[0];
  float *dx = in[0].as<float>(), *dread = in[1].as<float>(), *b = turned_b.room(r * n);
  const float *dy = in[2].as<float>(), *a = in[6].as<float>();
  const int into_x = static_cast<int>(scalar[1]), into_read = static_cast<int>(scalar[2]);
  Gradients g{m, k, n, r, dy, in[3].as<float>(), in[4].as<float>(), b, static_cast<float>(scalar[0]), nullptr};
  const int64_t parts = g.parts(), size = r * (k + n);
  g.dlow = summed.room(m * r + parts * size);
  float *sums = g.dlow + m * r;
  turn(n, r, in[7].as<float>(), b);
  parallel_items(parts, [&](int64_t i, int) { g.part(m * i / parts, m * (i + 1) / parts, sums + i * size); });
  parallel(size, 4096, [&](int64_t first, int64_t last, int) {
    for (int64_t i = 1; i < parts; i++)
      for (int64_t j = first; j < last; j++) sums[j] += sums[i * size + j];
  });
  std::copy(sums, sums + r * k, out[0].as<float>());
  turn(r, n, sums + r * k, out[1].as<float>());
  if (into_x) {
    const LowRank more{g.dlow, {a, k, 1}, into_read == 3 ? r : 0};
    float_product(m, k, n, {dy, n, 1}, {in[5].as<float>(), k, 1}, nullptr, dx, into_x == 2, more);
  }
  if (into_read == 1 || into_read == 2)
    parallel(m, kGrain, [&](int64_t first, int64_t last, int) {
      spread(last - first, r, k, g.dlow + first * r, a, dread + first * k, into_read == 2);
    });
}
