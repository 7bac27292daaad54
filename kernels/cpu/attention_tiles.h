// Attention in matrix tiles (AMX): bfloat16 as it is, float32 as an exact sum of three bfloat16 numbers.
//
// x = x0 + x1 + x2, each part the remainder rounded to 8 bits. A product of two such sums takes the six products of
// parts with i + j < 3; the dropped ones are below 2^-26 of a term, a quarter of float32's rounding. bfloat16 operands
// have one part, and so then have the probabilities and the gradients of the scores, as in the usual fused kernels of
// accelerators; maxima, sums and outputs are float32 in both.
//
// Scores are transposed, [keys, queries], in blocks of 32 x 32: two tiles each way. A tile of the left factor is 16
// rows of 32 elements of k, one of the right factor 16 columns of them; the order of k inside a tile is free if both
// factors have the same one, and pairs are the elements p and p + 16: two vectors of scores give 16 pairs by a shift
// and a blend, without a permutation.
#pragma once

#include <memory>

#include "attention.h"
#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__linux__)
#define ATTENTION_TILES 1

constexpr int64_t kSide = 32;       // rows and columns of a block
constexpr int64_t kWords = 16 * W;  // pairs of a tile
constexpr int64_t kArea = kSide * kSide;

using Words = std::vector<uint32_t, OnLines<uint32_t>>;

inline int64_t sides(int64_t n) { return (n + kSide - 1) / kSide; }

// Pairs (a, b) of the PARTS parts of two vectors, ``kWords`` apart; exact for PARTS = 3.
template <int PARTS>
inline void weave(vf a, vf b, uint32_t *to) {
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; part++) {
    const bool last = part == 2;  // at most 8 bits remain
    const vu ra = (vu)a + (last ? 0u : 0x8000u), rb = (vu)b + (last ? 0u : 0x8000u);
    const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)ra, 16), (__m512i)rb);
    _mm512_store_si512(to + part * kWords, pairs);
    if (part + 1 < PARTS) a -= (vf)(ra & 0xffff0000u), b -= (vf)(rb & 0xffff0000u);
  }
}

// ``weave`` of the four vectors x [two rows 16 apart][two halves of 32 columns]: by columns, each row one row of a left
// factor, ``rows`` and ``rows`` + ``next``; by rows, each half one row of a right factor, ``columns`` and its next tile.
template <int PARTS, bool BOTH>
inline void weave_four(vf (&x)[2][2], uint32_t *rows, int64_t next, uint32_t *columns, int64_t next_column) {
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; part++) {
    vu r[2][2], low[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        r[i][j] = (vu)x[i][j] + (part == 2 ? 0u : 0x8000u), low[i][j] = r[i][j] >> 16;
        if (part + 1 < PARTS) x[i][j] -= (vf)(r[i][j] & 0xffff0000u);
      }
    const auto blend = [](vu a, vu b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)a, (__m512i)b); };
    _mm512_store_si512(rows + part * kWords, blend(low[0][0], r[0][1]));
    _mm512_store_si512(rows + next + part * kWords, blend(low[1][0], r[1][1]));
    if (!BOTH) continue;
    _mm512_store_si512(columns + part * kWords, blend(low[0][0], r[1][0]));
    _mm512_store_si512(columns + next_column + part * kWords, blend(low[0][1], r[1][1]));
  }
}

// c [32, 32] (+)= a b over ``steps`` tiles of k. Tile (i, p) of a factor, of ``PARTS`` tiles, is at i * outer + p * step.
struct Factor {
  const uint32_t *data;
  int64_t outer, step;
};

template <int PARTS>
__attribute__((noinline)) inline void multiply_blocks(const Factor &a, const Factor &b, int64_t steps, float *c, bool add) {
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
  constexpr long kRow = kSide * sizeof(float), kPairs = 64;
  if (add) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + 16, kRow);
    _tile_loadd(2, c + 16 * kSide, kRow);
    _tile_loadd(3, c + 16 * kSide + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < steps; p++) {
    const uint32_t *x = a.data + p * a.step, *y = b.data + p * b.step;
    const auto left = [&](int part) __attribute__((always_inline)) {
      _tile_loadd(4, x + part * kWords, kPairs);
      _tile_loadd(5, x + a.outer + part * kWords, kPairs);
    };
    const auto right = [&](int part) __attribute__((always_inline)) {
      _tile_loadd(6, y + part * kWords, kPairs);
      _tile_loadd(7, y + b.outer + part * kWords, kPairs);
    };
    const auto products = []() __attribute__((always_inline)) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    };
    if constexpr (PARTS == 3) {  // i + j < 3; a factor's tiles in registers serve two products where they can
      left(2), right(0), products();
      left(1), products();
      right(1), products();
      left(0), products();
      right(2), products();
      right(0), products();
    } else {
      left(0), right(0), products();
    }
  }
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + 16 * kSide, kRow);
  _tile_stored(3, c + 16 * kSide + 16, kRow);
  asm volatile("" ::: "memory");
}

