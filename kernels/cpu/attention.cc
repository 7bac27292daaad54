// Attention forward and backward in blocks, with memory linear in the sequence lengths: by matrix tiles
// (attention_tiles.h) where the processor has them and the system grants their state, else by vectors (attention.h).
#include <memory>

#include "attention_tiles_backward.h"

namespace {

// Float32 accumulator of the rows of one head of a contiguous output: the output itself where it is float32 with D in
// whole vectors, else a buffer that ``write`` rounds into the output.
struct Sums {
  float *data;
  int64_t stride;

  Sums(const View &out, int64_t b, int64_t h, Floats &room) : out_(out), b_(b), h_(h) {
    const int64_t rows = out.shape[1], heads = out.shape[2], D = out.shape[3];
    direct_ = out.dtype == F32 && D % W == 0;
    if (direct_) {
      data = out.as<float>() + (b * rows * heads + h) * D, stride = heads * D;
      for (int64_t r = 0; r < rows; r++) std::memset(data + r * stride, 0, D * sizeof(float));
    } else {
      room.assign(rows * padded(D), 0.0f);
      data = room.data(), stride = padded(D);
    }
  }
  void write() const {
    if (direct_) return;
    const int64_t rows = out_.shape[1], heads = out_.shape[2], D = out_.shape[3];
    with_type(out_.dtype, [&](auto *t) {
      auto *p = out_.as<std::remove_pointer_t<decltype(t)>>() + (b_ * rows * heads + h_) * D;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < D; i += W)
          put(p + r * heads * D + i, load(data + r * stride + i), static_cast<int>(std::min<int64_t>(W, D - i)));
    });
  }

 private:
  const View &out_;
  int64_t b_, h_;
  bool direct_;
};

// Queries gathered and transposed at a time, a multiple of kQueries: with D = 64 they take half a second cache of 1 MiB.
constexpr int64_t kPart = 512;

// Queries [first, last) of one head in the backward pass. ``k``, ``v``: rows [T, D] of its kv head; ``q``, ``grad``: rows
// [queries, D]; ``queries``, ``grads``: the same transposed block by block, [blocks][D, lanes].
struct Part {
  int64_t b, h, first, last;
  Rows k, v, q, grad;
  const float *queries, *grads;
  const Visible *visible;  // of the blocks of all queries of the batch row
};

// What the blocks of queries of every batch row see, or of one for all; found once, as each block meets all blocks of
// keys of all heads.
struct Sights {
  int64_t blocks;
  bool shared;
  std::vector<Visible> found;

  Sights(const Shapes &s, const View &ranges)
      : blocks((s.S + kQueries - 1) / kQueries), shared(ranges.shape[0] == 1) {
    for (int64_t b = 0; b < (shared ? 1 : s.B); b++)
      for (int64_t start = 0; start < s.S; start += kQueries)
        found.emplace_back(ranges, b, lanes_of_head(s, 0, start), s.T);
  }
  const Visible *of(int64_t b) const { return found.data() + (shared ? 0 : b * blocks); }
};

// P = 2^(s - level) and dS = scale P (dP - mean), with ``level`` (log_sum_exp) and ``mean`` (delta) of the lanes. They
// replace the scores s and the gradients dP [keys, lanes]; s and level are in units of ln 2.
struct Weigher {
  const float *level, *mean;
  float scale;

  template <bool WHOLE>
  void weigh(float *weights, float *d_scores, int64_t keys, int64_t lanes) const {
    for (int64_t j = 0; j < lanes; j += W) {
      const vf under = load(level + j), pull = load(mean + j);
      for (int64_t t = 0; t < keys; t++) {
        float *p = weights + t * lanes + j, *d = d_scores + t * lanes + j;
        const vf score = load(p), w = power_of_two(score - under), gradient = w * (load(d) - pull) * scale;
        store(p, w);
        // Beside a hidden score lies what an earlier block left there, which must not reach a sum even as 0 * NaN.
        store(d, WHOLE ? gradient : select(score == kNone, splat(0.0f), gradient));
      }
    }
  }
};

