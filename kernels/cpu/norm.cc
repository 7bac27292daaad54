// rms_norm and layer_norm, forward and backward, alone or behind the residual sum, with the statistics of channels that
// are still growing. One pass over memory: a row stays in the nearest cache between its statistics and its output.
#include "kernel.h"
#include "types.h"

namespace {

// weight (or mask) [E] as floats, padded to whole vectors with zeros.
std::vector<float> floats(const View &view) {
  const int64_t n = view.size();
  std::vector<float> out((n + W - 1) / W * W, 0.0f);
  with_type(view.dtype, [&](auto *tag) {
    const auto *p = view.as<std::remove_pointer_t<decltype(tag)>>();
    for (int64_t i = 0; i < n; i++) out[i] = scalar_load(p + i);
  });
  return out;
}

struct Growth {
  std::vector<float> mask;  // empty: every channel is there
  float total;              // sum of the mask, or the number of channels
  explicit Growth(const View *view, int64_t columns) : total(static_cast<float>(columns)) {
    if (!view) return;
    mask = floats(*view);
    double sum = 0;
    for (float c : mask) sum += c;
    total = static_cast<float>(sum);
  }
  vf at(int64_t i) const { return mask.empty() ? splat(1.0f) : load(&mask[i]); }
};

// One row through ``body(i, n)``: vectors of n = W elements and, at the end, the rest.
template <typename Body>
__attribute__((always_inline)) inline void along(int64_t columns, const Body &body) {
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + W <= columns; i += W) body(i, W);
  if (i < columns) body(i, static_cast<int>(columns - i));
}

// Sums over rows, a buffer a piece, added up in the order of the pieces.
class ColumnSums {
 public:
  ColumnSums(int64_t columns, int pieces)
      : stride_((columns + W - 1) / W * W), sums_(stride_ * pieces, 0.0f), pieces_(pieces) {}
  float *of(int piece) { return &sums_[stride_ * piece]; }
  void write(float *out, int64_t columns) const {
    for (int64_t i = 0; i < columns; i++) {
      float sum = 0;
      for (int t = 0; t < pieces_; t++) sum += sums_[stride_ * t + i];
      out[i] = sum;
    }
  }

 private:
  int64_t stride_;
  std::vector<float> sums_;
  int pieces_;
};

constexpr int64_t kTogether = 4;  // rows of a backward that share the loads and stores of the sums over rows
constexpr int64_t kGrain = 8192;  // elements below which another thread costs more than it brings
int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

template <typename X, typename R, typename O>
void rms_forward(const View &x, const View *residual, const View &weight, const View *mask, double eps, const View &out,
                 const View *stream, const View &rstd) {
  const int64_t columns = x.columns();
  const std::vector<float> gain = floats(weight);
  const Growth growth(mask, columns);
  const bool far = streams(out), masked = !growth.mask.empty();
  parallel(x.rows(), row_grain(columns), [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; row++) {
      const X *px = x.as<X>() + row * columns;
      O *po = out.as<O>() + row * columns;
      R *ps = stream ? stream->as<R>() + row * columns : nullptr;
      const R *pr = residual ? residual->as<R>() + row * columns : nullptr;
      vf squares = splat(0.0f), more = splat(0.0f);
      along(columns, [&](int64_t i, int n) {
        vf v = get(px + i, n);
        if (ps) {
          put(ps + i, v + get(pr + i, n), n);
          v = get(ps + i, n);  // as rounded: the norm is of what the next layer sees
        }
        v = v * v;
        if (masked) v = v * load(&growth.mask[i]);
        const vf sum = squares + v;  // compensated in pairs of lanes would be exact; two sums halve the error
        squares = more, more = sum;
      });
      const float r = 1.0f / std::sqrt(sum_lanes(squares + more) / growth.total + static_cast<float>(eps));
      rstd.as<float>()[row] = r;
      along(columns, [&](int64_t i, int n) {
        vf v = (ps ? get(ps + i, n) : get(px + i, n)) * r;
        v = rounded<O>(v) * load(&gain[i]);  // the released order: the norm is rounded before the gain
        if (masked) v = v * load(&growth.mask[i]);
        put(po + i, v, n, far);
        ahead(px + columns + i, far);
        if (pr) ahead(pr + columns + i, far);
      });
    }
    fence(far);
  });
}

template <typename G, typename X>
void rms_backward(const View &grad, const View *grad_stream, const View &x, const View &weight, const View *mask,
                  const View &rstd, const View &dx, const View &dweight) {
  const int64_t columns = x.columns(), rows = x.rows();
  const std::vector<float> gain = floats(weight);
  const Growth growth(mask, columns);
  const int pieces = pieces_for(rows, row_grain(columns));
  ColumnSums sums(columns, pieces);
  const bool far = streams(dx);
  parallel(rows, row_grain(columns), [&](int64_t first, int64_t last, int piece) {
    float *dw = sums.of(piece);
    for (int64_t row = first; row < last; row += kTogether) {
      const int64_t some = std::min(kTogether, last - row);
      const G *pg = grad.as<G>() + row * columns;
      const X *px = x.as<X>() + row * columns;
      const float *r = rstd.as<float>() + row;
      vf along_x[kTogether] = {};
      along(columns, [&](int64_t i, int n) {
        const vf weight_i = load(&gain[i]), mask_i = growth.at(i);
        vf sum = load(dw + i);
        for (int64_t k = 0; k < some; k++) {
          const vf g = get(pg + k * columns + i, n) * mask_i, v = get(px + k * columns + i, n);
          along_x[k] += g * weight_i * v;
          sum += g * (v * r[k]);
        }
        store(dw + i, sum);
      });
      for (int64_t k = 0; k < some; k++) {
        const float pull = sum_lanes(along_x[k]) * r[k] * r[k] * r[k] / growth.total;
        const X *ps = grad_stream ? grad_stream->as<X>() + (row + k) * columns : nullptr;
        along(columns, [&](int64_t i, int n) {
          const vf mask_i = growth.at(i);
          vf d = get(pg + k * columns + i, n) * load(&gain[i]) * mask_i * r[k];
          d -= get(px + k * columns + i, n) * (mask_i * pull);
          if (ps) d += get(ps + i, n);
          put(dx.as<X>() + (row + k) * columns + i, d, n, far);
          ahead(pg + (k + kTogether) * columns + i, far);
          ahead(px + (k + kTogether) * columns + i, far);
        });
      }
    }
    fence(far);
  });
  sums.write(dweight.as<float>(), columns);
}

}  // namespace

