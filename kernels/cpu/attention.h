// What attention over a sequence and attention over pages share: a block of queries against keys and values as floats.
//
// Queries are lanes. A block holds up to 64 queries of one head side by side, transposed: Q^T [D, queries]. Scores come
// out as S^T [keys, queries], so the largest score and the sum of a query run down a column, without sums across lanes,
// and the output accumulates as O^T [D, queries]; keys and values are used as they lie in memory. Query i of row b sees
// the keys [range[b, i, 0], range[b, i, 1]); blocks of keys that no query of a block sees are never touched.
// (Online softmax: Milakov and Gimelshein, arXiv 1805.02867; blocks and backward: Dao et al., arXiv 2205.14135.)
#pragma once

#include "gemm.h"
#include "types.h"

constexpr int64_t kQueries = 64, kKeys = 96;
constexpr float kNone = -INFINITY;

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Rows [first, first + rows) of one head as floats with D padded to whole vectors: the tensor itself where it is that.
// ``together``: without other heads between them. A product that takes whole rows wants them so: those of a tensor begin
// a power of two apart, each in a page of its own and all in the same few lines of the nearest cache.
struct Rows {
  const float *data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  Rows(const View &x, int64_t b, int64_t h, int64_t first, int64_t rows, Floats &room,
       bool together = false) {
    const int64_t D = x.shape[3], at = b * x.stride[0] + first * x.stride[1] + h * x.stride[2];
    if (x.dtype == F32 && D % W == 0 && (!together || x.stride[1] == D)) {
      data = x.as<float>() + at, stride = x.stride[1];
      return;
    }
    stride = padded(D);
    if (static_cast<int64_t>(room.size()) < rows * stride) room.resize(rows * stride);
    data = room.data();
    with_type(x.dtype, [&](auto *t) {
      const auto *p = x.as<std::remove_pointer_t<decltype(t)>>() + at;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < D; i += W)
          store(&room[r * stride + i], get(p + r * x.stride[1] + i, static_cast<int>(std::min<int64_t>(W, D - i))));
    });
  }
};

// The queries of a block, side by side in the lanes: of one head, or, where a head has few, of all heads that share keys.
struct Lanes {
  int64_t n, padded;
  int32_t head[kQueries], query[kQueries];
};

// x [B, S, H, D] times ``scale`` into out [D, lanes], lanes of no query zero.
inline void transpose(const View &x, int64_t b, const Lanes &lanes, float scale, float *out) {
  const int64_t D = x.shape[3];
  with_type(x.dtype, [&](auto *t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T *p = x.as<T>() + b * x.stride[0];
    float square[W * W];
    for (int64_t first = 0; first < lanes.n; first += W) {
      const int64_t some = std::min<int64_t>(W, lanes.n - first);
      for (int64_t d = 0; d < D; d += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, D - d));
        for (int64_t l = 0; l < W; l++) {
          const int64_t lane = first + l;
          if (l < some)
            store(square + l * W, get(p + lanes.query[lane] * x.stride[1] + lanes.head[lane] * x.stride[2] + d, n) * scale);
          else
            store(square + l * W, splat(0.0f));
        }
        if (n == W) {
          transpose_block(square, W, out + d * lanes.padded + first, lanes.padded);
          continue;
        }
        for (int64_t i = 0; i < n; i++)
          for (int64_t l = 0; l < W; l++) out[(d + i) * lanes.padded + first + l] = square[l * W + i];
      }
    }
  });
}

// The key ranges of a block of queries, and what all and any of its queries see.
struct Visible {
  alignas(64) int32_t first[kQueries], last[kQueries];
  int64_t any_first, any_last, all_first, all_last;

  Visible(const View &ranges, int64_t b, const Lanes &lanes, int64_t keys) {
    const int32_t *p = ranges.as<int32_t>() + (ranges.shape[0] == 1 ? 0 : b) * ranges.shape[1] * 2;
    any_first = keys, any_last = 0, all_first = 0, all_last = keys;
    for (int64_t q = 0; q < lanes.n; q++) {
      first[q] = std::max<int32_t>(0, p[2 * lanes.query[q]]);
      last[q] = std::max<int32_t>(first[q], std::min<int64_t>(keys, p[2 * lanes.query[q] + 1]));
      all_first = std::max<int64_t>(all_first, first[q]), all_last = std::min<int64_t>(all_last, last[q]);
      if (first[q] < last[q]) {
        any_first = std::min<int64_t>(any_first, first[q]), any_last = std::max<int64_t>(any_last, last[q]);
      }
    }
    for (int64_t q = lanes.n; q < lanes.padded; q++) first[q] = last[q] = 0;  // lanes of no query
  }
  bool whole(int64_t from, int64_t to) const { return all_first <= from && to <= all_last; }
  bool none(int64_t from, int64_t to) const { return to <= any_first || any_last <= from; }
};

