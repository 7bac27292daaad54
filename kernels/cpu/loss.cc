// Cross-entropy over a shard of the vocabulary, token lookup and its gradient, AdamW.
#include "types.h"

namespace {
constexpr int kIgnore = -100;
constexpr int64_t kBlock = 1024;  // logits between two looks at the level
constexpr float kNear = 20.0f;    // e^20 times a block's length is far from overflow

template <typename T>
void statistics(const View &logits, const View &targets, int64_t first, int64_t real, float *lse, float *picked) {
  const int64_t columns = logits.columns();
  parallel(logits.rows(), 1, [&](int64_t a, int64_t b, int) {
    for (int64_t row = a; row < b; row++) {
      const T *p = logits.as<T>() + row * columns;
      const int64_t target = load_index(targets, row) - first;
      const bool held = load_index(targets, row) != kIgnore && target >= 0 && target < real;
      picked[row] = held ? scalar_load(p + target) : 0.0f;
      // The exponentials are taken relative to a level that need not be the largest logit, only near it: a block whose
      // largest is far above raises it, and is gone through again.
      float level = -INFINITY;
      double sum = 0;
      for (int64_t from = 0; from < real;) {
        const int64_t to = std::min(real, from + kBlock), whole = from + (to - from) / W * W;
        const float base = level == -INFINITY ? 0.0f : level;
        vf most = splat(-INFINITY), part = splat(0.0f);
        for (int64_t i = from; i < whole; i += W) {
          const vf x = load(p + i);
          most = maximum(x, most), part += exponential(x - base);
        }
        if (whole < to) {
          const int n = static_cast<int>(to - whole);
          const vf x = load_part(p + whole, n);
          part += clear_after(exponential(x - base), n);
          for (int64_t i = whole; i < to; i++) most = maximum(splat(scalar_load(p + i)), most);
        }
        const float top = max_lanes(most);
        if (top > level + kNear || (top != -INFINITY && level == -INFINITY)) {
          sum = sum ? sum * std::exp(double(level) - top) : 0;
          level = top;
          continue;  // now relative to its own largest
        }
        sum += sum_lanes(part);
        from = to;
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

// in: logits [N, C] (overwritten by their gradient unless there is an output), targets [N], log_sum_exp [N], factor [1];
// out: dlogits or nothing; scalars: first, real, z_loss, in place
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
        for (int64_t i = 0; i < columns; i += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, columns - i));
          vf g = splat(0.0f);
          if (i < real && scale != 0.0f) {
            g = exponential(get(p + i, n) - lse) * scale;
            if (i + n > real) g = clear_after(g, static_cast<int>(real - i));
          }
          put(o + i, g, n, far);
        }
        if (far) fence(true);
        if (held) scalar_store(o + local, own);
      }
    });
  });
}
KERNEL(cross_entropy_backward, 4, 1, 3) { cross_entropy_gradient(in, out[0], scalar); }
KERNEL(cross_entropy_backward_in_place, 4, 0, 3) { cross_entropy_gradient(in, in[0], scalar); }

// in: table [V, E], ids [N]; out: rows [N, E]
KERNEL(embedding, 2, 1, 0) {
  const int64_t columns = in[0].columns(), bytes = columns * (in[0].dtype == F32 ? 4 : 2);
  const bool far = streams(out[0]) && bytes % 64 == 0;  // whole lines: rows are copied as they are, whatever the type
  const auto of = [&](int64_t row) { return in[0].as<char>() + load_index(in[1], row) * bytes; };
  parallel(in[1].size(), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, bytes)), [&](int64_t a, int64_t b, int) {
    for (int64_t row = a; row < b; row++) {
      char *to = out[0].as<char>() + row * bytes;
      if (!far) {
        std::memcpy(to, of(row), bytes);
        continue;
      }
      const char *from = of(row), *next = of(std::min(row + 1, b - 1));
      for (int64_t i = 0; i < bytes; i += sizeof(vf)) {
        put(reinterpret_cast<float *>(to + i), load(reinterpret_cast<const float *>(from + i)), W, true);
        ahead(next + i, true);
      }
    }
    fence(far);
  });
}

// in: grad [N, E], ids [N]; out: [V, E] float32. Each thread owns a run of the vocabulary and adds in the order of the
// rows: the same bits whatever the number of threads.
KERNEL(embedding_backward, 2, 1, 0) {
  const int64_t columns = in[0].columns(), rows = in[1].size(), vocab = out[0].shape[0];
  with_type(in[0].dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    parallel(vocab, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, columns)), [&](int64_t a, int64_t b, int) {
      float *table = out[0].as<float>();
      std::memset(table + a * columns, 0, (b - a) * columns * sizeof(float));
      for (int64_t row = 0; row < rows; row++) {
        const int64_t id = load_index(in[1], row);
        if (id < a || id >= b) continue;
        for (int64_t i = 0; i < columns; i += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, columns - i));
          float *p = table + id * columns + i;
          put(p, get(p, n) + get(in[0].as<T>() + row * columns + i, n), n);
        }
      }
    });
  });
}

// in: master, m, v (flat float32, changed in place from element scalar[0] on), grad (its size says how many), copy
// (weights in their dtype, as many as grad); scalars: first, lr, beta1, beta2, eps, 1 - lr * decay,
// 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t), grad_scale, has copy, first element of grad, count
KERNEL(adamw, 5, 0, 12) {
  const int64_t first = int64_t(scalar[0]), from = int64_t(scalar[10]), count = int64_t(scalar[11]);
  float *master = in[0].as<float>() + first, *m = in[1].as<float>() + first, *v = in[2].as<float>() + first;
  const float lr = scalar[1], b1 = scalar[2], b2 = scalar[3], eps = scalar[4], keep = scalar[5], c1 = scalar[6],
              c2 = scalar[7], scale = scalar[8], a1 = 1.0 - scalar[2], a2 = 1.0 - scalar[3];
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
        const vf g = get(grad + i, n) * scale;
        const vf mi = get(m + i, n) * b1 + g * a1, vi2 = get(v + i, n) * b2 + g * g * a2;
        const vf w = get(master + i, n) * keep - (mi * c1) / (square_root(vi2) * c2 + eps) * lr;
        put(m + i, mi, n), put(v + i, vi2, n), put(master + i, w, n);
        if (copy) put(copy + i, w, n);
      }
    });
  });
}
