// Gradients of attention in matrix tiles (attention_tiles.h).
//
// P = exp(scale q k - log_sum_exp), dP = dO V^T, dS = P (dP - delta) with delta = rowsum(dO * O); dV += P^T dO,
// dK += scale dS^T Q, dQ += scale dS K. Scores are S^T [keys, queries]: the sums over queries take P^T and dS^T by rows,
// the sum over keys takes dS^T by columns for dQ^T [D, queries], so that nothing is transposed in the inner loop.
#pragma once

#include "attention_tiles.h"

#ifdef ATTENTION_TILES

constexpr int64_t kPassKeys = 4, kPassQueries = 4;  // blocks of a pass: scores and gradients of 128 keys x 128 queries
constexpr int64_t kPartSides = 8;                   // blocks of queries packed at a time, a multiple of kPassQueries

// Queries of one head from ``first`` on, as right factors: q and grad with k along D, and with k along the queries.
template <int PARTS>
struct PackedQueries {
  Words q, grad, q_across, grad_across;
  std::vector<Visible> visible;  // of each block
  int64_t b, h, first, count;    // blocks

  void pack(const Shapes &s, const View *in, int64_t row, int64_t head, int64_t start) {
    const int64_t side = side_words<PARTS>(s.D);
    b = row, h = head, first = start, count = std::min(kPartSides, sides(s.S - start));
    for (Words *words : {&q, &grad, &q_across, &grad_across}) words->resize(kPartSides * side);
    const Packing<PARTS> from_q(in[1], b, h, s.S), from_grad(in[0], b, h, s.S);
    visible.clear();
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = first + i * kSide;
      from_q.along(at, true, q.data() + i * side), from_q.across(at, true, q_across.data() + i * side);
      from_grad.along(at, true, grad.data() + i * side), from_grad.across(at, true, grad_across.data() + i * side);
      visible.emplace_back(in[4], b, side_of_head(s, h, at), s.T);
    }
  }
};

// Left factors of one kv head, by blocks of 32 keys: k and v rows [keys, D], k columns [D, keys]; and the sums of dk and
// dv, blocks [keys][D] of 32 x 32.
struct GradientHead {
  Words k, v, k_across;
  Floats dk, dv;
};

// A thread's buffers. weights, d_scores: P^T and dS^T of one block of keys by rows, [query block]; dS^T by columns, [query
// block][key block].
template <int PARTS>
struct BackwardRoom {
  static constexpr int64_t kBlock = 2 * PARTS * kWords;
  alignas(64) float scores[kArea], d_probabilities[kArea], more[kArea];
  alignas(64) uint32_t weights[kPassQueries * kBlock], d_scores[kPassQueries * kBlock];
  alignas(64) uint32_t by_columns[kPassKeys * kPassQueries * kBlock];
};

// c (+)= a b. In float32, terms of a pass are summed on their own before they are added: a single running sum over
// thousands of queries or keys would accumulate their rounding errors.
template <int PARTS>
inline void accumulate(const Factor &a, const Factor &b, int64_t steps, float *c, float *more) {
  if (PARTS == 1) return multiply_blocks<PARTS>(a, b, steps, c, true);
  multiply_blocks<PARTS>(a, b, steps, more, false);
  for (int64_t i = 0; i < kArea; i += W) store(c + i, load(c + i) + load(more + i));
}

// P^T and dS^T of one block of 32 keys and 32 queries, from S^T and dP^T in ``room``, woven into the factors.
template <int PARTS>
inline void weigh(BackwardRoom<PARTS> &room, const vf *level, const vf *mean, float scale, uint32_t *weights,
                  uint32_t *d_scores, uint32_t *by_columns) {
  constexpr int64_t kNext = PARTS * kWords;
  for (int64_t i = 0; i < W; i++) {
    vf p[2][2], d[2][2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const int64_t at = (i + r * W) * kSide + j * W;
        p[r][j] = exponential(load(room.scores + at) * scale - level[j]);
        d[r][j] = p[r][j] * (load(room.d_probabilities + at) - mean[j]);
      }
    weave_four<PARTS, false>(p, weights + i * W, kNext, nullptr, 0);
    weave_four<PARTS, true>(d, d_scores + i * W, kNext, by_columns + i * W, kNext);
  }
}