// Scores of hidden keys to ``value``: scores [keys, lanes] of the keys from ``from`` on.
inline void hide(float *scores, int64_t keys, int64_t lanes, int64_t from, const Visible &visible, float value) {
  for (int64_t j = 0; j < lanes; j += W) {
    vi first, last;
    std::memcpy(&first, visible.first + j, sizeof first);
    std::memcpy(&last, visible.last + j, sizeof last);
    for (int64_t t = 0; t < keys; t++) {
      const vi key = splat_int(static_cast<int32_t>(from + t));
      float *p = scores + t * lanes + j;
      store(p, select((key >= first) & (key < last), load(p), splat(value)));
    }
  }
}

struct Shapes {
  int64_t B, S, H, D, T, K, G, Dp;
  Shapes(const View &q, const View &k)
      : B(q.shape[0]), S(q.shape[1]), H(q.shape[2]), D(q.shape[3]), T(k.shape[1]), K(k.shape[2]), G(H / K),
        Dp(padded(D)) {}
};

struct Room {
  Floats k, v, q, grad, queries, grads, scores, d_scores, out, dk, dv;
  Rows keys, values;
  int64_t head = -1;  // whose keys and values they are
};

inline Lanes lanes_of_head(const Shapes &s, int64_t h, int64_t start) {
  Lanes lanes;
  lanes.n = std::min(kQueries, s.S - start), lanes.padded = padded(lanes.n);
  for (int64_t l = 0; l < lanes.n; l++)
    lanes.head[l] = static_cast<int32_t>(h), lanes.query[l] = static_cast<int32_t>(start + l);
  return lanes;
}

// The pairs (head, query) from ``first`` on of the heads that share keys and values.
inline Lanes lanes_of_group(const Shapes &s, int64_t kv, int64_t first) {
  Lanes lanes;
  lanes.n = std::min(kQueries, s.G * s.S - first), lanes.padded = padded(lanes.n);
  for (int64_t l = 0; l < lanes.n; l++) {
    lanes.head[l] = static_cast<int32_t>(kv * s.G + (first + l) / s.S);
    lanes.query[l] = static_cast<int32_t>((first + l) % s.S);
  }
  return lanes;
}

// Output rows and log-sum-exps of one block of queries.
template <typename O>
void forward_block(const Shapes &s, const View *in, const View *out, int64_t b, const Lanes &block, float scale,
                   Room &room) {
  const Rows &k = room.keys, &v = room.values;
  const int64_t lanes = block.padded;
  room.queries.resize(s.Dp * kQueries), room.scores.resize(kKeys * kQueries), room.out.resize(s.Dp * kQueries);
  float *queries = room.queries.data(), *scores = room.scores.data(), *sums = room.out.data();
  transpose(in[0], b, block, scale, queries);
  const Visible visible(in[3], b, block, s.T);
  alignas(64) float top[kQueries], total[kQueries];
  for (int64_t i = 0; i < lanes; i++) top[i] = kNone, total[i] = 0.0f;
  std::memset(sums, 0, s.D * lanes * sizeof(float));
  for (int64_t from = visible.any_first; from < visible.any_last; from += kKeys) {
    const int64_t keys = std::min(kKeys, visible.any_last - from);
    gemm(keys, lanes, s.D, k.data + from * k.stride, k.stride, 1, queries, lanes, scores, lanes, false);
    if (!visible.whole(from, from + keys)) hide(scores, keys, lanes, from, visible, kNone);
    for (int64_t j = 0; j < lanes; j += W) {
      const vf before = load(top + j);
      vf most = before;
      for (int64_t t = 0; t < keys; t++) most = maximum(load(scores + t * lanes + j), most);
      const vf level = select(most == kNone, splat(0.0f), most);  // nothing seen yet: e^-inf, not e^NaN
      const vf shrink = exponential(before - level);
      vf sum = splat(0.0f);  // of this block alone, as in gemm.h
      for (int64_t t = 0; t < keys; t++) {
        float *p = scores + t * lanes + j;
        const vf e = exponential(load(p) - level);
        store(p, e);
        sum += e;
      }
      store(total + j, load(total + j) * shrink + sum), store(top + j, most);
      for (int64_t d = 0; d < s.D; d++) store(sums + d * lanes + j, load(sums + d * lanes + j) * shrink);
    }
    gemm(s.D, lanes, keys, v.data + from * v.stride, 1, v.stride, scores, lanes, sums, lanes, true);
  }
  for (int64_t i = 0; i < block.n; i++) {
    const int64_t h = block.head[i], query = block.query[i];
    out[1].as<float>()[(b * s.H + h) * s.S + query] = total[i] == 0.0f ? kNone : top[i] + std::log(total[i]);
    const float inverse = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
    top[i] = inverse;
  }
  float square[W * W];
  for (int64_t first = 0; first < block.n; first += W)
    for (int64_t d = 0; d < s.D; d += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, s.D - d));
      transpose_block(sums + d * lanes + first, lanes, square, W);  // beyond D: room that nobody reads
      for (int64_t l = 0; l < std::min<int64_t>(W, block.n - first); l++) {
        O *row = out[0].as<O>() + ((b * s.S + block.query[first + l]) * s.H + block.head[first + l]) * s.D;
        put(row + d, load(square + l * W) * top[first + l], n);
      }
    }
}
