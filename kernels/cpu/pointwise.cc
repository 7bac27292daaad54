// Element-wise kernels and reductions: rotary embedding, activations, biases, sums of squares, merge of blocks.
#include "types.h"

namespace {

constexpr int64_t kGrain = 8192;

// body(i, n) over the elements of ``out``, in vectors aligned to its cache lines.
template <typename T, typename Body>
void over(const T *out, int64_t size, const Body &body) {
  const int64_t head = std::min(size, to_line(out)), vectors = std::max<int64_t>(1, (size - head + W - 1) / W);
  parallel(size ? vectors : 0, kGrain / W, [&](int64_t first, int64_t last, int) {
    const int64_t from = first ? head + first * W : 0;
    by_vectors(from, std::min(size, head + last * W), first ? 0 : head, body);
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
}

vf silu_gate(vf x) { return gate(x * -kLog2E); }

constexpr float kGeluA = 0.7978845608028654f, kGeluB = 0.044715f;

// (1 + tanh u) / 2 = 1 / (1 + e^-2u), without cancellation where tanh u is near -1; u of gelu at x.
vf gelu_gate(vf x) {
  constexpr float scale = -2.0f * kGeluA * kLog2E;
  return gate(x * (scale + (scale * kGeluB) * (x * x)));
}

// Half rotation of a strided tensor [B, S, heads, D] into a contiguous one: (a, b) -> (a cos - b sin, b cos + a sin),
// times ``scale`` where given.
template <typename T>
void rotate(const View &x, const View &cos, const View &sin, const View *scale, float sign, const View &out) {
  const int64_t S = x.shape[1], heads = x.shape[2], D = x.shape[3], half = D / 2;
  const int64_t batch_stride = cos.shape[0] == 1 ? 0 : S * half;
  const bool far = streams(out);
  parallel(x.shape[0] * S, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, heads * D)),
           [&](int64_t first, int64_t last, int) {
             for (int64_t token = first; token < last; token++) {
               const int64_t b = token / S, s = token % S;
               const float *c = cos.as<float>() + b * batch_stride + s * half;
               const float *si = sin.as<float>() + b * batch_stride + s * half;
               const float *sc = scale ? scale->as<float>() + b * batch_stride + s * half : nullptr;
               for (int64_t h = 0; h < heads; h++) {
                 const T *p = x.as<T>() + b * x.stride[0] + s * x.stride[1] + h * x.stride[2];
                 T *o = out.as<T>() + (token * heads + h) * D;
                 for (int64_t i = 0; i < half; i += W) {
                   const int n = static_cast<int>(std::min<int64_t>(W, half - i));
                   const vf a = get(p + i, n), b2 = get(p + half + i, n), cv = get(c + i, n), sv = get(si + i, n) * sign;
                   vf y = a * cv - b2 * sv, z = b2 * cv + a * sv;
                   if (sc) y = y * get(sc + i, n), z = z * get(sc + i, n);
                   put(o + i, y, n, far);
                   put(o + half + i, z, n, far);
                 }
               }
             }
             fence(far);
           });
}

// dgate and dup of grad, gate and up, which they may overwrite: an element of each is read before either is written.
void swiglu_gradients(const View *in, const View &dgate, const View &dup) {
  const bool far = streams(dgate);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    over(dgate.as<T>(), in[0].size(), [&](int64_t i, int n) {
      const vf d = get(in[0].as<T>() + i, n), g = get(in[1].as<T>() + i, n), u = get(in[2].as<T>() + i, n);
      const vf s = silu_gate(g);
      put(dgate.as<T>() + i, d * u * s * (1.0f + g * (1.0f - s)), n, far);
      put(dup.as<T>() + i, d * g * s, n, far);
    });
  });
}

}  // namespace

// in: q, k [B, S, heads, D] with contiguous D, cos, sin, scale_q, scale_k [B or 1, S, 1, D/2] float32;
// out: q', k'; scalars: sign of the angle, has scale_q, has scale_k
KERNEL(rope, 6, 2, 3) {
  const float sign = static_cast<float>(scalar[0]);
  for (int i = 0; i < 2; i++)
    with_type(in[i].dtype, [&](auto *t) {
      rotate<std::remove_pointer_t<decltype(t)>>(in[i], in[2], in[3], scalar[1 + i] ? &in[4 + i] : nullptr, sign, out[i]);
    });
}

// in: gate, up; out: silu(gate) * up
KERNEL(swiglu, 2, 1, 0) {
  const bool far = streams(out[0]);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    over(out[0].as<T>(), in[0].size(), [&](int64_t i, int n) {
      const vf g = get(in[0].as<T>() + i, n);
      put(out[0].as<T>() + i, g * silu_gate(g) * get(in[1].as<T>() + i, n), n, far);
    });
  });
}

// in: grad, gate, up; out: dgate, dup, or in place those over gate and up
KERNEL(swiglu_backward, 3, 2, 0) { swiglu_gradients(in, out[0], out[1]); }
KERNEL(swiglu_backward_in_place, 3, 0, 0) { swiglu_gradients(in, in[1], in[2]); }

