// Paged attention: causal attention of the last tokens of several sequences over keys and values in pages.
//
// A sequence with one query (decoding) reads its keys in place, W at a time, for all heads of a kv head, then the
// values. Its keys are divided into runs of a fixed length, merged in order (flash decoding), so that the bits depend
// neither on the number of threads nor on other sequences. For a chunk of a prompt the keys of a head are gathered and
// go through the blocks of attention.h.
#include "attention.h"

namespace {

constexpr int64_t kRun = 512;  // keys per run

struct Paged {
  const View &q, &k, &v;
  const int32_t *starts, *lengths, *tables;
  int64_t R, H, D, K, G, Dp, size, most_pages;

  explicit Paged(const View *in)
      : q(in[0]), k(in[3]), v(in[4]), starts(in[6].as<int32_t>()), lengths(in[7].as<int32_t>()),
        tables(in[8].as<int32_t>()), R(in[7].shape[0]), H(q.shape[2]), D(q.shape[3]), K(k.shape[2]), G(H / K),
        Dp(padded(D)), size(k.shape[1]), most_pages(in[8].shape[1]) {}
  int64_t queries(int64_t r) const { return starts[r + 1] - starts[r]; }
};

// body(t, p) for the positions t in [from, to) of sequence r, in order: p points to the D elements of head ``kv``.
template <typename T, typename Body>
inline void each_place(const Paged &a, const View &pages, int64_t r, int64_t kv, int64_t from, int64_t to,
                       const Body &body) {
  const int64_t step = a.K * a.D;
  for (int64_t t = from; t < to;) {
    const int64_t page = a.tables[r * a.most_pages + t / a.size], place = t % a.size;
    const int64_t until = std::min(to, t + a.size - place);
    const T *p = pages.as<T>() + (page * a.size + place) * step + kv * a.D;
    for (; t < until; t++, p += step) body(t, p);
  }
}

// Pointers to up to W rows as float32: in place where they are whole float vectors, else copied to ``room`` [W, Dp].
template <typename T>
inline void rows_of(const Paged &a, const View &pages, int64_t r, int64_t kv, int64_t from, int64_t to, float *room,
                    const float **rows) {
  each_place<T>(a, pages, r, kv, from, to, [&](int64_t t, const T *p) {
    if constexpr (std::is_same_v<T, float>)
      if (a.D == a.Dp) {
        rows[t - from] = p;
        return;
      }
    float *row = room + (t - from) * a.Dp;
    for (int64_t d = 0; d < a.D; d += W) store(row + d, get(p + d, static_cast<int>(std::min<int64_t>(W, a.D - d))));
    rows[t - from] = row;
  });
}

struct Scratch {
  Floats queries, scores, keys, zeros;
};

// Partial attention of one sequence's single query over its keys [from, to), in the G heads of kv head ``kv``:
// top [G] = max(score), total [G] = sum(e^(score - top)), sums [G, Dp] = sum(e^(score - top) v).
template <typename T>
void single_run(const Paged &a, int64_t r, int64_t kv, int64_t from, int64_t to, float scale, float *top, float *total,
                float *sums, Scratch &s) {
  const int64_t n = to - from, np = padded(n), Dp = a.Dp;
  s.queries.resize(a.G * Dp), s.scores.resize(a.G * np), s.keys.resize(W * Dp), s.zeros.assign(Dp, 0.0f);
  for (int64_t g = 0; g < a.G; g++) {
    const T *p = a.q.as<T>() + a.starts[r] * a.q.stride[1] + (kv * a.G + g) * a.q.stride[2];
    for (int64_t d = 0; d < a.D; d += W)
      store(&s.queries[g * Dp + d], get(p + d, static_cast<int>(std::min<int64_t>(W, a.D - d))) * scale);
  }
  const float *rows[W];
  for (int64_t t = 0; t < n; t += W) {
    const int64_t some = std::min<int64_t>(W, n - t);
    rows_of<T>(a, a.k, r, kv, from + t, from + t + some, s.keys.data(), rows);
    for (int64_t i = some; i < W; i++) rows[i] = s.zeros.data();
    // W dot products of a query with W keys in W registers, reduced together by sums_of_rows.
    for (int64_t g = 0; g < a.G; g++) {
      const float *query = &s.queries[g * Dp];
      vf dot[W] = {};
      for (int64_t d = 0; d < Dp; d += W) {
        const vf x = load(query + d);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) dot[i] += x * load(rows[i] + d);
      }
      store(&s.scores[g * np + t], sums_of_rows(dot));
    }
  }
  for (int64_t g = 0; g < a.G; g++) {
    float *scores = &s.scores[g * np];
    for (int64_t t = n; t < np; t++) scores[t] = kNone;
    vf most = splat(kNone);
    for (int64_t t = 0; t < np; t += W) most = maximum(load(scores + t), most);
    top[g] = max_lanes(most);
    vf sum = splat(0.0f);
    for (int64_t t = 0; t < np; t += W) {
      const vf e = exponential(load(scores + t) - top[g]);
      store(scores + t, e), sum += e;
    }
    total[g] = sum_lanes(sum);
  }
  std::memset(sums, 0, a.G * Dp * sizeof(float));
  for (int64_t t = 0; t < n; t += W) {
    const int64_t some = std::min<int64_t>(W, n - t);
    rows_of<T>(a, a.v, r, kv, from + t, from + t + some, s.keys.data(), rows);
    for (int64_t g = 0; g < a.G; g++) {
      const float *weights = &s.scores[g * np + t];
      for (int64_t d = 0; d < Dp; d += W) {
        vf sum = load(sums + g * Dp + d);
        for (int64_t i = 0; i < some; i++) sum += splat(weights[i]) * load(rows[i] + d);
        store(sums + g * Dp + d, sum);
      }
    }
  }
}

