// Cross-entropy over a shard of the vocabulary, gradient of the head by blocks of rows, embedding and its gradient, AdamW.
#include "matmul.h"
#include "types.h"

namespace {
constexpr int kIgnore = -100;
constexpr int64_t kBlock = 1024;  // logits between two checks of the level
// Sum of a block, relative to the level, above which the level is raised: about e^20. A block with maximum at most the
// level sums to at most kBlock.
constexpr float kFar = 5e8f;

template <typename T>
float largest(const T *p, int64_t n) {
  vf most = splat(-INFINITY);
  by_vectors(0, n, 0, [&](int64_t i, int some) {
    if (some == W)
      most = maximum(load(p + i), most);
    else
      for (int l = 0; l < some; l++) most = maximum(splat(scalar_load(p + i + l)), most);
  });
  return max_lanes(most);
}

// log_sum_exp of the ``real`` columns and the target's logit of each row, reading the logits once.
template <typename T>
void statistics(const View &logits, const View &targets, int64_t first, int64_t real, float *lse, float *picked) {
  const int64_t columns = logits.columns();
  parallel(logits.rows(), 1, [&](int64_t a, int64_t b, int) {
    for (int64_t row = a; row < b; row++) {
      const T *p = logits.as<T>() + row * columns;
      const int64_t target = load_index(targets, row) - first;
      const bool held = load_index(targets, row) != kIgnore && target >= 0 && target < real;
      picked[row] = held ? scalar_load(p + target) : 0.0f;
      // Invariant: sum = sum of e^(x - level) over [0, from). The level is near the maximum but need not be it:
      // initially the maximum of the first block. A block whose sum exceeds kFar raises the level to its maximum,
      // rescales the sum by e^(old - new) and is repeated.
      float level = -INFINITY;
      double sum = 0;
      for (int64_t from = 0; from < real;) {
        const int64_t to = std::min(real, from + kBlock);
        if (level == -INFINITY) level = largest(p + from, to - from);
        const float base = level == -INFINITY ? 0.0f : level;
        vf part = splat(0.0f);
        by_vectors(from, to, 0, [&](int64_t i, int n) {
          vf term = exponential(get(p + i, n) - base);
          if (n < W) term = clear_after(term, n);
          part += term;
        });
        const float more = sum_lanes(part);
        if (more > kFar) {
          const float top = largest(p + from, to - from);
          sum *= std::exp(double(level) - top), level = top;
          continue;  // repeat relative to the new level
        }
        sum += more, from = to;
      }
      lse[row] = real ? static_cast<float>(level + std::log(sum)) : -INFINITY;
    }
  });
}
}  // namespace

// in: logits [N, C], targets [N]; out: log_sum_exp [N], picked [N] float32; scalars: first, real
KERNEL(cross_entropy_forward, 2, 2, 2) {
  with_type(in[0].dtype, [&](auto *t) {
    statistics<std::remove_pointer_t<decltype(t)>>(in[0], in[1], int64_t(scalar[0]), int64_t(scalar[1]),
                                                   out[0].as<float>(), out[1].as<float>());
  });
}