// A NaN keeps its kind in ``weave``, whose rounding would carry a full payload over into the sign.
inline vf plain_nan(vf x) { return select(x != x, splat(__builtin_nanf("")), x); }

// The rows [first, first + rows) of one head of a tensor [B, S, H, D] as tiles; what lies outside is zero.
template <int PARTS>
struct Packing {
  const View &x;
  int64_t b, h, last, tiles;  // end of the rows; tiles of 32 along D

  Packing(const View &x, int64_t b, int64_t h, int64_t last) : x(x), b(b), h(h), last(last), tiles(sides(x.shape[3])) {}

  template <typename T>
  vf vector(int64_t row, int64_t d) const {
    const int64_t rest = x.shape[3] - d;
    if (row >= last || rest <= 0) return splat(0.0f);
    const T *p = x.as<T>() + b * x.stride[0] + row * x.stride[1] + h * x.stride[2] + d;
    return plain_nan(get(p, static_cast<int>(std::min<int64_t>(W, rest))));
  }
  static void turn(uint32_t *tile) {  // in place: all rows are read before the first is written
    for (int part = 0; part < PARTS; part++) {
      float *p = reinterpret_cast<float *>(tile + part * kWords);
      transpose_block(p, W, p, W);
    }
  }
  // 32 rows with k along D: to [two tiles of 16 rows][tiles along D], turned for a right factor.
  void along(int64_t row, bool right, uint32_t *to) const {
    with_type(x.dtype, [&](auto *t) {
      using T = std::remove_pointer_t<decltype(t)>;
      for (int64_t half = 0; half < 2; half++)
        for (int64_t p = 0; p < tiles; p++, to += PARTS * kWords) {
          for (int64_t i = 0; i < W; i++)
            weave<PARTS>(vector<T>(row + half * W + i, p * kSide), vector<T>(row + half * W + i, p * kSide + W), to + i * W);
          if (right) turn(to);
        }
    });
  }
  // 32 rows with k along the rows: to [tiles of 16 along D], turned for a left factor.
  void across(int64_t row, bool right, uint32_t *to) const {
    with_type(x.dtype, [&](auto *t) {
      using T = std::remove_pointer_t<decltype(t)>;
      for (int64_t p = 0; p < 2 * tiles; p++, to += PARTS * kWords) {
        for (int64_t i = 0; i < W; i++) weave<PARTS>(vector<T>(row + i, p * W), vector<T>(row + W + i, p * W), to + i * W);
        if (!right) turn(to);
      }
    });
  }
};

// Pairs of 32 rows in either form.
template <int PARTS>
inline int64_t side_words(int64_t D) {
  return sides(D) * 2 * PARTS * kWords;
}
template <int PARTS>
inline Factor along(const uint32_t *data, int64_t D) {
  return {data, sides(D) * PARTS * kWords, PARTS * kWords};
}
template <int PARTS>
inline Factor across(const uint32_t *data, int64_t D) {
  return {data, PARTS * kWords, side_words<PARTS>(D)};
}

// 32 queries of one head from ``start`` on.
inline Lanes side_of_head(const Shapes &s, int64_t h, int64_t start) {
  Lanes lanes = lanes_of_head(s, h, start);
  lanes.n = std::min<int64_t>(lanes.n, kSide), lanes.padded = kSide;
  return lanes;
}

// Keys and values of one kv head: k rows [keys, D], v columns [D, keys].
struct PackedHead {
  Words k, v;
};

constexpr int64_t kKeySides = 8;   // blocks of keys per pass of the softmax: k and v of a pass stay in L2
constexpr int64_t kQuerySides = 8;  // blocks of queries that take a pass in turns

// State of the online softmax of 32 queries of one head; the invariant is that of forward_block in attention.h.
template <int PARTS>
struct QuerySide {
  int64_t h, start;
  std::vector<Visible> visible;  // one
  Words queries;                 // right factor, k along D
  Floats sums;                   // O^T, blocks [D] of [32, queries]
  vf top[2], total[2];