// Sequences [0, count) of a step, which have one query each: partial attention by (run, kv head), then the merge
// out = sum(e^(top - max top) sums) / sum(e^(top - max top) total) over the runs of a sequence.
void singles(const Paged &a, const View &out, int64_t count, float scale) {
  std::vector<int64_t> first(count + 1, 0);  // number of each sequence's first run
  for (int64_t r = 0; r < count; r++) first[r + 1] = first[r] + (a.lengths[r] + kRun - 1) / kRun;
  const int64_t runs = first[count], width = a.G * (a.Dp + 2);
  Floats parts(runs * a.K * width);
  std::vector<Scratch> scratch(threads_for(runs * a.K, 1));
  parallel_items(runs * a.K, [&](int64_t item, int hand) {
    const int64_t run = item / a.K, kv = item % a.K;
    const int64_t r = std::upper_bound(first.begin(), first.end(), run) - first.begin() - 1;
    const int64_t from = (run - first[r]) * kRun, to = std::min<int64_t>(a.lengths[r], from + kRun);
    float *part = &parts[item * width];
    with_type(a.k.dtype, [&](auto *t) {
      single_run<std::remove_pointer_t<decltype(t)>>(a, r, kv, from, to, scale, part, part + a.G, part + 2 * a.G,
                                                     scratch[hand]);
    });
  });
  Floats row(a.Dp);
  for (int64_t r = 0; r < count; r++)
    for (int64_t h = 0; h < a.H; h++) {
      const int64_t kv = h / a.G, g = h % a.G;
      float top = kNone, total = 0.0f;
      for (int64_t run = first[r]; run < first[r + 1]; run++)
        top = std::max(top, parts[(run * a.K + kv) * width + g]);
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t run = first[r]; run < first[r + 1]; run++) {
        const float *part = &parts[(run * a.K + kv) * width];
        const float share = std::exp(part[g] - top);
        total += part[a.G + g] * share;
        const float *sums = part + 2 * a.G + g * a.Dp;
        for (int64_t d = 0; d < a.Dp; d += W) store(&row[d], load(&row[d]) + load(sums + d) * share);
      }
      const float inverse = 1.0f / total;
      with_type(out.dtype, [&](auto *t) {
        auto *p = out.as<std::remove_pointer_t<decltype(t)>>() + (a.starts[r] * a.H + h) * a.D;
        for (int64_t d = 0; d < a.D; d += W)
          put(p + d, load(&row[d]) * inverse, static_cast<int>(std::min<int64_t>(W, a.D - d)));
      });
    }
}

// All keys or values of one head of a sequence, gathered as float32 [length, Dp].
Rows gathered(const Paged &a, const View &pages, int64_t r, int64_t kv, Floats &room) {
  const int64_t length = a.lengths[r];
  if (static_cast<int64_t>(room.size()) < length * a.Dp) room.resize(length * a.Dp);
  with_type(pages.dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    each_place<T>(a, pages, r, kv, 0, length, [&](int64_t t, const T *p) {
      for (int64_t d = 0; d < a.D; d += W)
        store(&room[t * a.Dp + d], get(p + d, static_cast<int>(std::min<int64_t>(W, a.D - d))));
    });
  });
  Rows rows;
  rows.data = room.data(), rows.stride = a.Dp;
  return rows;
}

