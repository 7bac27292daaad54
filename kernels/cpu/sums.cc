// Sums of records: sketch, extremes, block sums and checksum of a float32 matrix, all in one reading of it.
//
// The definitions are numpy's, in core/parity/record: sketch.py (Projection), blocks.py (Grid) and tally.py (checksum).
// Every sum here has their order, so that the bits are equal: products with +1 and -1 and squares of float32 are exact
// in float64, whether they are fused with an addition or not. Chunks of rows are added up by any number of threads,
// each into a row of its own of the output.
#include <limits>

#include "kernel.h"
#include "vec.h"

namespace {

constexpr int kRows = 128, kGroup = 4, kGroups = kRows / kGroup;  // rows of a block of the hash; with one shift
constexpr int64_t kTile = 1024;  // columns: a block of them stays in a processor's second cache
constexpr int kLanes = 8, kMostBuckets = 256;
constexpr int kAhead = 4;  // groups of rows between the one that is added and the one that is fetched meanwhile
constexpr double kLargest = 1e150;

typedef double vd __attribute__((vector_size(kLanes * 8)));
typedef float vs __attribute__((vector_size(kLanes * 4)));
typedef int64_t vl __attribute__((vector_size(kLanes * 8)));
typedef uint64_t vul __attribute__((vector_size(kLanes * 8)));
typedef uint32_t vus __attribute__((vector_size(kLanes * 4)));

// splitmix64 at key + counter.
inline uint64_t mixed(uint64_t key, uint64_t counter) {
  uint64_t z = (counter + 1) * 0x9E3779B97F4A7C15u + key;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
inline double sign(uint64_t hashed) { return hashed >> 63 ? -1.0 : 1.0; }
inline float finite(float x) { return std::abs(x) < std::numeric_limits<float>::infinity() ? x : 0.0f; }

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
inline vd widen(vs x) {
#if defined(__AVX512F__)  // one instruction, which the compiler does not find
  return (vd)_mm512_cvtps_pd((__m256)x);
#else
  return __builtin_convertvector(x, vd);
#endif
}

struct Keys {
  uint64_t blocks, shifts, rows, down;
};

// What one chunk of rows adds up, in the order of a row of the output.
struct Sums {
  double *sketch;  // [K]
  double *nonfinite, *norm2, *sum, *least, *most;
  uint64_t checksum = 0;
  Sums(double *out, int64_t buckets)
      : sketch(out), nonfinite(out + buckets), norm2(nonfinite + 1), sum(norm2 + 1), least(sum + 1), most(least + 1) {
    std::fill(out, out + buckets + 3, 0.0);
    *least = std::numeric_limits<double>::infinity(), *most = -*least;
  }
};

// Sums by row of a group and by column modulo kLanes, and extremes.
struct Lanes {
  vd squares[kGroup], sums[kGroup];
  vs least, most;
};

// Room of one thread: a joined row, a row of zeros, and, once it is needed, a tile without what is not finite.
// ``added`` has the places of a bucket's shift plus a column's, of which those from K on are the same buckets again.
struct Room {
  alignas(64) double joined[kTile];
  alignas(64) float zeros[kTile];
  alignas(64) double added[2 * kMostBuckets];
  Floats clean;
};

// room.joined = the sum of N rows with their signs, times the columns' signs; adds to the lanes' sums and, of the first
// ``m`` columns, extremes. ``next``: N rows that come later, fetched meanwhile into the second cache (the first has too
// few lines under way): the rows of a block are read in a random order, which no processor foresees.
template <int N, bool EXTREMES>
void join(const float *const *rows, const float *const *next, const double *signs, const float *columns, int64_t m,
          Room &room, Lanes &given) {
  Lanes lanes = given;
  const auto step = [&](const float *const (&at)[N], int64_t j, const float *across, double *out) {
    vd joined{};
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
      const vs x = get<vs>(at[r] + j);
      const vd v = widen(x);
      joined += v * signs[r];
      lanes.squares[r] += v * v;
      lanes.sums[r] += v;
      if constexpr (EXTREMES) lanes.least = x < lanes.least ? x : lanes.least, lanes.most = x > lanes.most ? x : lanes.most;
    }
    put(out, joined * widen(get<vs>(across)));
  };
  const float *at[N], *after[N];
  for (int r = 0; r < N; r++) at[r] = rows[r], after[r] = next[r];
  int64_t j = 0;
  for (; j + kLanes <= m; j += kLanes) {
    if (!(j & kLanes))
      for (int r = 0; r < N; r++) __builtin_prefetch(after[r] + j, 0, 2);
    step(at, j, columns + j, room.joined + j);
  }
  if (j < m) {  // lanes beyond the last column repeat it for the extremes, and are 0 in the sums
    alignas(32) float tail[N + 1][kLanes]{};
    for (int r = 0; r < N; r++) {
      std::copy(rows[r] + j, rows[r] + m, tail[r]), at[r] = tail[r];
      if constexpr (EXTREMES) {
        vs x;
        for (int l = 0; l < kLanes; l++) x[l] = rows[r][std::min(j + l, m - 1)];
        lanes.least = x < lanes.least ? x : lanes.least, lanes.most = x > lanes.most ? x : lanes.most;
      }
    }
    std::copy(columns + j, columns + m, tail[N]);
    alignas(64) double out[kLanes];
    const vs least = lanes.least, most = lanes.most;
    step(at, 0, tail[N], out);
    lanes.least = least, lanes.most = most;
    std::copy(out, out + (m - j), room.joined + j);
  }
  given = lanes;
}

double total(const vd *lanes, int rows) {
  double sum = 0.0;
  for (int r = 0; r < rows; r++)
    for (int l = 0; l < kLanes; l++) sum += lanes[r][l];
  return sum;
}

// Rows [begin, end) of one block of the hash and columns [left, left + m), in the order in which they are added:
// ``count`` groups of one row, or of kGroup.
struct Tile {
  int64_t begin, end, left, m;
  const float *rows[kRows];
  double signs[kRows];
  bool there[kRows];
  uint8_t shifts[kGroups];
  int count, group;
};

// Sums of ``width`` neighbours of ``row`` [m], a power of two: of pairs, of pairs of these and so on. Returns where they
// are, in ``scratch``.
void add_neighbours(const float *row, int64_t m, int64_t width, double *scratch) {
  const vl even{0, 2, 4, 6, 8, 10, 12, 14}, odd{1, 3, 5, 7, 9, 11, 13, 15};
  const auto halve = [&](auto &&load, int64_t n, auto &&one) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const vd a = load(2 * j), b = load(2 * j + kLanes);
      put(scratch + j, __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd));
    }
    for (; j < n; j++) scratch[j] = one(2 * j) + one(2 * j + 1);
  };
  if (width == 1) {
    for (int64_t j = 0; j < m; j++) scratch[j] = row[j];
    return;
  }
  halve([&](int64_t j) { return widen(get<vs>(row + j)); }, m / 2, [&](int64_t j) { return static_cast<double>(row[j]); });
  for (int64_t made = 2, n = m / 4; made < width; made *= 2, n /= 2)
    halve([&](int64_t j) { return get<vd>(scratch + j); }, n, [&](int64_t j) { return scratch[j]; });
}