  void begin(const Shapes &s, const View *in, int64_t b, int64_t head, int64_t first) {
    h = head, start = first;
    visible.clear(), visible.emplace_back(in[3], b, side_of_head(s, h, start), s.T);
    queries.resize(side_words<PARTS>(s.D)), sums.assign(sides(s.D) * kArea, 0.0f);
    Packing<PARTS>(in[0], b, h, s.S).along(start, true, queries.data());
    for (int j = 0; j < 2; j++) top[j] = splat(kNone), total[j] = splat(0.0f);
  }
};

template <int PARTS>
struct ForwardRoom {
  QuerySide<PARTS> sides[kQuerySides];
  alignas(64) uint32_t weights[kKeySides * 2 * PARTS * kWords];
  alignas(64) float scores[kKeySides * kArea];
  Floats more;
};

// The keys of ``count`` blocks from block ``from`` on.
template <int PARTS>
void forward_pass(const Shapes &s, const PackedHead &head, int64_t from, int64_t count, float scale,
                  QuerySide<PARTS> &side, ForwardRoom<PARTS> &room) {
  constexpr int64_t kNext = PARTS * kWords, kBlock = 2 * kNext;
  const Visible &visible = side.visible[0];
  const int64_t tiles = sides(s.D), words = side_words<PARTS>(s.D);
  vf most[2] = {side.top[0], side.top[1]}, level[2], shrink[2];
  for (int64_t t = 0; t < count; t++) {
    float *p = room.scores + t * kArea;
    const int64_t key = (from + t) * kSide;
    multiply_blocks<PARTS>(along<PARTS>(head.k.data() + (from + t) * words, s.D), along<PARTS>(side.queries.data(), s.D),
                           tiles, p, false);
    if (!visible.whole(key, key + kSide)) hide(p, kSide, kSide, key, visible, kNone);
    for (int64_t i = 0; i < kSide; i++)
      for (int j = 0; j < 2; j++) most[j] = maximum(load(p + i * kSide + j * W), most[j]);
  }
  for (int j = 0; j < 2; j++) {
    level[j] = select(most[j] == kNone, splat(0.0f), most[j] * scale);  // no visible key so far: e^(-inf - 0) = 0
    shrink[j] = exponential(side.top[j] * scale - level[j]);
    side.top[j] = most[j], side.total[j] *= shrink[j];
  }
  for (int64_t t = 0; t < count; t++) {
    const float *p = room.scores + t * kArea;
    uint32_t *to = room.weights + t * kBlock;
    vf sum[2] = {splat(0.0f), splat(0.0f)};  // a sum per block, added once, as in gemm.h
    for (int64_t i = 0; i < W; i++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const vf first = exponential(load(p + i * kSide + j * W) * scale - level[j]);
        const vf second = exponential(load(p + (i + W) * kSide + j * W) * scale - level[j]);
        sum[j] += first + second;
        weave<PARTS>(first, second, to + j * kNext + i * W);
      }
    side.total[0] += sum[0], side.total[1] += sum[1];
  }
  float *sums = side.sums.data(), *more = room.more.data();
  for (int64_t d = 0; d < tiles; d++)
    multiply_blocks<PARTS>(across<PARTS>(head.v.data() + from * words + d * kBlock, s.D), {room.weights, kNext, kBlock},
                           count, more + d * kArea, false);
  for (int64_t i = 0; i < tiles * kSide; i++)
    for (int j = 0; j < 2; j++) {
      float *p = sums + i * kSide + j * W;
      store(p, load(p) * shrink[j] + load(more + i * kSide + j * W));
    }
}

