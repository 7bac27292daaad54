// RMS norm and layer norm, forward and backward, optionally of a residual sum and with a growth mask. One pass over
// memory: a row stays in L1 between its statistics and its output. N rows, E channels.
#include <tuple>

#include "kernel.h"
#include "types.h"

#define INLINED __attribute__((always_inline))

namespace {

// weight (or mask) [E] as float32, followed by W zeros: a vector may begin at any element.
Floats floats(const View &view) {
  const int64_t n = view.size();
  Floats out(n + W, 0.0f);
  with_type(view.dtype, [&](auto *tag) {
    const auto *p = view.as<std::remove_pointer_t<decltype(tag)>>();
    for (int64_t i = 0; i < n; i++) out[i] = scalar_load(p + i);
  });
  return out;
}

// The growth mask (kernels.reference.rms_norm): empty without one; total: its sum, or the number of channels.
struct Growth {
  Floats mask;
  float total;
  explicit Growth(const View *view, int64_t columns) : total(static_cast<float>(columns)) {
    if (!view) return;
    mask = floats(*view);
    double sum = 0;
    for (float c : mask) sum += c;
    total = static_cast<float>(sum);
  }
};

// body(std::bool_constant of whether there is a mask): the usual case is compiled without it.
template <typename Body>
void with_mask(const Growth &growth, const Body &body) {
  if (growth.mask.empty()) return body(std::false_type());
  body(std::true_type());
}

// body(i, n) over one row: vectors of n = W elements and the rest. ``head``: offset of the output's aligned vectors;
// sums use 0, so that their order does not depend on the address of the row.
template <typename Body>
__attribute__((always_inline)) inline void along(int64_t columns, const Body &body, int64_t head = 0) {
  by_vectors(0, columns, head, body);
}

// Sums over rows [E]: one buffer per piece, added in the order of the pieces.
class ColumnSums {
 public:
  ColumnSums(int64_t columns, int pieces)
      : stride_((columns + kLine - 1) / kLine * kLine), sums_(stride_ * pieces, 0.0f), pieces_(pieces) {}
  float *of(int piece) { return &sums_[stride_ * piece]; }
  void write(float *out, int64_t columns) const {
    along(columns, [&](int64_t i, int n) {
      vf sum = splat(0.0f);
      for (int t = 0; t < pieces_; t++) sum += load(&sums_[stride_ * t + i]);
      put(out + i, sum, n);
    });
  }

 private:
  static constexpr int64_t kLine = 16;  // floats
  int64_t stride_;
  Floats sums_;
  int pieces_;
};

// body(row, count) over rows [first, last): four rows at a time share the loads and stores of the sums over rows.
template <typename Body>
void by_rows(int64_t first, int64_t last, const Body &body) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) body(row, std::integral_constant<int, 4>());
  for (; row < last; row++) body(row, std::integral_constant<int, 1>());
}

constexpr int64_t kGrain = 8192;  // elements that justify another thread
int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