// Contributions of up to kPassKeys blocks of keys from block ``from`` on and kPassQueries blocks of queries from block
// ``start`` of ``part`` on; dq: blocks [queries][D] of dQ^T [D, queries] of the part.
template <int PARTS>
void backward_pass(const Shapes &s, const View *in, const PackedQueries<PARTS> &part, GradientHead &head, int64_t from,
                   int64_t start, float scale, float *dq, BackwardRoom<PARTS> &room) {
  constexpr int64_t kBlock = BackwardRoom<PARTS>::kBlock;
  const int64_t tiles = sides(s.D), side = side_words<PARTS>(s.D);
  const int64_t keys = std::min(kPassKeys, sides(s.T) - from), queries = std::min(kPassQueries, part.count - start);
  bool seen[kPassQueries][kPassKeys], any = false;
  for (int64_t g = 0; g < queries; g++)
    for (int64_t t = 0; t < keys; t++)
      any |= seen[g][t] = !part.visible[start + g].none((from + t) * kSide, (from + t + 1) * kSide);
  if (!any) return;
  constexpr int64_t kNext = PARTS * kWords;
  vf level[kPassQueries][2], mean[kPassQueries][2];
  for (int64_t g = 0; g < queries; g++)
    for (int j = 0; j < 2; j++) {
      const int64_t row = part.first + (start + g) * kSide + j * W, at = (part.b * s.H + part.h) * s.S + row;
      const int rest = static_cast<int>(std::min<int64_t>(W, std::max<int64_t>(0, s.S - row)));
      const vf lse = plain_nan(get(in[5].as<float>() + at, rest));
      level[g][j] = select(lse == kNone, splat(0.0f), lse), mean[g][j] = plain_nan(get(in[6].as<float>() + at, rest));
    }
  for (int64_t t = 0; t < keys; t++) {
    int64_t first = queries, last = 0;
    for (int64_t g = 0; g < queries; g++)
      if (seen[g][t]) first = std::min(first, g), last = g + 1;
    const int64_t key = (from + t) * kSide;
    for (int64_t g = 0; g < queries; g++) {
      uint32_t *weights = room.weights + g * kBlock, *d_scores = room.d_scores + g * kBlock;
      uint32_t *by_columns = room.by_columns + (g * kPassKeys + t) * kBlock;
      if (!seen[g][t]) {
        for (uint32_t *zeros : {weights, d_scores, by_columns}) std::memset(zeros, 0, kBlock * sizeof(uint32_t));
        continue;
      }
      const Visible &visible = part.visible[start + g];
      const int64_t at = (start + g) * side, keys_at = (from + t) * side;
      multiply_blocks<PARTS>(along<PARTS>(head.k.data() + keys_at, s.D), along<PARTS>(part.q.data() + at, s.D), tiles,
                             room.scores, false);
      multiply_blocks<PARTS>(along<PARTS>(head.v.data() + keys_at, s.D), along<PARTS>(part.grad.data() + at, s.D), tiles,
                             room.d_probabilities, false);
      if (!visible.whole(key, key + kSide)) hide(room.scores, kSide, kSide, key, visible, kNone);
      weigh<PARTS>(room, level[g], mean[g], scale, weights, d_scores, by_columns);
    }
    if (first >= last) continue;
    const Factor weights{room.weights + first * kBlock, kNext, kBlock};
    const Factor d_scores{room.d_scores + first * kBlock, kNext, kBlock};
    for (int64_t d = 0; d < tiles; d++) {
      const int64_t right = (start + first) * side + d * kBlock, c = ((from + t) * tiles + d) * kArea;
      const Factor grad = across<PARTS>(part.grad_across.data() + right, s.D);
      accumulate<PARTS>(weights, grad, last - first, head.dv.data() + c, room.more);
      const Factor q = across<PARTS>(part.q_across.data() + right, s.D);
      accumulate<PARTS>(d_scores, q, last - first, head.dk.data() + c, room.more);
    }
  }
  for (int64_t g = 0; g < queries; g++) {
    int64_t first = keys, last = 0;
    for (int64_t t = 0; t < keys; t++)
      if (seen[g][t]) first = std::min(first, t), last = t + 1;
    if (first >= last) continue;
    const Factor d_scores{room.by_columns + (g * kPassKeys + first) * kBlock, kNext, kBlock};
    for (int64_t d = 0; d < tiles; d++) {
      const Factor k = across<PARTS>(head.k_across.data() + (from + first) * side + d * kBlock, s.D);
      accumulate<PARTS>(k, d_scores, last - first, dq + ((start + g) * tiles + d) * kArea, room.more);
    }
  }
}