// in: x; out: gelu(x), tanh form
KERNEL(gelu, 1, 1, 0) {
  const bool far = streams(out[0]);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    over(out[0].as<T>(), in[0].size(), [&](int64_t i, int n) {
      const vf x = get(in[0].as<T>() + i, n);
      put(out[0].as<T>() + i, x * gelu_gate(x), n, far);
    });
  });
}

// in: grad, x; out: dx
KERNEL(gelu_backward, 2, 1, 0) {
  const bool far = streams(out[0]);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    over(out[0].as<T>(), in[0].size(), [&](int64_t i, int n) {
      const vf d = get(in[0].as<T>() + i, n), x = get(in[1].as<T>() + i, n), s = gelu_gate(x);
      // d/dx of x s(2u) = s + x s (1 - s) 2u'. For large |x|, s (1 - s) is 0 before u' overflows.
      const vf ds = d * s, slope = (2.0f * kGeluA) + (6.0f * kGeluA * kGeluB) * (x * x);
      put(out[0].as<T>() + i, ds + (ds - ds * s) * x * slope, n, far);
    });
  });
}

// in: x; out: x in the dtype of the output
KERNEL(cast, 1, 1, 0) {
  const bool far = streams(out[0]);
  with_types(in[0].dtype, out[0].dtype, [&](auto *tx, auto *to) {
    using X = std::remove_pointer_t<decltype(tx)>;
    using O = std::remove_pointer_t<decltype(to)>;
    over(out[0].as<O>(), in[0].size(), [&](int64_t i, int n) {
      put(out[0].as<O>() + i, get(in[0].as<X>() + i, n), n, far);
    });
  });
}

// in: x, y of one shape; out: x + y in the dtype of x
KERNEL(add, 2, 1, 0) {
  const bool far = streams(out[0]);
  with_types(in[0].dtype, in[1].dtype, [&](auto *tx, auto *ty) {
    using X = std::remove_pointer_t<decltype(tx)>;
    using Y = std::remove_pointer_t<decltype(ty)>;
    over(out[0].as<X>(), in[0].size(), [&](int64_t i, int n) {
      put(out[0].as<X>() + i, get(in[0].as<X>() + i, n) + get(in[1].as<Y>() + i, n), n, far);
    });
  });
}

// in: x [..., C], changed in place; bias [C]
KERNEL(add_bias, 2, 0, 0) {
  const int64_t columns = in[0].columns();
  with_types(in[0].dtype, in[1].dtype, [&](auto *tx, auto *tb) {
    using X = std::remove_pointer_t<decltype(tx)>;
    using B = std::remove_pointer_t<decltype(tb)>;
    parallel(in[0].rows(), std::max<int64_t>(1, kGrain / columns), [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < columns; i += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, columns - i));
          X *p = in[0].as<X>() + row * columns + i;
          put(p, get(p, n) + get(in[1].as<B>() + i, n), n);
        }
    });
  });
}

// in: x [..., C]; out: sums over the rows [C] float32, in blocks of kBlock rows, for any number of threads.
KERNEL(column_sum, 1, 1, 0) {
  constexpr int64_t kBlock = 128;
  const int64_t columns = in[0].columns(), rows = in[0].rows(), stride = (columns + W - 1) / W * W;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  Floats sums(std::max<int64_t>(1, blocks) * stride, 0.0f);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    parallel(blocks, std::max<int64_t>(1, kGrain / (kBlock * stride)), [&](int64_t a, int64_t b, int) {
      for (int64_t block = a; block < b; block++) {
        float *sum = &sums[block * stride];
        for (int64_t row = block * kBlock; row < std::min(rows, (block + 1) * kBlock); row++)
          for (int64_t i = 0; i < columns; i += W) {
            const int n = static_cast<int>(std::min<int64_t>(W, columns - i));
            store(sum + i, load(sum + i) + get(in[0].as<T>() + row * columns + i, n));
          }
      }
    });
  });
  for (int64_t i = 0; i < columns; i++) {
    double total = 0;
    for (int64_t block = 0; block < blocks; block++) total += sums[block * stride + i];
    out[0].as<float>()[i] = static_cast<float>(total);
  }
}

// in: x; out: sum of squares [1], squared and added in float64, in blocks of a fixed size, so that the bits do not
// depend on the number of threads
KERNEL(square_sum, 1, 1, 0) {
  constexpr int64_t kBlock = 4096;
  const int64_t size = in[0].size(), blocks = (size + kBlock - 1) / kBlock;
  std::vector<double> sums(blocks);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    parallel(blocks, 4, [&](int64_t a, int64_t b, int) {
      for (int64_t block = a; block < b; block++) {
        const int64_t first = block * kBlock, last = std::min(size, first + kBlock);
        vd lanes = {}, more = {};
        int64_t i = first;
        for (; i + 2 * W <= last; i += 2 * W) {
          const vd a = __builtin_convertvector(load(in[0].as<T>() + i), vd);
          const vd b = __builtin_convertvector(load(in[0].as<T>() + i + W), vd);
          lanes += a * a, more += b * b;
        }
        for (; i < last; i += W) {
          const vf x = get(in[0].as<T>() + i, static_cast<int>(std::min<int64_t>(W, last - i)));
          lanes += __builtin_convertvector(x, vd) * __builtin_convertvector(x, vd);
        }
        lanes += more;
        double sum = 0;
        for (int l = 0; l < W; l++) sum += lanes[l];
        sums[block] = sum;
      }
    });
  });
  double total = 0;
  for (double sum : sums) total += sum;
  out[0].as<double>()[0] = total;
}

