// float32 matrix products in AMX tiles of bfloat16: each number as three parts (split.h), six products of tiles for one.
//
// Blocks of A stay packed in L2; strips of B are packed once for all blocks of rows. Threads divide the rows, or the
// columns where there are too few rows. Depths of k follow from k alone, and every sum runs along k in one order.
#include <atomic>

#include "split_tiles.h"

namespace {

std::atomic<bool> refused{false};

#ifdef SPLIT_TILES
constexpr int64_t kPanel = 32;       // rows of A or columns of B of a panel
constexpr int64_t kDepth = 512;      // steps of k per pass, at most: a panel (96 KiB) streams from L2
constexpr int64_t kBlock = 256;      // rows of A per pass, at most: the packed block (768 KiB) stays in L2
constexpr int64_t kStrips = 64;      // strips of B per pass: 6 MiB
thread_local FloatBuffer packed_a, packed_b;

// The part of C of one panel of A and one of B. A tile at the edge is computed in ``edge``, of which the existing
// elements are copied.
struct Target {
  float *c;
  int64_t m, n;
  const float *bias;

  void multiply(const float *a, const float *b, int64_t steps, int64_t row, int64_t column, bool add) const {
    float *to = c + row * n + column;
    const int64_t rows = std::min(kPanel, m - row), columns = std::min(kPanel, n - column);
    const float *begin = add ? to : bias ? bias + column : nullptr;
    const int64_t begin_row = add ? n : 0;
    if (rows == kPanel && columns == kPanel) return multiply_panels(a, b, steps, begin, begin_row, to, n);
    alignas(64) float edge[kPanel * kPanel] = {};
    if (begin)
      for (int64_t i = 0; i < rows; i++) std::memcpy(edge + i * kPanel, begin + i * begin_row, columns * sizeof(float));
    multiply_panels(a, b, steps, edge, kPanel, edge, kPanel);
    for (int64_t i = 0; i < rows; i++) std::memcpy(to + i * n, edge + i * kPanel, columns * sizeof(float));
  }
};
#endif

}  // namespace

extern "C" {
// Whether this processor and system have the tiles; ``tele_refuse_split(1)``: float32 products do without them.
int tele_has_split() {
#ifdef SPLIT_TILES
  return has_tiles();
#else
  return 0;
#endif
}
void tele_refuse_split(int refuse) { refused.store(refuse != 0, std::memory_order_relaxed); }
}

bool split_serves() { return !refused.load(std::memory_order_relaxed) && tele_has_split(); }

#ifdef SPLIT_TILES
void split_product(int64_t m, int64_t n, int64_t k, const Operand &a, const Operand &b, const float *bias, float *c,
                   bool add) {
  const int64_t strips = (n + kPanel - 1) / kPanel, panels = (m + kPanel - 1) / kPanel, passes = (k + kDepth - 1) / kDepth;
  const int64_t most_depth = (k + passes * kTileDepth - 1) / (passes * kTileDepth) * kTileDepth;
  const int64_t most_panel = most_depth / kTileDepth * kStepFloats;
  const int64_t threads = threads_for(panels * strips, 4);
  const bool by_rows = panels >= 2 * threads || panels >= strips;
  // Enough blocks for all threads to end at about the same time.
  const int64_t block = by_rows ? std::clamp<int64_t>(panels / (4 * threads), 1, kBlock / kPanel) : kBlock / kPanel;
  const int64_t blocks = (panels + block - 1) / block;
  float *packed = packed_b.room(std::min(strips, kStrips) * most_panel);
  const Target target{c, m, n, bias};
  for (int64_t strip = 0; strip < strips; strip += kStrips)
    for (int64_t from = 0; from < k; from += most_depth) {
      const int64_t some = std::min(kStrips, strips - strip);
      const int64_t steps = (std::min(most_depth, k - from) + kTileDepth - 1) / kTileDepth, panel = steps * kStepFloats;
      parallel(some, 2, [&](int64_t first, int64_t last, int) {
        pack_panels<true>(b, (strip + first) * kPanel, last - first, n, from, steps, k, packed + first * panel);
      });
      parallel(by_rows ? blocks : some, by_rows ? 1 : std::max<int64_t>(1, some / threads),
               [&](int64_t first, int64_t last, int) {
        float *rows = packed_a.room(block * most_panel);
        const Tiles configured(true);
        for (int64_t at = by_rows ? first : 0; at < (by_rows ? last : blocks); at++) {
          const int64_t begin = at * block, count = std::min(block, panels - begin);
          pack_panels<false>(a, begin * kPanel, count, m, from, steps, k, rows);
          for (int64_t s = by_rows ? 0 : first; s < (by_rows ? some : last); s++)
            for (int64_t i = 0; i < count; i++)
              target.multiply(rows + i * panel, packed + s * panel, steps, (begin + i) * kPanel, (strip + s) * kPanel,
                              from || add);
        }
      });
    }
}
#else
void split_product(int64_t, int64_t, int64_t, const Operand &, const Operand &, const float *, float *, bool) {}
#endif