struct Matrix {
  const float *data;
  int64_t stride, buckets;
  const int64_t *numbers;  // of the rows in the tensor's matrix; of the first alone where they count on
  bool in_turn;
  const uint8_t *places;  // bucket of each column
  const float *signs;     // of each column
  const uint64_t *across;  // factors of the checksum, of each column; none without a checksum
  Keys keys;
  void *blocks;  // [rows / height, blocks_stride], none without block sums
  bool narrow;   // they are float32
  bool fresh;    // and are written: each of them is one row's, and all are made here
  int64_t blocks_stride, height, width, first_block;

  int64_t number(int64_t i) const { return in_turn ? numbers[0] + i : numbers[i]; }

  // One pass over a tile; false where its squares are not below kLargest. ``after``: rows of the tile that comes next.
  template <bool EXTREMES>
  bool pass(const Tile &tile, const float *const *after, Room &room, Lanes &lanes) const {
    const int64_t left = tile.left, m = tile.m;
    std::fill(std::begin(lanes.squares), std::end(lanes.squares), vd{});
    std::fill(std::begin(lanes.sums), std::end(lanes.sums), vd{});
    std::fill(room.added, room.added + 2 * buckets, 0.0);
    for (int g = 0; g < tile.count; g++) {
      const int first = g * tile.group;
      const float *const *rows = tile.rows + first;
      const float *const *next = g + kAhead < tile.count ? rows + kAhead * tile.group : after + (g + kAhead - tile.count) * tile.group;
      const double *signs_of = tile.signs + first;
      if (tile.group == 1) {
        join<1, EXTREMES>(rows, next, signs_of, signs + left, m, room, lanes);
      } else if (tile.there[first] && tile.there[first + 1] && tile.there[first + 2] && tile.there[first + 3]) {
        join<kGroup, EXTREMES>(rows, next, signs_of, signs + left, m, room, lanes);
      } else {
        join<kGroup, false>(rows, next, signs_of, signs + left, m, room, lanes);
        for (int r = 0; EXTREMES && r < kGroup; r++)
          for (int64_t j = 0; tile.there[first + r] && j < m; j++)
            lanes.least[0] = std::min<float>(lanes.least[0], rows[r][j]), lanes.most[0] = std::max<float>(lanes.most[0], rows[r][j]);
      }
      double *added = room.added + tile.shifts[g];
      const uint8_t *at = places + left;
#pragma GCC unroll 4
      for (int64_t j = 0; j < m; j++) added[at[j]] += room.joined[j];
    }
    return total(lanes.squares, tile.group) < kLargest;
  }