// Contribution of the keys [from, to) and the queries of ``part`` to dq, dk and dv.
//
// P = exp(scale q k - log_sum_exp), dP = dO V^T, dS = scale P (dP - delta) with delta = rowsum(dO * O);
// dV += P^T dO, dK += dS^T Q, dQ += dS K. Scores and their gradients are transposed, [keys, lanes].
void backward_block(const Shapes &s, const View *in, const Part &part, int64_t from, int64_t to, float scale, float *dq,
                    int64_t ldq, const Sums &dk, const Sums &dv, Room &room) {
  const int64_t keys = to - from, at = (part.b * s.H + part.h) * s.S;
  const float *lse = in[5].as<float>() + at, *delta = in[6].as<float>() + at;
  const Rows k = part.k.from(from), v = part.v.from(from);
  room.scores.resize(kKeys * kQueries), room.d_scores.resize(kKeys * kQueries);
  float *weights = room.scores.data(), *d_scores = room.d_scores.data();
  for (int64_t start = part.first; start < part.last; start += kQueries) {
    const int64_t n = std::min(kQueries, s.S - start), lanes = padded(n), row = start - part.first;
    const Visible &visible = part.visible[start / kQueries];
    if (visible.none(from, to)) continue;
    const float *queries = part.queries + row * s.D, *grads = part.grads + row * s.D;
    visible_scores(visible, keys, lanes, s.D, from, k.data, k.stride, queries, weights);  // the scale is in queries
    visible_scores(visible, keys, lanes, s.D, from, v.data, v.stride, grads, d_scores);  // dP^T = V dO^T
    const bool whole = visible.whole(from, to);
    if (!whole) hide(weights, keys, lanes, from, visible, kNone);
    alignas(64) float level[kQueries], mean[kQueries];
    for (int64_t l = 0; l < lanes; l++) {
      level[l] = l < n && lse[start + l] != kNone ? lse[start + l] * kLog2E : 0.0f;
      mean[l] = l < n ? delta[start + l] : 0.0f;
    }
    const Weigher weigher{level, mean, scale};
    if (whole)
      weigher.weigh<true>(weights, d_scores, keys, lanes);
    else
      weigher.weigh<false>(weights, d_scores, keys, lanes);
    const float *q = part.q.data + row * part.q.stride, *grad = part.grad.data + row * part.grad.stride;
    // The sums over queries take P^T and dS^T as they are, the sum over keys takes dS^T by transposed strides. Each
    // takes what its rows of tiles see; beyond that there are zeros.
    const auto to_keys = [&](const float *x, const float *rows, int64_t stride, const Sums &sums) {
      const int64_t side = whole ? keys : kTileRows;
      for (int64_t t = 0; t < keys; t += side) {
        const int64_t some = std::min(side, keys - t);
        const Span seeing = visible.seeing(from + t, from + t + some, n);
        if (seeing.begin < seeing.end)
          gemm(some, s.Dp, seeing.end - seeing.begin, x + t * lanes + seeing.begin, lanes, 1,
               rows + seeing.begin * stride, stride, sums.data + (from + t) * sums.stride, sums.stride, true);
      }
    };
    to_keys(weights, grad, part.grad.stride, dv);
    to_keys(d_scores, q, part.q.stride, dk);
    const int64_t side = whole ? n : kTileRows;
    for (int64_t l = 0; l < n; l += side) {
      const int64_t some = std::min(side, n - l);
      const Span seen = visible.seen({l, l + some}, from, to);
      if (seen.begin < seen.end)
        gemm(some, s.Dp, seen.end - seen.begin, d_scores + (seen.begin - from) * lanes + l, 1, lanes,
             k.data + (seen.begin - from) * k.stride, k.stride, dq + (row + l) * ldq, ldq, true);
    }
  }
}

// Gradients of one kv head and of the G query heads that share it. ``hands`` take the blocks of keys in turns: dk and dv
// of a block belong to one hand; dq is a sum over blocks of keys, so every hand but the first has a dq of its own, and
// these are added in the order of the hands, by one thread or several (``alone``) with the same bits.
void backward_head(const Shapes &s, const View *in, const View *out, int64_t b, int64_t kv, float scale, int64_t hands,
                   bool alone, const Visible *visible, Room *rooms) {
  Room &room = rooms[0];
  const Sums dk(out[1], b, kv, room.dk), dv(out[2], b, kv, room.dv);
  const Rows k(in[2], b, kv, 0, s.T, room.k, true), v(in[3], b, kv, 0, s.T, room.v, true);
  room.queries.resize(s.D * kPart), room.grads.resize(s.D * kPart);
  std::vector<Floats> own(hands - 1);
  for (int64_t h = kv * s.G; h < (kv + 1) * s.G; h++) {
    const Sums dq(out[0], b, h, room.out);
    for (int64_t first = 0; first < s.S; first += kPart) {
      const int64_t last = std::min(s.S, first + kPart), rows = last - first;
      for (int64_t start = first; start < last; start += kQueries) {
        const Lanes block = lanes_of_head(s, h, start);
        transpose(in[1], b, block, scale * kLog2E, &room.queries[(start - first) * s.D]);
        transpose(in[0], b, block, 1.0f, &room.grads[(start - first) * s.D]);
      }
      const Part part{b, h, first, last, k, v, Rows(in[1], b, h, first, rows, room.q, true),
                      Rows(in[0], b, h, first, rows, room.grad, true), room.queries.data(), room.grads.data(), visible};
      const auto work = [&](int64_t hand, int thread) {
        float *to = dq.data + first * dq.stride;
        int64_t stride = dq.stride;
        if (hand) own[hand - 1].assign(rows * s.Dp, 0.0f), to = own[hand - 1].data(), stride = s.Dp;
        for (int64_t from = hand * kKeys; from < s.T; from += hands * kKeys)
          backward_block(s, in, part, from, std::min(s.T, from + kKeys), scale, to, stride, dk, dv, rooms[thread]);
      };
      if (alone)
        for (int64_t hand = 0; hand < hands; hand++) work(hand, 0);
      else
        parallel_items(hands, work);
      for (const auto &more : own)
        for (int64_t r = 0; r < rows; r++)
          for (int64_t i = 0; i < s.Dp; i += W) {
            float *p = dq.data + (first + r) * dq.stride + i;
            store(p, load(p) + load(&more[r * s.Dp + i]));
          }
    }
    dq.write();
  }
  dk.write(), dv.write();
}

}  // namespace

