// Blocked attention over float32 keys and values, shared by sequences (attention.cc) and pages (paged.cc).
//
// Queries are vector lanes. A block holds up to 64 queries, transposed: Q^T [D, queries]. Scores are S^T [keys,
// queries], so the maximum and the sum of a query run down a column, without horizontal sums, and the output
// accumulates as O^T [D, queries]; keys and values are read in place, neither packed nor repeated. Query i of batch row
// b attends to the keys [range[b, i, 0], range[b, i, 1]); blocks of keys without a visible one are skipped. (Online
// softmax: Milakov and Gimelshein, arXiv 1805.02867; blocks and backward: Dao et al., arXiv 2205.14135.)
#pragma once

#include "gemm.h"
#include "types.h"

// A block's scores, 96 keys x 64 queries of float32, take 24 KiB and fit in a 32 KiB first-level cache. 96 keys are 8
// register tiles of 12 rows, 64 queries 2 pairs of 16-lane vectors (gemm.h).
constexpr int64_t kQueries = 64, kKeys = 96;
constexpr float kNone = -INFINITY;  // score of a hidden key, log_sum_exp of a query without visible keys

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Rows [first, first + rows) of one head as float32 with D padded to whole vectors: in place where the tensor has that
// form, else copied to ``room``. ``together``: contiguous, without other heads between them. In a tensor the rows of a
// head are a power of two apart and map to the same few cache sets and each to a page of its own, which slows a product
// over many rows.
struct Rows {
  const float *data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  // The rows from ``first`` on, which may be one beyond the last.
  Rows from(int64_t first) const {
    Rows rest;
    rest.data = data + first * stride, rest.stride = stride;
    return rest;
  }
  // Brings a row's line with element d into the second cache; an address that is not readable does nothing.
  void fetch(int64_t row, int64_t d) const { __builtin_prefetch(data + row * stride + d, 0, 2); }
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

// The (head, query) pairs in the lanes of a block: queries of one head, or, for few queries, of all heads of a kv head.
struct Lanes {
  int64_t n, padded;
  int32_t head[kQueries], query[kQueries];
};

// out [D, lanes] = scale * x [B, S, H, D] of the lanes, transposed in W x W blocks; unused lanes are zero.
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

// Numbers from ``begin`` to ``end`` - 1; none where begin >= end.
struct Span {
  int64_t begin, end;
};

// Key ranges of a block of queries, with an interval [any_first, any_last) that contains all of them and their
// intersection [all_first, all_last).
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
    for (int64_t q = lanes.n; q < lanes.padded; q++) first[q] = last[q] = 0;  // unused lanes
  }
  // The lanes between which all those lie that see a key of [from, to).
  Span seeing(int64_t from, int64_t to, int64_t lanes) const {
    if (whole(from, to)) return {0, lanes};
    Span found{lanes, 0};
    for (int64_t q = 0; q < lanes; q++)
      if (std::max<int64_t>(first[q], from) < std::min<int64_t>(last[q], to)) found = {std::min(found.begin, q), q + 1};
    return found;
  }
  // The keys of [from, to) between which all those lie that one of ``lanes`` sees.
  Span seen(Span lanes, int64_t from, int64_t to) const {
    if (whole(from, to)) return {from, to};
    Span found{to, from};
    for (int64_t q = lanes.begin; q < lanes.end; q++) {
      const int64_t a = std::max<int64_t>(first[q], from), b = std::min<int64_t>(last[q], to);
      if (a < b) found = {std::min(found.begin, a), std::max(found.end, b)};
    }
    return found;
  }
  bool whole(int64_t from, int64_t to) const { return all_first <= from && to <= all_last; }
  bool none(int64_t from, int64_t to) const { return to <= any_first || any_last <= from; }
};

// Set the scores [keys, lanes] of hidden keys to ``value``; row t is key from + t.
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

// The columns of a tile's pairs of vectors that hold ``lanes``.
inline Span in_pairs(Span lanes, int64_t padded_lanes) {
  return {lanes.begin / (2 * W) * (2 * W), std::min(padded_lanes, (lanes.end + 2 * W - 1) / (2 * W) * (2 * W))};
}