  // The tile at ``tile``'s begin, end, left and m.
  void lay(Tile &tile, const Room &room) const {
    const uint64_t block = number(tile.begin) / kRows, factor = mixed(keys.blocks, block);
    const uint8_t mask = static_cast<uint8_t>(buckets - 1);
    const int64_t n = tile.end - tile.begin;
    tile.group = n <= kGroups ? 1 : kGroup;
    tile.count = tile.group == 1 ? n : kGroups;
    std::fill(tile.rows, tile.rows + kRows, room.zeros);
    std::fill(tile.signs, tile.signs + kRows, 0.0);  // a row of zeros times what was in the memory may be no number
    std::fill(tile.there, tile.there + kRows, false);
    for (int g = 0; tile.group > 1 && g < kGroups; g++) tile.shifts[g] = mixed(keys.shifts, block * kGroups + g) >> 32 & mask;
    for (int64_t i = tile.begin; i < tile.end; i++) {
      const uint64_t row = number(i), place = (row * ((factor & (kRows - 1)) | 1) + (factor >> 32)) & (kRows - 1);
      const int64_t slot = tile.group == 1 ? i - tile.begin : place;
      tile.rows[slot] = data + i * stride + tile.left, tile.there[slot] = true;
      tile.signs[slot] = sign(mixed(keys.rows, row));
      if (tile.group == 1) tile.shifts[slot] = mixed(keys.shifts, block * kGroups + place / kGroup) >> 32 & mask;
    }
  }

  void add(Tile &tile, const float *const *after, Room &room, Sums &out) const {
    const int64_t left = tile.left, m = tile.m;
    Lanes lanes;
    lanes.least = vs{} + std::numeric_limits<float>::infinity(), lanes.most = -lanes.least;
    const bool fine = pass<true>(tile, after, room, lanes);
    if (!fine) {
      *out.nonfinite += without_nonfinite(tile, m, room, lanes);
      pass<false>(tile, after, room, lanes);
    }
    for (int l = 0; l < kLanes; l++) {
      *out.least = std::min(*out.least, static_cast<double>(lanes.least[l]));
      *out.most = std::max(*out.most, static_cast<double>(lanes.most[l]));
    }
    *out.norm2 += total(lanes.squares, tile.group), *out.sum += total(lanes.sums, tile.group);
    for (int64_t k = 0; k < buckets; k++) out.sketch[k] += room.added[k] + room.added[k + buckets];
    if (across)
      for (int64_t i = tile.begin; i < tile.end; i++)
        out.checksum += checksum(data + i * stride + left, left, m) * (mixed(keys.down, number(i)) | 1);
    if (blocks)
      for (int64_t i = tile.begin; i < tile.end; i++) add_blocks(i, left, m, fine, room);
  }

  // All tiles of rows [first, last) of ``m`` columns. The next one is laid before one is added, so that its first rows
  // are fetched meanwhile.
  void add_rows(int64_t first, int64_t last, int64_t m, Room &room, Sums &out) const {
    Tile tiles[2];
    Tile *now = &tiles[0], *next = &tiles[1];
    const auto place = [&](Tile &tile, int64_t begin, int64_t left) {
      tile.begin = begin, tile.left = left, tile.m = std::min(kTile, m - left), tile.end = begin + 1;
      while (tile.end < last && number(tile.end) / kRows == number(begin) / kRows) tile.end++;
      lay(tile, room);
    };
    place(*now, first, 0);
    for (bool more = true; more; std::swap(now, next)) {
      const bool wide = now->left + kTile < m;
      more = wide || now->end < last;
      if (more) place(*next, wide ? now->begin : now->end, wide ? now->left + kTile : 0);
      add(*now, (more ? next : now)->rows, room, out);
    }
  }

  uint64_t checksum(const float *row, int64_t left, int64_t m) const {
    vul sums{};
    int64_t j = 0;
    for (; j + kLanes <= m; j += kLanes)
      sums += (__builtin_convertvector(get<vus>(row + j), vul) + 1) * get<vul>(across + left + j);
    uint64_t sum = 0;
    for (int l = 0; l < kLanes; l++) sum += sums[l];
    for (; j < m; j++) {
      uint32_t bits;
      std::memcpy(&bits, row + j, 4);
      sum += (uint64_t(bits) + 1) * across[left + j];
    }
    return sum;
  }