// out = x * weight * mask / sqrt(mean(x^2) + eps); with a residual, of the stream x + residual.
template <typename X, typename R, typename O>
void rms_forward(const View &x, const View *residual, const View &weight, const View *mask, double eps, const View &out,
                 const View *stream, const View &rstd) {
  const int64_t columns = x.columns();
  const Floats gain = floats(weight);
  const Growth growth(mask, columns);
  const bool far = streams(out), masked = !growth.mask.empty();
  parallel(x.rows(), row_grain(columns), [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; row++) {
      const X *px = x.as<X>() + row * columns;
      O *po = out.as<O>() + row * columns;
      R *ps = stream ? stream->as<R>() + row * columns : nullptr;
      const R *pr = residual ? residual->as<R>() + row * columns : nullptr;
      // The stream rounded to its dtype: the norm is of the values that the next layer reads.
      const auto value = [&](int64_t i, int n) {
        const vf v = get(px + i, n);
        return ps ? rounded<R>(v + get(pr + i, n)) : v;
      };
      vf squares = splat(0.0f), more = splat(0.0f);
      along(columns, [&](int64_t i, int n) INLINED {
        vf v = value(i, n);
        v = v * v;
        if (masked) v = v * load(&growth.mask[i]);
        const vf sum = squares + v;  // two alternating sums: shorter dependency chains, half the rounding error
        squares = more, more = sum;
        if (pr) ahead(px + columns + i, far);
      });
      const float r = 1.0f / std::sqrt(sum_lanes(squares + more) / growth.total + static_cast<float>(eps));
      rstd.as<float>()[row] = r;
      along(columns, [&](int64_t i, int n) INLINED {
        vf v = value(i, n);
        if (ps) put(ps + i, v, n, far);
        v = rounded<O>(v * r) * load(&gain[i]);  // the released models' order: rounded before the gain
        if (masked) v = v * load(&growth.mask[i]);
        put(po + i, v, n, far);
        if (pr) ahead(pr + columns + i, far);
        else ahead(px + columns + i, far);
      }, to_line(po));
    }
    fence(far);
  });
}

// dx = r g - x r^3 c sum(g x) (+ grad_stream), dweight = sum over rows of grad mask x r, with g = grad weight mask and
// c = mask / sum(mask). First pass: the sums over the row; second pass: dx.
template <typename G, typename X>
void rms_backward(const View &grad, const View *grad_stream, const View &x, const View &weight, const View *mask,
                  const View &rstd, const View &dx, const View &dweight) {
  const int64_t columns = x.columns(), rows = x.rows();
  const Floats gain = floats(weight);
  const Growth growth(mask, columns);
  const int pieces = pieces_for(rows, row_grain(columns));
  ColumnSums sums(columns, pieces);
  const bool far = streams(dx);
  with_mask(growth, [&](auto masked) {
    parallel(rows, row_grain(columns), [&](int64_t first, int64_t last, int piece) {
      float *dw = sums.of(piece);
      by_rows(first, last, [&](int64_t row, auto together) {
        constexpr int K = together;
        const G *pg = grad.as<G>() + row * columns;
        const X *px = x.as<X>() + row * columns;
        vf along_x[K] = {}, r[K];
        for (int k = 0; k < K; k++) r[k] = splat(rstd.as<float>()[row + k]);
        along(columns, [&](int64_t i, int n) INLINED {
          vf weight_i = load(&gain[i]), sum = splat(0.0f);
          if constexpr (masked) weight_i = weight_i * load(&growth.mask[i]);
#pragma GCC unroll 4
          for (int k = 0; k < K; k++) {
            const vf product = get(pg + k * columns + i, n) * get(px + k * columns + i, n);
            sum += product * r[k], along_x[k] += product * weight_i;
            ahead(px + (K + k) * columns + i, far);
          }
          if constexpr (masked) sum = sum * load(&growth.mask[i]);
          store(dw + i, load(dw + i) + sum);
        });
        for (int k = 0; k < K; k++) {
          const float rk = r[k][0], pull = sum_lanes(along_x[k]) * rk * rk * rk / growth.total;
          const X *ps = grad_stream ? grad_stream->as<X>() + (row + k) * columns : nullptr;
          X *po = dx.as<X>() + (row + k) * columns;
          const G *pgk = pg + k * columns;
          const X *pxk = px + k * columns;
          along(columns, [&](int64_t i, int n) INLINED {
            vf d = get(pgk + i, n) * load(&gain[i]) * rk - get(pxk + i, n) * pull;
            if constexpr (masked) d = d * load(&growth.mask[i]);
            if (ps) d += get(ps + i, n);
            put(po + i, d, n, far);
            ahead(pgk + K * columns + i, far);
            if (ps) ahead(ps + columns + i, far);
          }, to_line(po));
        }
      });
      fence(far);
    });
  });
  sums.write(dweight.as<float>(), columns);
}

}  // namespace