// Blocks [rows][D] of 32 x 32 of sums to rows of one head of a contiguous tensor, times ``scale``; with ``turned`` the
// blocks are [D, rows].
inline void write_blocks(const View &out, int64_t b, int64_t h, int64_t first, int64_t rows, const float *sums, float scale,
                         bool turned) {
  const int64_t S = out.shape[1], H = out.shape[2], D = out.shape[3], tiles = sides(D);
  with_type(out.dtype, [&](auto *t) {
    auto *to = out.as<std::remove_pointer_t<decltype(t)>>() + ((b * S + first) * H + h) * D;
    float square[W * W];
    for (int64_t row = 0; row < rows; row += W)
      for (int64_t d = 0; d < D; d += W) {
        const float *block = sums + (row / kSide * tiles + d / kSide) * kArea;
        const float *from = block + row % kSide * kSide + d % kSide;
        if (turned) transpose_block(block + d % kSide * kSide + row % kSide, kSide, square, W), from = square;
        const int n = static_cast<int>(std::min<int64_t>(W, D - d));
        for (int64_t i = 0; i < std::min<int64_t>(W, rows - row); i++)
          put(to + (row + i) * H * D + d, load(from + i * (turned ? W : kSide)) * scale, n);
      }
  });
}

// Gradients of one kv head and of the G query heads that share it. The blocks of keys are dealt to ``hands`` in turns;
// dk and dv of a block belong to one hand, dq is the sum of the hands' in their order. Their number does not depend on
// that of the threads, nor do the bits.
template <int PARTS>
void backward_head(const Shapes &s, const View *in, const View *out, int64_t b, int64_t kv, float scale, int64_t hands,
                   bool alone, GradientHead &head) {
  const int64_t blocks = sides(s.T), side = side_words<PARTS>(s.D), tiles = sides(s.D);
  for (Words *words : {&head.k, &head.v, &head.k_across}) words->resize(blocks * side);
  for (Floats *sums : {&head.dk, &head.dv}) sums->assign(blocks * tiles * kArea, 0.0f);
  const Packing<PARTS> k(in[2], b, kv, s.T), v(in[3], b, kv, s.T);
  for (int64_t i = 0; i < blocks; i++) {
    k.along(i * kSide, false, head.k.data() + i * side), v.along(i * kSide, false, head.v.data() + i * side);
    k.across(i * kSide, false, head.k_across.data() + i * side);
  }
  PackedQueries<PARTS> part;
  std::vector<Floats> dq(hands);
  const int64_t passes = (blocks + kPassKeys - 1) / kPassKeys;
  std::vector<std::unique_ptr<BackwardRoom<PARTS>>> rooms(alone ? 1 : threads_for(hands, 1));
  const auto work = [&](int64_t hand, int thread) {
    const Tiles configured(true);
    if (!rooms[thread]) rooms[thread] = std::make_unique<BackwardRoom<PARTS>>();
    dq[hand].assign(part.count * tiles * kArea, 0.0f);
    for (int64_t pass = hand; pass < passes; pass += hands)
      for (int64_t start = 0; start < part.count; start += kPassQueries)
        backward_pass<PARTS>(s, in, part, head, pass * kPassKeys, start, scale, dq[hand].data(), *rooms[thread]);
  };
  for (int64_t h = kv * s.G; h < (kv + 1) * s.G; h++)
    for (int64_t first = 0; first < s.S; first += kPartSides * kSide) {
      part.pack(s, in, b, h, first);
      if (alone)
        for (int64_t hand = 0; hand < hands; hand++) work(hand, 0);
      else
        parallel_items(hands, work);
      for (int64_t hand = 1; hand < hands; hand++)
        for (int64_t i = 0; i < part.count * tiles * kArea; i += W)
          store(&dq[0][i], load(&dq[0][i]) + load(&dq[hand][i]));
      write_blocks(out[0], b, h, first, std::min(s.S - first, kPartSides * kSide), dq[0].data(), scale, true);
    }
  write_blocks(out[1], b, kv, 0, s.T, head.dk.data(), scale, false);
  write_blocks(out[2], b, kv, 0, s.T, head.dv.data(), 1.0f, false);
}

template <int PARTS>
void backward_tiles(const Shapes &s, const View *in, const View *out, float scale, int64_t hands) {
  const int64_t tasks = s.B * s.K;
  if (divides(tasks)) {
    std::vector<GradientHead> heads(threads_for(tasks, 1));
    parallel_items(tasks, [&](int64_t item, int thread) {
      backward_head<PARTS>(s, in, out, item / s.K, item % s.K, scale, hands, true, heads[thread]);
    });
    return;
  }
  GradientHead head;
  for (int64_t item = 0; item < tasks; item++)
    backward_head<PARTS>(s, in, out, item / s.K, item % s.K, scale, hands, false, head);
}
#endif