// scores [keys, lanes] = x [keys, D] ``across`` [D, lanes] for the keys [from, from + keys), x the first one's row: only
// the tiles with a visible score; the others stay as they are.
inline void visible_scores(const Visible &visible, int64_t keys, int64_t lanes, int64_t D, int64_t from, const float *x,
                           int64_t stride, const float *across, float *scores) {
  if (visible.whole(from, from + keys)) return gemm(keys, lanes, D, x, stride, 1, across, lanes, scores, lanes, false);
  for (int64_t t = 0; t < keys; t += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, keys - t);
    const Span some = in_pairs(visible.seeing(from + t, from + t + rows, lanes), lanes);
    if (some.begin < some.end)
      gemm(rows, some.end - some.begin, D, x + t * stride, stride, 1, across + some.begin, lanes,
           scores + t * lanes + some.begin, lanes, false);
  }
}

// B batch, S queries, H heads, D head dim, T keys, K kv heads, G = H / K query heads per kv head, Dp: D in whole
// vectors.
struct Shapes {
  int64_t B, S, H, D, T, K, G, Dp;
  Shapes(const View &q, const View &k)
      : B(q.shape[0]), S(q.shape[1]), H(q.shape[2]), D(q.shape[3]), T(k.shape[1]), K(k.shape[2]), G(H / K),
        Dp(padded(D)) {}
};

// Threads divide the kv heads where that balances, else the work inside each: whether ``tasks`` equal ones do.
inline bool divides(int64_t tasks) {
  const int64_t threads = threads_for(tasks, 1), most = threads_for(int64_t{1} << 30, 1);
  return threads == most && (tasks % most == 0 || tasks >= 8 * most);
}

// Number of sums of dq in the backward pass, at most one per 512 keys: work for several threads where there are few kv
// heads.
inline int64_t hands_for(const Shapes &s) {
  const int64_t tasks = std::max<int64_t>(1, s.B * s.K);
  return std::max<int64_t>(1, std::min(s.T / 512, (8 + tasks - 1) / tasks));
}

// Buffers of one thread, kept between blocks; ``keys`` and ``values`` are those of (batch, kv head) number ``head``.
struct Room {
  Floats k, v, q, grad, queries, grads, scores, d_scores, out, dk, dv;
  Rows keys, values;
  int64_t head = -1;
};

inline Lanes lanes_of_head(const Shapes &s, int64_t h, int64_t start) {
  Lanes lanes;
  lanes.n = std::min(kQueries, s.S - start), lanes.padded = padded(lanes.n);
  for (int64_t l = 0; l < lanes.n; l++)
    lanes.head[l] = static_cast<int32_t>(h), lanes.query[l] = static_cast<int32_t>(start + l);
  return lanes;
}

// The pairs (head, query) number ``first`` and following of the G heads of kv head ``kv``, head by head.
inline Lanes lanes_of_group(const Shapes &s, int64_t kv, int64_t first) {
  Lanes lanes;
  lanes.n = std::min(kQueries, s.G * s.S - first), lanes.padded = padded(lanes.n);
  for (int64_t l = 0; l < lanes.n; l++) {
    lanes.head[l] = static_cast<int32_t>(kv * s.G + (first + l) / s.S);
    lanes.query[l] = static_cast<int32_t>((first + l) % s.S);
  }
  return lanes;
}

// Running softmax of one block of queries. Invariant after each block of keys, per lane and over the keys so far, with
// scores s in units of ln 2: top = max(s), total = sum(2^(s - top)), sums [D, lanes] = sum(2^(s - top) v).
struct Softmax {
  alignas(64) float top[kQueries], total[kQueries];
  float *sums;

