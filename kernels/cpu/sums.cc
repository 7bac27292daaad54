// Sums of records: the sketch, extremes, block sums and checksum of a float32 matrix, each in one pass.
//
// The definitions are numpy's, in core/parity/record: sketch.py (Projection), blocks.py (Grid) and tally.py (checksum).
// Every sum here has their order, so that the bits are equal: products with +1 and -1 and squares of float32 are exact
// in float64, whether they are fused with an addition or not. Chunks of rows are added up by any number of threads,
// each into a row of its own of the output.
#include <limits>

#include "kernel.h"

namespace {

constexpr int kRows = 128, kGroup = 4, kGroups = kRows / kGroup;  // rows of a block of the hash; with one shift
constexpr int64_t kTile = 1024;  // columns
constexpr int kLanes = 8;
constexpr double kLargest = 1e150;

typedef double vd __attribute__((vector_size(kLanes * 8)));
typedef float vs __attribute__((vector_size(kLanes * 4)));

// splitmix64 at key + counter.
inline uint64_t mixed(uint64_t key, uint64_t counter) {
  uint64_t z = (counter + 1) * 0x9E3779B97F4A7C15u + key;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
inline double sign(uint64_t hashed) { return hashed >> 63 ? -1.0 : 1.0; }

template <typename V, typename T>
inline V get(const T *p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <typename V, typename T>
inline void put(T *p, V x) {
  std::memcpy(p, &x, sizeof x);
}

struct Keys {
  uint64_t blocks, shifts, rows;
};

// What one chunk of rows adds up, in the order of a row of the output.
struct Sums {
  double *sketch;  // [K]
  double *nonfinite, *norm2, *sum, *least, *most;
  Sums(double *out, int64_t buckets)
      : sketch(out), nonfinite(out + buckets), norm2(nonfinite + 1), sum(norm2 + 1), least(sum + 1), most(least + 1) {
    std::fill(out, out + buckets + 3, 0.0);
    *least = std::numeric_limits<double>::infinity(), *most = -*least;
  }
};

// Room of one thread: sums by column, a joined row, a row of zeros, and, once it is needed, a tile without what is not
// finite.
struct Room {
  alignas(64) double squares[kTile], sums[kTile], joined[kTile];
  alignas(64) float zeros[kTile];
  Floats clean;
  double added[256];
  float least, most;
};

// room.joined = the sum of N rows with their signs, times the columns' signs; adds to squares and sums by column, and
// to the extremes of all rows. ``next``: N rows that come after these, fetched meanwhile: the rows of a block are read in
// a random order, which no processor foresees.
template <int N, bool EXTREMES>
void join(const float *const *rows, const float *const *next, const double *signs, const float *columns, int64_t m, Room &room) {
  int64_t j = 0;
  vs least, most;
  for (int l = 0; l < kLanes; l++) least[l] = room.least, most[l] = room.most;
  for (; j + kLanes <= m; j += kLanes) {
    if (!(j & kLanes))
      for (int r = 0; r < N; r++) __builtin_prefetch(next[r] + j);
    vd joined{}, squares = get<vd>(room.squares + j), sums = get<vd>(room.sums + j);
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
      const vs x = get<vs>(rows[r] + j);
      const vd v = __builtin_convertvector(x, vd);
      joined += v * signs[r];
      squares += v * v;
      sums += v;
      if constexpr (EXTREMES) least = x < least ? x : least, most = x > most ? x : most;
    }
    put(room.joined + j, joined * __builtin_convertvector(get<vs>(columns + j), vd));
    put(room.squares + j, squares), put(room.sums + j, sums);
  }
  for (int l = 0; l < kLanes; l++) room.least = std::min(room.least, least[l]), room.most = std::max(room.most, most[l]);
  for (; j < m; j++) {
    double joined = 0.0;
    for (int r = 0; r < N; r++) {
      const float x = rows[r][j];
      const double v = x;
      joined += v * signs[r], room.squares[j] += v * v, room.sums[j] += v;
      if constexpr (EXTREMES) room.least = std::min(room.least, x), room.most = std::max(room.most, x);
    }
    room.joined[j] = joined * columns[j];
  }
}

double total(const double *values, int64_t m) {
  double sum = values[0];
  for (int64_t j = 1; j < m; j++) sum += values[j];
  return sum;
}

// Rows of a tile, in the order in which they are added: ``count`` groups of one row, or of kGroup.
struct Tile {
  const float *rows[kRows];
  double signs[kRows];
  bool there[kRows];
  uint8_t shifts[kGroups];
  int count, group;
};

struct Matrix {
  const float *data;
  int64_t stride, buckets;
  const uint8_t *places;  // bucket of each column
  const float *signs;     // of each column
  Keys keys;

  // One pass over a tile; false where its squares are not below kLargest.
  template <bool EXTREMES>
  bool pass(const Tile &tile, int64_t left, int64_t m, Room &room) const {
    const uint8_t mask = static_cast<uint8_t>(buckets - 1);
    std::fill(room.squares, room.squares + m, 0.0), std::fill(room.sums, room.sums + m, 0.0);
    std::fill(room.added, room.added + buckets, 0.0);
    for (int g = 0; g < tile.count; g++) {
      const int first = g * tile.group;
      const float *const *rows = tile.rows + first;
      const float *const *next = g + 1 < tile.count ? rows + tile.group : rows;
      const double *signs_of = tile.signs + first;
      if (tile.group == 1) {
        join<1, EXTREMES>(rows, next, signs_of, signs + left, m, room);
      } else if (tile.there[first] && tile.there[first + 1] && tile.there[first + 2] && tile.there[first + 3]) {
        join<kGroup, EXTREMES>(rows, next, signs_of, signs + left, m, room);
      } else {
        join<kGroup, false>(rows, next, signs_of, signs + left, m, room);
        for (int r = 0; EXTREMES && r < kGroup; r++)
          for (int64_t j = 0; tile.there[first + r] && j < m; j++)
            room.least = std::min(room.least, rows[r][j]), room.most = std::max(room.most, rows[r][j]);
      }
      const uint8_t shift = tile.shifts[g], *at = places + left;
      for (int64_t j = 0; j < m; j++) room.added[static_cast<uint8_t>(shift + at[j]) & mask] += room.joined[j];
    }
    return total(room.squares, m) < kLargest;
  }

  // Rows [first, last) of one block of the hash, columns [left, left + m).
  void add(const int64_t *rows, int64_t first, int64_t last, int64_t left, int64_t m, Room &room, Sums &out) const {
    const uint64_t block = rows[first] / kRows, factor = mixed(keys.blocks, block);
    Tile tile{};
    tile.group = last - first <= kGroups ? 1 : kGroup;
    tile.count = tile.group == 1 ? last - first : kGroups;
    std::fill(tile.rows, tile.rows + kRows, room.zeros);
    for (int g = 0; tile.group > 1 && g < kGroups; g++) tile.shifts[g] = mixed(keys.shifts, block * kGroups + g) >> 32;
    for (int64_t i = first; i < last; i++) {
      const uint64_t place = (rows[i] * ((factor & (kRows - 1)) | 1) + (factor >> 32)) & (kRows - 1);
      const int64_t slot = tile.group == 1 ? i - first : place;
      tile.rows[slot] = data + i * stride + left, tile.there[slot] = true;
      tile.signs[slot] = sign(mixed(keys.rows, rows[i]));
      if (tile.group == 1) tile.shifts[slot] = mixed(keys.shifts, block * kGroups + place / kGroup) >> 32;
    }
    room.least = std::numeric_limits<float>::infinity(), room.most = -room.least;
    if (!pass<true>(tile, left, m, room)) {
      *out.nonfinite += without_nonfinite(tile, m, room);
      pass<false>(tile, left, m, room);
    }
    *out.least = std::min(*out.least, static_cast<double>(room.least));
    *out.most = std::max(*out.most, static_cast<double>(room.most));
    *out.norm2 += total(room.squares, m), *out.sum += total(room.sums, m);
    for (int64_t k = 0; k < buckets; k++) out.sketch[k] += room.added[k];
  }

  // Replaces the rows by copies in which what is not finite is 0, takes the extremes of the rest, and counts the former.
  static int64_t without_nonfinite(Tile &tile, int64_t m, Room &room) {
    int64_t bad = 0;
    room.clean.resize(kRows * kTile);
    room.least = std::numeric_limits<float>::infinity(), room.most = -room.least;
    for (int i = 0; i < tile.count * tile.group; i++) {
      if (!tile.there[i]) continue;
      float *copy = room.clean.data() + i * kTile;
      for (int64_t j = 0; j < m; j++) {
        const float x = tile.rows[i][j];
        const bool fine = std::abs(x) < std::numeric_limits<float>::infinity();
        bad += !fine, copy[j] = fine ? x : 0.0f;
        if (fine) room.least = std::min(room.least, x), room.most = std::max(room.most, x);
      }
      tile.rows[i] = copy;
    }
    return bad;
  }
};

inline float finite(float x) { return std::abs(x) < std::numeric_limits<float>::infinity() ? x : 0.0f; }

}  // namespace

// sketch [chunks, K + 5] of a matrix [n, m], its rows at numbers ``rows`` [n] of the tensor's; chunk c has the rows from
// starts[c] to starts[c + 1]. keys: of the hashes of blocks, shifts and rows.
KERNEL(record_sketch, 6, 1, 0) {
  const View &x = in[0], &made = out[0];
  const int64_t *rows = in[1].as<int64_t>(), *starts = in[2].as<int64_t>(), m = x.shape[1], width = made.shape[1];
  const uint64_t *keys = in[3].as<uint64_t>();
  const Matrix matrix{x.as<float>(), x.stride[0], width - 5, in[4].as<uint8_t>(), in[5].as<float>(), {keys[0], keys[1], keys[2]}};
  parallel(made.shape[0], 1, [&](int64_t begin, int64_t end, int) {
    std::vector<Room, OnLines<Room>> room(1);
    std::fill(room[0].zeros, room[0].zeros + kTile, 0.0f);
    for (int64_t c = begin; c < end; c++) {
      Sums sums(made.as<double>() + c * width, width - 5);
      for (int64_t first = starts[c], last; first < starts[c + 1]; first = last) {
        for (last = first + 1; last < starts[c + 1] && rows[last] / kRows == rows[first] / kRows;) last++;
        for (int64_t left = 0; left < m; left += kTile)
          matrix.add(rows, first, last, left, std::min(kTile, m - left), room[0], sums);
      }
    }
  });
}

// Sums [n, m / width] of ``width`` neighbouring columns of a matrix [n, m]; what is not finite counts as 0.
KERNEL(record_row_blocks, 1, 1, 1) {
  const View &x = in[0];
  const int64_t width = static_cast<int64_t>(scalar[0]), count = out[0].shape[1];
  parallel(x.shape[0], std::max<int64_t>(1, 65536 / std::max<int64_t>(1, x.shape[1])), [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; i++) {
      const float *row = x.as<float>() + i * x.stride[0];
      double *sums = out[0].as<double>() + i * count;
      for (int64_t b = 0; b < count; b++) {
        double sum = finite(row[b * width]);
        for (int64_t j = 1; j < width; j++) sum += finite(row[b * width + j]);
        sums[b] = sum;
      }
    }
  });
}

// Sum modulo 2^64 of (bits + 1) * across[j] * down[i] over a matrix [n, m], exact in any order; out: one number a row.
KERNEL(record_checksum, 3, 1, 0) {
  const View &x = in[0];
  const int64_t m = x.shape[1];
  const uint64_t *across = in[1].as<uint64_t>(), *down = in[2].as<uint64_t>();
  parallel(x.shape[0], std::max<int64_t>(1, 65536 / std::max<int64_t>(1, m)), [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; i++) {
      const float *row = x.as<float>() + i * x.stride[0];
      uint64_t sum = 0;
      for (int64_t j = 0; j < m; j++) {
        uint32_t bits;
        std::memcpy(&bits, row + j, 4);
        sum += (uint64_t(bits) + 1) * across[j];
      }
      out[0].as<uint64_t>()[i] = sum * down[i];
    }
  });
}