template <int PARTS, typename O>
void write_side(const Shapes &s, const View *out, int64_t b, float scale, const QuerySide<PARTS> &side) {
  alignas(64) float inverse[kSide], tops[kSide], totals[kSide];
  const int64_t n = std::min(kSide, s.S - side.start);
  for (int j = 0; j < 2; j++) store(tops + j * W, side.top[j] * scale), store(totals + j * W, side.total[j]);
  for (int64_t i = 0; i < n; i++) {
    const float sum = totals[i];
    out[1].as<float>()[(b * s.H + side.h) * s.S + side.start + i] = sum == 0.0f ? kNone : tops[i] + std::log(sum);
    inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
  float square[W * W];
  for (int64_t first = 0; first < n; first += W)
    for (int64_t d = 0; d < s.D; d += W) {
      transpose_block(side.sums.data() + d * kSide + first, kSide, square, W);
      const int some = static_cast<int>(std::min<int64_t>(W, s.D - d));
      for (int64_t l = 0; l < std::min<int64_t>(W, n - first); l++) {
        O *row = out[0].as<O>() + ((b * s.S + side.start + first + l) * s.H + side.h) * s.D;
        put(row + d, load(square + l * W) * inverse[first + l], some);
      }
    }
}

// Output rows and log_sum_exp of ``count`` blocks of queries of kv head ``kv``, number ``item`` and following in the
// order of their queries and then of the heads that share the keys.
template <int PARTS>
void forward_sides(const Shapes &s, const View *in, const View *out, int64_t b, int64_t kv, int64_t item, int64_t count,
                   float scale, const PackedHead &head, ForwardRoom<PARTS> &room) {
  int64_t first = s.T, last = 0;
  for (int64_t i = 0; i < count; i++) {
    room.sides[i].begin(s, in, b, kv * s.G + (item + i) % s.G, (item + i) / s.G * kSide);
    const Visible &visible = room.sides[i].visible[0];
    first = std::min(first, visible.any_first), last = std::max(last, visible.any_last);
  }
  room.more.resize(sides(s.D) * kArea);
  for (int64_t from = first / kSide; from * kSide < last; from += kKeySides)
    for (int64_t i = 0; i < count; i++) {
      // Passes begin at the same keys for all; a block of queries takes the part that it sees.
      const Visible &visible = room.sides[i].visible[0];
      const int64_t begin = std::max(from, visible.any_first / kSide);
      const int64_t end = std::min(from + kKeySides, sides(visible.any_last));
      if (begin < end) forward_pass<PARTS>(s, head, begin, end - begin, scale, room.sides[i], room);
    }
  for (int64_t i = 0; i < count; i++)
    with_type(out[0].dtype, [&](auto *o) {
      write_side<PARTS, std::remove_pointer_t<decltype(o)>>(s, out, b, scale, room.sides[i]);
    });
}

// Whether the products go by tiles: a block of queries must be worth packing, and the level of the softmax is that of
// the largest score only under a positive scale.
inline bool in_tiles(const Shapes &s, float scale) { return s.S >= W && s.T > 0 && scale > 0.0f && has_tiles(); }

template <int PARTS>
void forward_head(const Shapes &s, const View *in, const View *out, int64_t b, int64_t kv, float scale, bool alone,
                  PackedHead &head) {
  const int64_t blocks = sides(s.T), side = side_words<PARTS>(s.D);
  head.k.resize(blocks * side), head.v.resize(blocks * side);
  const Packing<PARTS> k(in[1], b, kv, s.T), v(in[2], b, kv, s.T);
  const auto pack = [&](int64_t i) {
    k.along(i * kSide, false, head.k.data() + i * side), v.across(i * kSide, false, head.v.data() + i * side);
  };
  const int64_t all = sides(s.S) * s.G, items = (all + kQuerySides - 1) / kQuerySides;
  // Causal: the last queries have most keys and start first; the short ones balance the threads at the end.
  const auto attend = [&](int64_t item, ForwardRoom<PARTS> &room) {
    const int64_t first = (items - 1 - item) * kQuerySides;
    forward_sides<PARTS>(s, in, out, b, kv, first, std::min(kQuerySides, all - first), scale, head, room);
  };
  if (alone) {
    const Tiles configured(true);
    auto room = std::make_unique<ForwardRoom<PARTS>>();
    for (int64_t i = 0; i < blocks; i++) pack(i);
    for (int64_t item = 0; item < items; item++) attend(item, *room);
    return;
  }
  parallel(blocks, 8, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; i++) pack(i);
  });
  std::vector<std::unique_ptr<ForwardRoom<PARTS>>> rooms(threads_for(items, 1));
  parallel_items(items, [&](int64_t item, int hand) {
    const Tiles configured(true);
    if (!rooms[hand]) rooms[hand] = std::make_unique<ForwardRoom<PARTS>>();
    attend(item, *rooms[hand]);
  });
}

template <int PARTS>
void forward_tiles(const Shapes &s, const View *in, const View *out, float scale) {
  const int64_t tasks = s.B * s.K;
  if (divides(tasks)) {
    std::vector<PackedHead> heads(threads_for(tasks, 1));
    parallel_items(tasks, [&](int64_t item, int hand) {
      forward_head<PARTS>(s, in, out, item / s.K, item % s.K, scale, true, heads[hand]);
    });
    return;
  }
  PackedHead head;
  for (int64_t item = 0; item < tasks; item++) forward_head<PARTS>(s, in, out, item / s.K, item % s.K, scale, false, head);
}
#endif