  // Scores [keys, lanes] become 2^(s - top), and what was summed before is scaled to the new maximum. On the way the
  // rows of the next block of keys and values (``next``, whose addresses need not be readable) come into the second
  // cache: those of one head lie apart in memory, which the processor does not foresee.
  void add(float *scores, int64_t keys, int64_t lanes, int64_t D, const Rows *next) {
    for (int64_t j = 0; j < lanes; j += W) {
      const vf before = load(top + j);
      vf most = before, other = before;  // two chains of maxima
      int64_t t = 0;
      for (; t + 2 <= keys; t += 2) {
        most = maximum(load(scores + t * lanes + j), most);
        other = maximum(load(scores + (t + 1) * lanes + j), other);
      }
      if (t < keys) most = maximum(load(scores + t * lanes + j), most);
      most = maximum(other, most);
      const vf level = select(most == kNone, splat(0.0f), most);  // no visible key so far: 2^(-inf - 0) = 0, not NaN
      const vf shrink = power_of_two(before - level);  // the factor of earlier sums under the new maximum
      vf sum = splat(0.0f);  // a sum per block, added once, as in gemm.h
      for (t = 0; t < keys; t++) {
        float *p = scores + t * lanes + j;
        const vf e = power_of_two(load(p) - level);
        store(p, e);
        sum += e;
        for (int64_t d = j; d < D; d += lanes) next[0].fetch(t, d), next[1].fetch(t, d);
      }
      store(total + j, load(total + j) * shrink + sum), store(top + j, most);
      for (int64_t d = 0; d < D; d++) store(sums + d * lanes + j, load(sums + d * lanes + j) * shrink);
    }
  }
};

// Output rows and log_sum_exp of one block of queries.
template <typename O>
void forward_block(const Shapes &s, const View *in, const View *out, int64_t b, const Lanes &block, float scale,
                   Room &room) {
  const Rows &k = room.keys, &v = room.values;
  const int64_t lanes = block.padded;
  room.queries.resize(s.Dp * kQueries), room.scores.resize(kKeys * kQueries), room.out.resize(s.Dp * kQueries);
  float *queries = room.queries.data(), *scores = room.scores.data(), *sums = room.out.data();
  transpose(in[0], b, block, scale * kLog2E, queries);
  const Visible visible(in[3], b, block, s.T);
  Softmax softmax;
  softmax.sums = sums;
  float *top = softmax.top, *total = softmax.total;
  for (int64_t i = 0; i < lanes; i++) top[i] = kNone, total[i] = 0.0f;
  std::memset(sums, 0, s.D * lanes * sizeof(float));
  for (int64_t from = visible.any_first; from < visible.any_last; from += kKeys) {
    const int64_t keys = std::min(kKeys, visible.any_last - from);
    // S^T [keys, lanes] = K [keys, D] Q^T [D, lanes]; the scale is in Q^T.
    visible_scores(visible, keys, lanes, s.D, from, k.data + from * k.stride, k.stride, queries, scores);
    if (!visible.whole(from, from + keys)) hide(scores, keys, lanes, from, visible, kNone);
    const Rows next[2] = {k.from(from + keys), v.from(from + keys)};
    softmax.add(scores, keys, lanes, s.D, next);
    // O^T [D, lanes] += V^T [D, keys] P^T [keys, lanes]: V is read transposed by its strides. Hidden keys at the ends
    // have probability 0 and are left out.
    const int64_t side = visible.whole(from, from + keys) ? lanes : 2 * W;
    for (int64_t j = 0; j < lanes; j += side) {
      const Span some = visible.seen({j, std::min(lanes, j + side)}, from, from + keys);
      if (some.begin < some.end)
        gemm(s.D, std::min(side, lanes - j), some.end - some.begin, v.data + some.begin * v.stride, 1, v.stride,
             scores + (some.begin - from) * lanes + j, lanes, sums + j, lanes, true);
    }
  }
  for (int64_t i = 0; i < block.n; i++) {
    const int64_t h = block.head[i], query = block.query[i];
    out[1].as<float>()[(b * s.H + h) * s.S + query] =
      total[i] == 0.0f ? kNone : static_cast<float>(top[i] * M_LN2 + std::log(total[i]));
    const float inverse = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
    top[i] = inverse;
  }
  // O^T / total back to rows [query, head, D] in W x W blocks.
  float square[W * W];
  for (int64_t first = 0; first < block.n; first += W)
    for (int64_t d = 0; d < s.D; d += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, s.D - d));
      transpose_block(sums + d * lanes + first, lanes, square, W);  // rows beyond D are not stored
      for (int64_t l = 0; l < std::min<int64_t>(W, block.n - first); l++) {
        O *row = out[0].as<O>() + ((b * s.S + block.query[first + l]) * s.H + block.head[first + l]) * s.D;
        put(row + d, load(square + l * W) * top[first + l], n);
      }
    }
}