// in: logits [N, C] (overwritten by their gradient unless there is an output), targets [N], log_sum_exp [N] over all
// ranks, factor [1]; out: dlogits or nothing; scalars: first, real, z_loss.
// dlogits = factor ((1 + 2 z lse) e^(x - lse) - onehot(target)); 0 in padding columns and rows with target kIgnore.
static void cross_entropy_gradient(const View *in, const View &target_view, const double *scalar) {
  const int64_t columns = in[0].columns(), first = int64_t(scalar[0]), real = int64_t(scalar[1]);
  const float factor = *in[3].as<float>(), z = static_cast<float>(scalar[2]);
  const bool far = streams(target_view);
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    parallel(in[0].rows(), 1, [&](int64_t a, int64_t b, int) {
      for (int64_t row = a; row < b; row++) {
        const T *p = in[0].as<T>() + row * columns;
        T *o = target_view.as<T>() + row * columns;
        const int64_t token = load_index(in[1], row);
        const float lse = in[2].as<float>()[row];
        const float scale = token == kIgnore ? 0.0f : factor * (1.0f + 2.0f * z * lse);
        const int64_t local = token - first;
        const bool held = token != kIgnore && local >= 0 && local < real;
        const float own = held ? std::exp(scalar_load(p + local) - lse) * scale - factor : 0.0f;
        const int64_t some = scale != 0.0f ? real : 0;
        by_vectors(0, some, to_line(o), [&](int64_t i, int n) {
          put(o + i, exponential(get(p + i, n) - lse) * scale, n, far);
        });
        by_vectors(some, columns, to_line(o + some), [&](int64_t i, int n) { put(o + i, splat(0.0f), n, far); });
        if (far) fence(true);
        if (held) scalar_store(o + local, own);
      }
    });
  });
}
KERNEL(cross_entropy_backward, 4, 1, 3) { cross_entropy_gradient(in, out[0], scalar); }
KERNEL(cross_entropy_backward_in_place, 4, 0, 3) { cross_entropy_gradient(in, in[0], scalar); }

// in: total [V, E], added to; dlogits [N, V]; x [N, E]; all float32. total += dlogits^T x: further steps of its sums over
// rows. N is not zero.
KERNEL(head_gradient, 3, 0, 0) {
  const int64_t rows = in[1].shape[0], columns = in[1].shape[1], width = in[2].shape[1];
  const Operand dlogits{in[1].as<float>(), 1, columns}, x{in[2].as<float>(), width, 1};
  float_product(columns, width, rows, dlogits, x, nullptr, in[0].as<float>(), true);
}

// in: table [V, E], ids [N]; out: rows [N, E]
KERNEL(embedding, 2, 1, 0) {
  const int64_t columns = in[0].columns(), bytes = columns * (in[0].dtype == F32 ? 4 : 2);
  const bool far = streams(out[0]) && bytes % 4 == 0;  // rows are copied as floats, whatever their dtype
  const auto of = [&](int64_t row) { return in[0].as<char>() + load_index(in[1], row) * bytes; };
  parallel(in[1].size(), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, bytes)), [&](int64_t a, int64_t b, int) {
    for (int64_t row = a; row < b; row++) {
      if (!far) {
        std::memcpy(out[0].as<char>() + row * bytes, of(row), bytes);
        continue;
      }
      float *to = reinterpret_cast<float *>(out[0].as<char>() + row * bytes);
      const auto *from = reinterpret_cast<const float *>(of(row));
      const auto *next = reinterpret_cast<const float *>(of(std::min(row + 1, b - 1)));
      by_vectors(0, bytes / 4, to_line(to), [&](int64_t i, int n) {
        put(to + i, get(from + i, n), n, true);
        ahead(next + i, true);
      });
    }
    fence(far);
  });
}

// in: grad [N, E], ids [N]; out: [V, E], written once: for each id the float32 sum of its rows, in the order of the
// rows for any number of threads, rounded to the dtype of the output, and zeros for absent ids.
KERNEL(embedding_backward, 2, 1, 0) {
  const int64_t columns = in[0].columns(), rows = in[1].size(), vocab = out[0].shape[0];
  // Counting sort: the rows of id v are order[start[v] .. start[v + 1]), ascending.
  std::vector<int64_t> start(vocab + 1, 0), order(rows);
  const auto held = [&](int64_t id) { return id >= 0 && id < vocab; };
  for (int64_t row = 0; row < rows; row++)
    if (const int64_t id = load_index(in[1], row); held(id)) start[id + 1]++;
  for (int64_t id = 0; id < vocab; id++) start[id + 1] += start[id];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t row = 0; row < rows; row++)
    if (const int64_t id = load_index(in[1], row); held(id)) order[next[id]++] = row;
  const bool far = streams(out[0]);
  with_types(in[0].dtype, out[0].dtype, [&](auto *t, auto *o) {
    using T = std::remove_pointer_t<decltype(t)>;
    using O = std::remove_pointer_t<decltype(o)>;
    const T *grad = in[0].as<T>();
    parallel(vocab, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, columns)), [&](int64_t a, int64_t b, int) {
      for (int64_t id = a; id < b;) {
        O *to = out[0].as<O>() + id * columns;
        const int64_t first = start[id], last = start[id + 1];
        const T *soon = last < start[b] ? grad + order[last] * columns : nullptr;
        if (first == last) {
          const int64_t from = id;  // a range of absent ids, the majority in a large vocabulary
          while (id < b && start[id + 1] == first) id++;
          for (int64_t i = 0; soon && i < columns; i += 64 / sizeof(T)) ahead(soon + i, far);
          clear(to, (id - from) * columns, far);
          continue;
        }
        by_vectors(0, columns, to_line(to), [&](int64_t i, int n) {
          vf sum = splat(0.0f);
          for (int64_t k = first; k < last; k++) sum += get(grad + order[k] * columns + i, n);
          put(to + i, sum, n, far);
          if (soon) ahead(soon + i, far);
        });
        id++;
      }
      fence(far);
    });
  });
}