View sequence_view(const View &x, int64_t first, int64_t count) {
  View view = x;
  view.data = x.as<char>() + first * x.stride[1] * (x.dtype == F32 ? 4 : 2), view.shape[1] = count;
  return view;
}

// A chunk of a prompt: the S queries of sequence r, causal over its keys: query i attends to [0, length - S + i + 1).
void piece(const Paged &a, const View &out, int64_t r, float scale) {
  const int64_t S = a.queries(r), length = a.lengths[r];
  std::vector<int32_t> ends(2 * S);
  for (int64_t i = 0; i < S; i++) ends[2 * i] = 0, ends[2 * i + 1] = static_cast<int32_t>(length - S + i + 1);
  Floats log_sum_exp(a.H * S);
  const View q = sequence_view(a.q, a.starts[r], S);
  View keys{}, ranges{}, outs[2] = {sequence_view(out, a.starts[r], S), View{}};
  keys.shape[0] = 1, keys.shape[1] = length, keys.shape[2] = a.K, keys.shape[3] = a.D, keys.dtype = a.k.dtype;
  ranges.data = ends.data(), ranges.shape[0] = 1, ranges.shape[1] = S, ranges.shape[2] = 2, ranges.dtype = I32;
  outs[1].data = log_sum_exp.data();
  const View views[] = {q, keys, keys, ranges};
  const Shapes s(q, keys);
  std::vector<Room> rooms(threads_for(a.H * S, 1));
  const int64_t blocks = (S + kQueries - 1) / kQueries;
  parallel_items(a.H * blocks, [&](int64_t item, int hand) {
    const int64_t h = item / blocks, kv = h / a.G;
    Room &room = rooms[hand];
    if (room.head != kv) {
      room.head = kv;
      room.keys = gathered(a, a.k, r, kv, room.k), room.values = gathered(a, a.v, r, kv, room.v);
    }
    const Lanes block = lanes_of_head(s, h, (blocks - 1 - item % blocks) * kQueries);
    with_type(out.dtype, [&](auto *o) {
      forward_block<std::remove_pointer_t<decltype(o)>>(s, views, outs, 0, block, scale, room);
    });
  });
}

}  // namespace

// in: q [1, N, H, D], k, v [1, N, K, D] (D contiguous, other axes strided), all of one dtype; k_pages, v_pages
// [P, size, K, D] of it, in which k and v are stored first; slots int32 [N], starts int32 [R + 1], lengths int32 [R],
// tables int32 [R, M]; out: [1, N, H, D]; scalars: scale of the scores, number of leading sequences with a single query
KERNEL(paged_attention, 9, 1, 2) {
  const Paged a(in);
  const int32_t *slots = in[5].as<int32_t>();
  with_type(a.q.dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int which = 1; which <= 2; which++) {
      const View &x = in[which];
      T *pages = in[which + 2].as<T>();
      for (int64_t i = 0; i < x.shape[1]; i++)
        for (int64_t h = 0; h < a.K; h++)
          std::memcpy(pages + (slots[i] * a.K + h) * a.D, x.as<T>() + i * x.stride[1] + h * x.stride[2], a.D * sizeof(T));
    }
  });
  const float scale = static_cast<float>(scalar[0]);
  const int64_t count = static_cast<int64_t>(scalar[1]);
  if (count) singles(a, out[0], count, scale);
  for (int64_t r = count; r < a.R; r++) piece(a, out[0], r, scale);
}

// in: x [N, K, D] (D contiguous, other axes strided), pages [P, size, K, D] of its dtype, int64 slots [N]: row i is
// stored at place slots[i] % size of page slots[i] / size.
KERNEL(store_rows, 3, 0, 0) {
  const View &x = in[0];
  const int64_t *slots = in[2].as<int64_t>(), K = x.shape[1], D = x.shape[2];
  with_type(x.dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < x.shape[0]; i++)
      for (int64_t h = 0; h < K; h++)
        std::memcpy(in[1].as<T>() + (slots[i] * K + h) * D, x.as<T>() + i * x.stride[0] + h * x.stride[1], D * sizeof(T));
  });
}