// in: x, weight, mask; out: normed, rstd; scalars: eps, has mask
KERNEL(rms_norm, 3, 2, 2) {
  const View *mask = scalar[1] ? &in[2] : nullptr;
  with_types(in[0].dtype, out[0].dtype, [&](auto *x, auto *o) {
    using X = std::remove_pointer_t<decltype(x)>;
    using O = std::remove_pointer_t<decltype(o)>;
    rms_forward<X, X, O>(in[0], nullptr, in[1], mask, scalar[0], out[0], nullptr, out[1]);
  });
}

// in: x, residual, weight, mask; out: normed, stream, rstd; scalars: eps, has mask
KERNEL(add_rms_norm, 4, 3, 2) {
  const View *mask = scalar[1] ? &in[3] : nullptr;
  with_types(in[0].dtype, in[1].dtype, [&](auto *x, auto *r) {
    using X = std::remove_pointer_t<decltype(x)>;
    using R = std::remove_pointer_t<decltype(r)>;
    with_type(out[0].dtype, [&](auto *o) {
      using O = std::remove_pointer_t<decltype(o)>;
      rms_forward<X, R, O>(in[0], &in[1], in[2], mask, scalar[0], out[0], &out[1], out[2]);
    });
  });
}

// in: grad, x, weight, rstd, grad_stream, mask; out: dx, dweight; scalars: has grad_stream, has mask
KERNEL(rms_norm_backward, 6, 2, 2) {
  const View *stream = scalar[0] ? &in[4] : nullptr, *mask = scalar[1] ? &in[5] : nullptr;
  with_types(in[0].dtype, in[1].dtype, [&](auto *g, auto *x) {
    using G = std::remove_pointer_t<decltype(g)>;
    using X = std::remove_pointer_t<decltype(x)>;
    rms_backward<G, X>(in[0], stream, in[1], in[2], mask, in[3], out[0], out[1]);
  });
}

// in: x, weight, bias, mask; out: normed, mean, rstd; scalars: eps, has mask
KERNEL(layer_norm, 4, 3, 2) {
  const int64_t columns = in[0].columns();
  const Floats gain = floats(in[1]), offset = floats(in[2]);
  const Growth growth(scalar[1] ? &in[3] : nullptr, columns);
  const float eps = static_cast<float>(scalar[0]);
  with_types(in[0].dtype, out[0].dtype, [&](auto *tx, auto *to) {
    using X = std::remove_pointer_t<decltype(tx)>;
    using O = std::remove_pointer_t<decltype(to)>;
    const bool far = streams(out[0]);
    with_mask(growth, [&](auto masked) {
      parallel(in[0].rows(), row_grain(columns), [&](int64_t first, int64_t last, int) {
        for (int64_t row = first; row < last; row++) {
          const X *px = in[0].as<X>() + row * columns;
          O *po = out[0].as<O>() + row * columns;
          // (mean of x - level, mean of (x - level)^2).
          const auto above = [&](float level) {
            vf sum = splat(0.0f), squares = sum, more = sum, others = sum;  // two alternating sums each
            along(columns, [&](int64_t i, int n) INLINED {
              vf v = get(px + i, n) - level, weighed = v;
              if (n < W) v = weighed = clear_after(v, n);
              if constexpr (masked) weighed = v * load(&growth.mask[i]);
              const vf next = sum + weighed, next_squares = squares + weighed * v;
              sum = more, more = next, squares = others, others = next_squares;
            });
            return std::pair(sum_lanes(sum + more) / growth.total, sum_lanes(squares + others) / growth.total);
          };
          // var = mean((x - level)^2) - (mean - level)^2 in one pass. It is accurate for a level near the mean; the
          // level is the mean of the first W elements. Where (mean - level)^2 exceeds the variance, cancellation would
          // lose precision, and a second pass uses the mean as the level.
          float mean = sum_lanes(get(px, W <= columns ? W : 1)) / (W <= columns ? W : 1);
          auto [shift, squares] = above(mean);
          mean += shift;
          if (!(shift * shift <= squares - shift * shift)) std::tie(shift, squares) = above(mean), mean += shift;
          const float variance = std::max(squares - shift * shift, 0.0f);
          const float r = 1.0f / std::sqrt(variance + eps);
          out[1].as<float>()[row] = mean, out[2].as<float>()[row] = r;
          along(columns, [&](int64_t i, int n) INLINED {
            // One rounding at the end, as in torch.nn.LayerNorm; the RMS norm rounds before its weight.
            vf v = (get(px + i, n) - mean) * r * load(&gain[i]) + load(&offset[i]);
            if constexpr (masked) v = v * load(&growth.mask[i]);
            put(po + i, v, n, far);
            ahead(px + columns + i, far);
          }, to_line(po));
        }
        fence(far);
      });
    });
  });
}