// in: into (float32, changed in place), x; scalars: first element of into, 1 to add and 0 to replace
KERNEL(accumulate, 2, 0, 2) {
  float *into = in[0].as<float>() + static_cast<int64_t>(scalar[0]);
  const bool add = scalar[1] != 0;
  const bool far = !add && streams(in[1]);
  with_type(in[1].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T *x = in[1].as<T>();
    if (add)
      over(into, in[1].size(), [&](int64_t i, int n) { put(into + i, get(into + i, n) + get(x + i, n), n); });
    else
      over(into, in[1].size(), [&](int64_t i, int n) { put(into + i, get(x + i, n), n, far); });
  });
}

// log(1 + x) for 0 <= x <= 1, within 3 units in the last place: 2 artanh(z) = 2 z (1 + z^2/3 + z^4/5 + ...) with
// z = x / (2 + x); minimax coefficients, error 4e-09.
static vf log_one_and(vf x) {
  const vf z = x * inverse(2.0f + x), u = z * z;
  return 2.0f * z + 2.0f * z * u * (0.333332081f + u * (0.200107636f + u * (0.140009027f + u * 0.140059934f)));
}

// log_sum_exp of the union of two blocks with log-sum-exps a and b: max + log(1 + e^(min - max)); the weights are
// e^(a - union) and e^(b - union). Without visible keys in both: -inf and weights 0.
static vf union_of(vf a, vf b, vf &weight_a, vf &weight_b) {
  const vf top = maximum(a, b), unknown = a + b, infinite = splat(INFINITY);
  const vi finite = absolute(top) < infinite, nan = (a != a) | (b != b);
  const vf smaller = exponential(minimum(a, b) - top), larger = inverse(1.0f + smaller), less = smaller * larger;
  const vi first = a >= b;
  weight_a = select(nan, unknown, (vf)((vi)select(first, larger, less) & finite));
  weight_b = select(nan, unknown, (vf)((vi)select(first, less, larger) & finite));
  return select(nan, unknown, select(finite, top + log_one_and(smaller), top));
}

// in: out, more [B, S, H, D] float32, log_sum_exp, more_lse [B, H, S] float32; out: out, log_sum_exp of the union
KERNEL(merge_blocks, 4, 2, 0) {
  const int64_t B = in[0].shape[0], S = in[0].shape[1], H = in[0].shape[2], D = in[0].shape[3];
  const int64_t groups = (S + W - 1) / W;  // groups of W tokens, whose log-sum-exps are contiguous
  const bool far = streams(out[0]);
  parallel(B * groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, W * H * D)), [&](int64_t a, int64_t b, int) {
    Floats weights(2 * H * W);
    const vi lanes = lane_numbers();
    for (int64_t group = a; group < b; group++) {
      const int64_t batch = group / groups, from = group % groups * W;
      const int some = static_cast<int>(std::min<int64_t>(W, S - from));
      for (int64_t h = 0; h < H; h++) {
        const int64_t at = (batch * H + h) * S + from;
        vf one, other;
        put(out[1].as<float>() + at,
            union_of(get(in[2].as<float>() + at, some), get(in[3].as<float>() + at, some), one, other), some);
        store(&weights[2 * h * W], one), store(&weights[(2 * h + 1) * W], other);
      }
      for (int t = 0; t < some; t++) {
        const int64_t token = (batch * S + from + t) * H * D;
        const float *x = in[0].as<float>() + token, *y = in[1].as<float>() + token;
        float *to = out[0].as<float>() + token;
        // Vectors aligned to cache lines of the output; one that crosses heads selects its weights per lane.
        const auto weight = [&](int64_t h, int which) { return splat(weights[(2 * h + which) * W + t]); };
        int64_t h = 0;
        by_vectors(0, H * D, to_line(to), [&](int64_t i, int n) {
          while (i >= (h + 1) * D) h++;
          vf wa = weight(h, 0), wb = weight(h, 1);
          for (int64_t next = h + 1; i + n > next * D; next++) {
            const vi before = lanes < splat_int(static_cast<int32_t>(next * D - i));
            wa = select(before, wa, weight(next, 0)), wb = select(before, wb, weight(next, 1));
          }
          put(to + i, get(x + i, n) * wa + get(y + i, n) * wb, n, far);
          ahead(x + H * D + i, far), ahead(y + H * D + i, far);
        });
      }
    }
    fence(far);
  });
}