// The part of a float64 scalar that its float32 ``x`` leaves out. A factor that is the same for all elements must not be
// rounded to float32 alone: its error moves all weights one way, as another learning rate would, and training magnifies
// that far more than the rounding of single elements.
inline float rest(double exact, float x) { return static_cast<float>(exact - x); }

// in: master, m, v (flat float32, ``count`` elements from ``first`` on updated in place), grad, copy (``count``
// elements: the new weights in their dtype); scalars: first, lr, beta1, beta2, eps, 1 - lr * weight_decay, c1 = 1 / (1
// - beta1^t), c2 = 1 / sqrt(1 - beta2^t), grad_scale, has copy, first element of grad, count. master <- (1 - lr wd)
// master - lr c1 m / (c2 sqrt(v) + eps).
KERNEL(adamw, 5, 0, 12) {
  const int64_t first = int64_t(scalar[0]), from = int64_t(scalar[10]), count = int64_t(scalar[11]);
  float *master = in[0].as<float>() + first, *m = in[1].as<float>() + first, *v = in[2].as<float>() + first;
  // The quotient is taken by c2: lr c1 / c2 is one factor, in two parts, as are beta1 and beta2.
  const double exact_rate = scalar[1] * scalar[6] / scalar[7];
  const float b1 = scalar[2], b2 = scalar[3], a1 = 1.0 - scalar[2], a2 = 1.0 - scalar[3], scale = scalar[8],
              eps = scalar[4] / scalar[7], rate = exact_rate, decay = 1.0 - scalar[5];
  const float b1_rest = rest(scalar[2], b1), b2_rest = rest(scalar[3], b2), rate_rest = rest(exact_rate, rate);
  with_types(in[3].dtype, in[4].dtype, [&](auto *tg, auto *tc) {
    using G = std::remove_pointer_t<decltype(tg)>;
    using C = std::remove_pointer_t<decltype(tc)>;
    const G *grad = in[3].as<G>() + from;
    C *copy = scalar[9] ? in[4].as<C>() : nullptr;
    const int64_t vectors = (count + W - 1) / W;
    parallel(vectors, 512, [&](int64_t a, int64_t b, int) {
      for (int64_t vec = a; vec < b; vec++) {
        const int64_t i = vec * W;
        const int n = static_cast<int>(std::min<int64_t>(W, count - i));
        const vf g = get(grad + i, n) * scale, m0 = get(m + i, n), v0 = get(v + i, n), w0 = get(master + i, n);
        const vf mi = m0 * b1 + (m0 * b1_rest + g * a1), vi2 = v0 * b2 + (v0 * b2_rest + g * g * a2);
        const vf u = mi / (square_root(vi2) + eps);
        const vf w = w0 - (w0 * decay + (u * rate + u * rate_rest));
        put(m + i, mi, n), put(v + i, vi2, n), put(master + i, w, n);
        if (copy) put(copy + i, w, n);
      }
    });
  });
}