// in: x, weight, mask (as often as scalar[1] says); out: normed, rstd; scalars: eps, has mask
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
  const std::vector<float> gain = floats(in[1]), offset = floats(in[2]);
  const Growth growth(scalar[1] ? &in[3] : nullptr, columns);
  const float eps = static_cast<float>(scalar[0]);
  with_types(in[0].dtype, out[0].dtype, [&](auto *tx, auto *to) {
    using X = std::remove_pointer_t<decltype(tx)>;
    using O = std::remove_pointer_t<decltype(to)>;
    const bool far = streams(out[0]), masked = !growth.mask.empty();
    parallel(in[0].rows(), row_grain(columns), [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; row++) {
        const X *px = in[0].as<X>() + row * columns;
        vf sum = splat(0.0f), more = splat(0.0f);  // in turns: no addition waits for the one before
        along(columns, [&](int64_t i, int n) {
          vf v = get(px + i, n);
          if (masked) v = v * load(&growth.mask[i]);
          const vf next = sum + v;
          sum = more, more = next;
        });
        const float mean = sum_lanes(sum + more) / growth.total;
        vf squares = splat(0.0f), others = splat(0.0f);
        along(columns, [&](int64_t i, int n) {
          vf v = get(px + i, n) - mean;
          if (n < W) v = clear_after(v, n);
          v = v * v;
          if (masked) v = v * load(&growth.mask[i]);
          const vf next = squares + v;
          squares = others, others = next;
        });
        const float r = 1.0f / std::sqrt(sum_lanes(squares + others) / growth.total + eps);
        out[1].as<float>()[row] = mean, out[2].as<float>()[row] = r;
        along(columns, [&](int64_t i, int n) {
          vf v = rounded<O>((get(px + i, n) - mean) * r) * load(&gain[i]) + load(&offset[i]);
          if (masked) v = v * load(&growth.mask[i]);
          put(out[0].as<O>() + row * columns + i, v, n, far);
          ahead(px + columns + i, far);
        });
      }
      fence(far);
    });
  });
}

// in: grad, x, weight, mean, rstd, mask; out: dx, dweight, dbias; scalars: has mask
KERNEL(layer_norm_backward, 6, 3, 1) {
  const int64_t columns = in[1].columns(), rows = in[1].rows();
  const std::vector<float> gain = floats(in[2]);
  const Growth growth(scalar[0] ? &in[5] : nullptr, columns);
  const int pieces = pieces_for(rows, row_grain(columns));
  ColumnSums dweight(columns, pieces), dbias(columns, pieces);
  with_types(in[0].dtype, in[1].dtype, [&](auto *tg, auto *tx) {
    using G = std::remove_pointer_t<decltype(tg)>;
    using X = std::remove_pointer_t<decltype(tx)>;
    const bool far = streams(out[0]);
    parallel(rows, row_grain(columns), [&](int64_t first, int64_t last, int piece) {
      float *dw = dweight.of(piece), *db = dbias.of(piece);
      for (int64_t row = first; row < last; row += kTogether) {
        const int64_t some = std::min(kTogether, last - row);
        const G *pg = in[0].as<G>() + row * columns;
        const X *px = in[1].as<X>() + row * columns;
        const float *mean = in[3].as<float>() + row, *r = in[4].as<float>() + row;
        vf plain[kTogether] = {}, tilted[kTogether] = {};
        along(columns, [&](int64_t i, int n) {
          const vf weight_i = load(&gain[i]), mask_i = growth.at(i);
          vf sum = load(dw + i), sum_bias = load(db + i);
          for (int64_t k = 0; k < some; k++) {
            const vf g = get(pg + k * columns + i, n) * mask_i, v = (get(px + k * columns + i, n) - mean[k]) * r[k];
            sum += g * v, sum_bias += g;
            plain[k] += g * weight_i, tilted[k] += g * weight_i * v;
          }
          store(dw + i, sum), store(db + i, sum_bias);
        });
        for (int64_t k = 0; k < some; k++) {
          const float level = sum_lanes(plain[k]) / growth.total, tilt = sum_lanes(tilted[k]) / growth.total;
          along(columns, [&](int64_t i, int n) {
            const vf c = growth.at(i), g = get(pg + k * columns + i, n) * load(&gain[i]) * c;
            const vf v = (get(px + k * columns + i, n) - mean[k]) * r[k];
            put(out[0].as<X>() + (row + k) * columns + i, (g - c * (level + v * tilt)) * r[k], n, far);
            ahead(pg + (k + kTogether) * columns + i, far);
            ahead(px + (k + kTogether) * columns + i, far);
          });
        }
      }
      fence(far);
    });
  });
  dweight.write(out[1].as<float>(), columns);
  dbias.write(out[2].as<float>(), columns);
}