  void add_blocks(int64_t i, int64_t left, int64_t m, bool fine, Room &room) const {
    const float *row = data + i * stride + left;
    if (!fine) {
      float *copy = room.clean.data();
      for (int64_t j = 0; j < m; j++) copy[j] = finite(row[j]);
      row = copy;
    }
    add_neighbours(row, m, width, room.joined);
    const int64_t at = number(i) / height * blocks_stride + first_block + left / width, n = m / width;
    if (narrow && fresh)
      for (int64_t b = 0; b < n; b++) static_cast<float *>(blocks)[at + b] = room.joined[b];
    else if (narrow)
      for (int64_t b = 0; b < n; b++) static_cast<float *>(blocks)[at + b] += room.joined[b];
    else
      for (int64_t b = 0; b < n; b++) static_cast<double *>(blocks)[at + b] += room.joined[b];
  }

  // Replaces the rows by copies in which what is not finite is 0, takes the extremes of the rest, and counts the former.
  static int64_t without_nonfinite(Tile &tile, int64_t m, Room &room, Lanes &lanes) {
    int64_t bad = 0;
    room.clean.resize(kRows * kTile);
    lanes.least = vs{} + std::numeric_limits<float>::infinity(), lanes.most = -lanes.least;
    for (int i = 0; i < tile.count * tile.group; i++) {
      if (!tile.there[i]) continue;
      float *copy = room.clean.data() + i * kTile;
      for (int64_t j = 0; j < m; j++) {
        const float x = tile.rows[i][j];
        const bool fine = std::abs(x) < std::numeric_limits<float>::infinity();
        bad += !fine, copy[j] = fine ? x : 0.0f;
        if (fine) lanes.least[0] = std::min<float>(lanes.least[0], x), lanes.most[0] = std::max<float>(lanes.most[0], x);
      }
      tile.rows[i] = copy;
    }
    return bad;
  }
};

}  // namespace

// Of a matrix [n, m] whose rows have numbers in the tensor's (``rows`` [n], or [1], the first, where they count on):
// sketch [chunks, K + 5], of which chunk c has the rows from starts[c] to starts[c + 1], and the checksum [chunks] modulo
// 2^64; the first row of each is then that of all chunks. The checksum is the sum of (bits + 1) * across[j] * down[i],
// where ``across`` [m] is not empty; block sums, added to ``blocks``, float64 or float32, where that is not empty, what is
// not finite as 0. keys: of the hashes of blocks, shifts, rows and down. Scalars:
// height and width of a block, number of the first block in a row, and whether float32 ``blocks`` are written, not added
// to, as where these are all blocks of a tensor, of one row each.
KERNEL(record_add, 7, 3, 4) {
  const View &x = in[0], &made = out[0], &blocks = out[2];
  const int64_t m = x.shape[1], width = made.shape[1], *starts = in[2].as<int64_t>();
  const uint64_t *keys = in[3].as<uint64_t>();
  const bool in_turn = in[1].shape[0] == 1;
  const Matrix matrix{x.as<float>(), x.stride[0], width - 5, in[1].as<int64_t>(), in_turn,
                      in[4].as<uint8_t>(), in[5].as<float>(), in[6].shape[0] ? in[6].as<uint64_t>() : nullptr,
                      {keys[0], keys[1], keys[2], keys[3]}, blocks.shape[0] ? blocks.data : nullptr, blocks.dtype == F32,
                      scalar[3] != 0, blocks.shape[1], static_cast<int64_t>(scalar[0]), static_cast<int64_t>(scalar[1]), static_cast<int64_t>(scalar[2])};
  // Two chunks may add to the same block sums unless their rows count on: the height divides a block of the hash.
  const int64_t grain = matrix.blocks && !in_turn ? made.shape[0] : 1;
  parallel(made.shape[0], grain, [&](int64_t begin, int64_t end, int) {
    std::vector<Room, OnLines<Room>> room(1);
    std::fill(room[0].zeros, room[0].zeros + kTile, 0.0f);
    for (int64_t c = begin; c < end; c++) {
      Sums sums(made.as<double>() + c * width, width - 5);
      if (starts[c] < starts[c + 1] && m) matrix.add_rows(starts[c], starts[c + 1], m, room[0], sums);
      out[1].as<uint64_t>()[c] = sums.checksum;
    }
  });
  const int64_t buckets = width - 5;
  for (int64_t c = 1; c < made.shape[0]; c++) {
    double *whole = made.as<double>(), *part = whole + c * width;
    for (int64_t k = 0; k < buckets + 3; k++) whole[k] += part[k];
    whole[buckets + 3] = std::min(whole[buckets + 3], part[buckets + 3]);
    whole[buckets + 4] = std::max(whole[buckets + 4], part[buckets + 4]);
    out[1].as<uint64_t>()[0] += out[1].as<uint64_t>()[c];
  }
}