// in: q [B, S, H, D], k, v [B, T, K, D] (D contiguous, other axes strided), ranges int32 [B or 1, S, 2];
// out: out [B, S, H, D], log_sum_exp [B, H, S] float32; scalars: scale of the scores
KERNEL(attention, 4, 2, 1) {
  const Shapes s(in[0], in[1]);
  const float scale = static_cast<float>(scalar[0]);
#ifdef ATTENTION_TILES
  if (in_tiles(s, scale))
    return in[0].dtype == BF16 && in[1].dtype == BF16 ? forward_tiles<1>(s, in, out, scale)
                                                      : forward_tiles<3>(s, in, out, scale);
#endif
  std::vector<Room> rooms(threads_for(s.B * s.H * s.S, 1));  // the maximum number of threads
  // Few queries (decoding): the lanes hold the queries of all heads of a kv head, so that each key is read once.
  const bool few = s.S < W;
  const int64_t owners = few ? s.K : s.H, pairs = few ? s.G * s.S : s.S;
  // Causal: the last blocks have most keys and start first; the short ones balance the threads at the end.
  const int64_t blocks = (pairs + kQueries - 1) / kQueries;
  parallel_items(s.B * owners * blocks, [&](int64_t item, int thread) {
    const int64_t owner = item / blocks, b = owner / owners, h = owner % owners, kv = few ? h : h / s.G;
    const int64_t start = (blocks - 1 - item % blocks) * kQueries;
    Room &room = rooms[thread];
    if (room.head != b * s.K + kv) {
      room.head = b * s.K + kv;
      room.keys = Rows(in[1], b, kv, 0, s.T, room.k), room.values = Rows(in[2], b, kv, 0, s.T, room.v);
    }
    const Lanes block = few ? lanes_of_group(s, kv, start) : lanes_of_head(s, h, start);
    with_type(out[0].dtype, [&](auto *o) {
      forward_block<std::remove_pointer_t<decltype(o)>>(s, in, out, b, block, scale, room);
    });
  });
}

// in: grad [B, S, H, D], q, k, v, ranges, log_sum_exp, delta [B, H, S] float32; out: dq, dk, dv; scalars: scale
KERNEL(attention_backward, 7, 3, 1) {
  const Shapes s(in[1], in[2]);
  const float scale = static_cast<float>(scalar[0]);
  const int64_t tasks = s.B * s.K, hands = hands_for(s);
#ifdef ATTENTION_TILES
  if (in_tiles(s, scale))
    return in[0].dtype == BF16 && in[1].dtype == BF16 && in[2].dtype == BF16
               ? backward_tiles<1>(s, in, out, scale, hands)
               : backward_tiles<3>(s, in, out, scale, hands);
#endif
  const bool alone = divides(tasks);
  const Sights sights(s, in[4]);
  std::vector<Room> rooms(threads_for(alone ? tasks : hands, 1));
  if (alone)
    parallel_items(tasks, [&](int64_t item, int thread) {
      backward_head(s, in, out, item / s.K, item % s.K, scale, hands, true, sights.of(item / s.K), &rooms[thread]);
    });
  else
    for (int64_t item = 0; item < tasks; item++)
      backward_head(s, in, out, item / s.K, item % s.K, scale, hands, false, sights.of(item / s.K), rooms.data());
}

// in: grad, out [B, S, H, D]; out: rowsum(grad * out) [B, H, S] float32
KERNEL(attention_delta, 2, 1, 0) {
  const int64_t S = in[0].shape[1], H = in[0].shape[2], D = in[0].shape[3];
  with_types(in[0].dtype, in[1].dtype, [&](auto *tg, auto *to) {
    using G = std::remove_pointer_t<decltype(tg)>;
    using O = std::remove_pointer_t<decltype(to)>;
    parallel(in[0].shape[0] * S, 64, [&](int64_t first, int64_t last, int) {
      for (int64_t token = first; token < last; token++)
        for (int64_t h = 0; h < H; h++) {
          const G *g = in[0].as<G>() + token / S * in[0].stride[0] + token % S * in[0].stride[1] + h * in[0].stride[2];
          const O *o = in[1].as<O>() + token / S * in[1].stride[0] + token % S * in[1].stride[1] + h * in[1].stride[2];
          vf sum = splat(0.0f);
          for (int64_t d = 0; d < D; d += W) {
            const int n = static_cast<int>(std::min<int64_t>(W, D - d));
            sum += get(g + d, n) * get(o + d, n);
          }
          out[0].as<float>()[(token / S * H + h) * S + token % S] = sum_lanes(sum);
        }
    });
  });
}