// in: grad, x, weight, mean, rstd, mask; out: dx, dweight, dbias; scalars: has mask.
// dx = r (g - c sum(g) - n c sum(g n)) with n = (x - mean) r: level = c r sum(g), tilt = c r^3 sum(g (x - mean)).
KERNEL(layer_norm_backward, 6, 3, 1) {
  const int64_t columns = in[1].columns(), rows = in[1].rows();
  const Floats gain = floats(in[2]);
  const Growth growth(scalar[0] ? &in[5] : nullptr, columns);
  const int pieces = pieces_for(rows, row_grain(columns));
  ColumnSums dweight(columns, pieces), dbias(columns, pieces);
  with_types(in[0].dtype, in[1].dtype, [&](auto *tg, auto *tx) {
    using G = std::remove_pointer_t<decltype(tg)>;
    using X = std::remove_pointer_t<decltype(tx)>;
    const bool far = streams(out[0]);
    with_mask(growth, [&](auto masked) {
      parallel(rows, row_grain(columns), [&](int64_t first, int64_t last, int piece) {
        float *dw = dweight.of(piece), *db = dbias.of(piece);
        by_rows(first, last, [&](int64_t row, auto together) {
          constexpr int K = together;
          const G *pg = in[0].as<G>() + row * columns;
          const X *px = in[1].as<X>() + row * columns;
          vf plain[K] = {}, tilted[K] = {}, mean[K], r[K];
          for (int k = 0; k < K; k++) mean[k] = splat(in[3].as<float>()[row + k]), r[k] = splat(in[4].as<float>()[row + k]);
          along(columns, [&](int64_t i, int n) INLINED {
            const vf weight_i = load(&gain[i]);
            vf sum = load(dw + i), sum_bias = load(db + i);
#pragma GCC unroll 4
            for (int k = 0; k < K; k++) {
              vf g = get(pg + k * columns + i, n);
              if constexpr (masked) g = g * load(&growth.mask[i]);
              const vf product = g * (get(px + k * columns + i, n) - mean[k]);
              sum += product * r[k], sum_bias += g;
              plain[k] += g * weight_i, tilted[k] += product * weight_i;
              ahead(px + (K + k) * columns + i, far);
            }
            store(dw + i, sum), store(db + i, sum_bias);
          });
          for (int k = 0; k < K; k++) {
            const float mk = mean[k][0], rk = r[k][0], level = sum_lanes(plain[k]) / growth.total * rk;
            const float tilt = sum_lanes(tilted[k]) / growth.total * rk * rk * rk;
            X *po = out[0].as<X>() + (row + k) * columns;
            const G *pgk = pg + k * columns;
            const X *pxk = px + k * columns;
            along(columns, [&](int64_t i, int n) INLINED {
              vf d = get(pgk + i, n) * load(&gain[i]) * rk - (level + (get(pxk + i, n) - mk) * tilt);
              if constexpr (masked) d = d * load(&growth.mask[i]);
              put(po + i, d, n, far);
              ahead(pgk + K * columns + i, far);
            }, to_line(po));
          }
        });
        fence(far);
      });
    });
  });
  dweight.write(out[1].as<float>(), columns);
  dbias.write(out[2].as<float>(), columns);
}
