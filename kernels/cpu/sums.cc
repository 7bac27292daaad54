// Sums of records: sketch, extremes, block sums and checksum of float32 matrices, all in one reading of each.
//
// The definitions are numpy's, in core/parity/record: sketch.py (Projection), blocks.py (Grid) and window.py (checksum).
// Every sum here has their order, so that the bits are equal: products with +1 and -1 and squares of float32 are exact
// in float64, whether they are fused with an addition or not. The threads share the tiles of all matrices of a call;
// each tile has sums of its own, which one thread then adds in their order.
#include <limits>
#include <type_traits>

#include "kernel.h"
#include "vec.h"

namespace {

constexpr int kRows = 128, kGroup = 4, kGroups = kRows / kGroup;  // rows of a block of the hash; with one shift
constexpr int64_t kTile = 1024;  // columns: a block of them stays in a processor's second cache
constexpr int kLanes = 8, kMostBuckets = 256;
constexpr int64_t kMostTiles = 1024;  // whose sums are kept until they are added: 2 MB
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

using Doubles = std::vector<double, OnLines<double>>;
struct Keys {
  uint64_t blocks, shifts, rows, down;
};

// What one tile or more add up, in the order of a row of the output.
struct Sums {
  double *sketch;  // [K]
  double *nonfinite, *norm2, *sum, *least, *most;
  Sums(double *out, int64_t buckets)
      : sketch(out), nonfinite(out + buckets), norm2(nonfinite + 1), sum(norm2 + 1), least(sum + 1), most(least + 1) {}
  void clear() {
    std::fill(sketch, least, 0.0);
    *least = std::numeric_limits<double>::infinity(), *most = -*least;
  }
  void add(const Sums &other) {
    for (double *to = sketch, *from = other.sketch; to != least; to++, from++) *to += *from;
    *least = std::min(*least, *other.least), *most = std::max(*most, *other.most);
  }
};

// Sums by row of a group and by column modulo kLanes, and extremes.
struct Lanes {
  vd squares[kGroup], sums[kGroup];
  vs least, most;
};

// Room of one thread: two joined rows, a row of zeros, and, once it is needed, a tile without what is not finite.
// ``added`` has the places of a bucket's shift plus a column's, of which those from K on are the same buckets again.
struct Room {
  alignas(64) double joined[2][kTile];
  alignas(64) float zeros[kTile];
  alignas(64) double added[2 * kMostBuckets];
  Floats clean;
};

// A joined row that is added, column by column, to the buckets of its shift and the column's place.
struct Scatter {
  const double *joined;
  const uint8_t *places;
  double *added;
  void add(int64_t j) const { added[places[j]] += joined[j]; }
};

// joined = the sum of N rows with their signs, times the columns' signs; adds to the lanes' sums and, of the first ``m``
// columns, extremes. ``before``: the joined row before, added meanwhile: its loads and stores wait for one another, and
// the processor has none of these units' work else. ``next``: N rows that come later, fetched meanwhile into the second cache (the first has too
// few lines under way): the rows of a block are read in a random order, which no processor foresees.
template <int N, bool EXTREMES>
void join(const float *const *rows, const float *const *next, const double *signs, const float *columns, int64_t m,
          const Scatter &before, double *joined, Lanes &given) {
  Lanes lanes = given;
  const auto step = [&](const float *const (&at)[N], int64_t j, const float *across, double *out) {
    vd sum{};
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
      const vs x = get<vs>(at[r] + j);
      const vd v = widen(x);
      sum += v * signs[r];
      lanes.squares[r] += v * v;
      lanes.sums[r] += v;
      if constexpr (EXTREMES) lanes.least = x < lanes.least ? x : lanes.least, lanes.most = x > lanes.most ? x : lanes.most;
    }
    put(out, sum * widen(get<vs>(across)));
  };
  const float *at[N], *after[N];
  for (int r = 0; r < N; r++) at[r] = rows[r], after[r] = next[r];
  int64_t j = 0;
  for (; j + kLanes <= m; j += kLanes) {
    if (!(j & kLanes))
      for (int r = 0; r < N; r++) __builtin_prefetch(after[r] + j, 0, 2);
    step(at, j, columns + j, joined + j);
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; l++) before.add(j + l);
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
    std::copy(out, out + (m - j), joined + j);
    for (; j < m; j++) before.add(j);
  }
  given = lanes;
}

double total(const vd *lanes, int rows) {
  double sum = 0.0;
  for (int r = 0; r < rows; r++)
    for (int l = 0; l < kLanes; l++) sum += lanes[r][l];
  return sum;
}

struct Matrix;

// Rows [begin, end) of one block of the hash and columns [left, left + m) of ``matrix``, in the order in which they are
// added: ``count`` groups of one row, or of kGroup.
struct Tile {
  const Matrix *matrix;
  int64_t begin, end, left, m;
  const float *rows[kRows];
  double signs[kRows];
  bool there[kRows];
  uint8_t shifts[kGroups];
  int count, group;
};

// Sums of N neighbours, a power of two, of kLanes * N numbers: of pairs, of pairs of these and so on.
template <int N>
inline vd add_neighbours(const float *row) {
  if constexpr (N == 1) {
    return widen(get<vs>(row));
  } else {
    const vl even{0, 2, 4, 6, 8, 10, 12, 14}, odd{1, 3, 5, 7, 9, 11, 13, 15};
    const vd a = add_neighbours<N / 2>(row), b = add_neighbours<N / 2>(row + kLanes * N / 2);
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  }
}

// Sums of ``width`` neighbours of ``row`` [m], a power of two, as above, into ``sums`` [m / width].
void add_neighbours(const float *row, int64_t m, int64_t width, double *sums) {
  int64_t j = 0;
  const auto whole = [&](auto at_once) {
    constexpr int N = decltype(at_once)::value;
    for (; (j + kLanes) * N <= m; j += kLanes) put(sums + j, add_neighbours<N>(row + j * N));
    for (; j * N < m; j++) {
      double part[N];
      for (int i = 0; i < N; i++) part[i] = row[j * N + i];
      for (int n = N / 2; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] = part[2 * i] + part[2 * i + 1];
      sums[j] = part[0];
    }
  };
  if (width == 1) return whole(std::integral_constant<int, 1>());
  if (width == 2) return whole(std::integral_constant<int, 2>());
  if (width == 4) return whole(std::integral_constant<int, 4>());
  whole(std::integral_constant<int, 8>());
  for (int64_t made = 8, n = m / 16; made < width; made *= 2, n /= 2)
    for (int64_t i = 0; i < n; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
}

// As kernels/sums.py lays it out in a row of its table, every field 8 bytes.
struct Matrix {
  const float *data;
  int64_t stride, m;       // elements between two rows; columns
  const int64_t *numbers;  // of the rows in the tensor's matrix; of the first alone where they count on
  int64_t in_turn;
  const int64_t *runs;  // [run_count + 1]: where rows of another block of the hash begin, and their number
  int64_t run_count, many;  // ``many`` runs are a chunk: the sums of chunks are added, those of tiles within one first
  const uint8_t *places;    // bucket of each column
  const float *signs;       // of each column
  const uint64_t *across;   // factors of the checksum, of each column; none without a checksum
  Keys keys;
  int64_t height, width, first_block;  // of a block; number of the first one in a row
  int64_t fresh;  // the block sums are written in place of added to: each of them is one row's, and all are made here
  void *blocks;   // [rows / height, blocks_stride], none without block sums
  int64_t narrow, blocks_stride;  // they are float32
  int64_t buckets;

  int64_t number(int64_t i) const { return in_turn ? numbers[0] + i : numbers[i]; }
  int64_t across_tiles() const { return (m + kTile - 1) / kTile; }
  int64_t tiles() const { return run_count * across_tiles(); }

  // One pass over a tile; false where its squares are not below kLargest. ``after``: rows of the tile that comes next.
  template <bool EXTREMES>
  bool pass(const Tile &tile, const float *const *after, Room &room, Lanes &lanes) const {
    const int64_t left = tile.left, m = tile.m;
    std::fill(std::begin(lanes.squares), std::end(lanes.squares), vd{});
    std::fill(std::begin(lanes.sums), std::end(lanes.sums), vd{});
    std::fill(room.added, room.added + 2 * buckets, 0.0);
    std::fill(room.joined[1], room.joined[1] + m, 0.0);
    Scatter before{room.joined[1], places + left, room.added};
    for (int g = 0; g < tile.count; g++) {
      const int first = g * tile.group;
      const float *const *rows = tile.rows + first;
      const float *const *next = g + kAhead < tile.count ? rows + kAhead * tile.group : after + (g + kAhead - tile.count) * tile.group;
      const double *signs_of = tile.signs + first;
      double *joined = room.joined[g & 1];
      if (tile.group == 1) {
        join<1, EXTREMES>(rows, next, signs_of, signs + left, m, before, joined, lanes);
      } else if (tile.there[first] && tile.there[first + 1] && tile.there[first + 2] && tile.there[first + 3]) {
        join<kGroup, EXTREMES>(rows, next, signs_of, signs + left, m, before, joined, lanes);
      } else {
        join<kGroup, false>(rows, next, signs_of, signs + left, m, before, joined, lanes);
        for (int r = 0; EXTREMES && r < kGroup; r++)
          for (int64_t j = 0; tile.there[first + r] && j < m; j++)
            lanes.least[0] = std::min<float>(lanes.least[0], rows[r][j]), lanes.most[0] = std::max<float>(lanes.most[0], rows[r][j]);
      }
      before = {joined, places + left, room.added + tile.shifts[g]};
    }
    for (int64_t j = 0; j < m; j++) before.add(j);
    return total(lanes.squares, tile.group) < kLargest;
  }

  // Tile ``index`` of this matrix, of those of a run of rows after one another.
  void lay(int64_t index, Tile &tile, const Room &room) const {
    const int64_t run = index / across_tiles();
    tile.matrix = this, tile.begin = runs[run], tile.end = runs[run + 1];
    tile.left = (index - run * across_tiles()) * kTile, tile.m = std::min(kTile, m - tile.left);
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

  // The sums of one tile, but for those of blocks; returns its checksum. ``after``: see ``pass``.
  uint64_t add(Tile &tile, const float *const *after, Room &room, const Sums &out) const {
    const int64_t left = tile.left, m = tile.m;
    Lanes lanes;
    lanes.least = vs{} + std::numeric_limits<float>::infinity(), lanes.most = -lanes.least;
    const bool fine = pass<true>(tile, after, room, lanes);
    *out.nonfinite = 0.0;
    if (!fine) {
      *out.nonfinite = without_nonfinite(tile, m, room, lanes);
      pass<false>(tile, after, room, lanes);
    }
    *out.least = std::numeric_limits<double>::infinity(), *out.most = -*out.least;
    for (int l = 0; l < kLanes; l++) {
      *out.least = std::min(*out.least, static_cast<double>(lanes.least[l]));
      *out.most = std::max(*out.most, static_cast<double>(lanes.most[l]));
    }
    *out.norm2 = total(lanes.squares, tile.group), *out.sum = total(lanes.sums, tile.group);
    for (int64_t k = 0; k < buckets; k++) out.sketch[k] = room.added[k] + room.added[k + buckets];
    uint64_t found = 0;
    for (int64_t i = tile.begin; across && i < tile.end; i++)
      found += checksum(data + i * stride + left, left, m) * (mixed(keys.down, number(i)) | 1);
    for (int64_t i = tile.begin; blocks && i < tile.end; i++) add_blocks(i, left, m, fine, room);
    return found;
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
    double *sums = room.joined[0];
    add_neighbours(row, m, width, sums);
    const int64_t at = number(i) / height * blocks_stride + first_block + left / width, n = m / width;
    if (narrow && fresh)
      for (int64_t b = 0; b < n; b++) static_cast<float *>(blocks)[at + b] = sums[b];
    else if (narrow)
      for (int64_t b = 0; b < n; b++) static_cast<float *>(blocks)[at + b] += sums[b];
    else
      for (int64_t b = 0; b < n; b++) static_cast<double *>(blocks)[at + b] += sums[b];
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

constexpr int kFields = sizeof(Matrix) / 8;
static_assert(sizeof(Matrix) == kFields * 8 && kFields == 23);

// All tiles of ``count`` matrices, of which matrix i has those from firsts[i] to firsts[i + 1].
struct Tiles {
  const Matrix *matrices;
  std::vector<int64_t> firsts;

  Tiles(const Matrix *given, int64_t count) : matrices(given), firsts(1, 0) {
    for (int64_t i = 0; i < count; i++) firsts.push_back(firsts.back() + given[i].tiles());
  }
  int64_t matrix_of(int64_t tile) const {
    return std::upper_bound(firsts.begin(), firsts.end(), tile) - firsts.begin() - 1;
  }
  void lay(int64_t number, Tile &tile, const Room &room) const {
    const int64_t i = matrix_of(number);
    matrices[i].lay(number - firsts[i], tile, room);
  }

  // Tiles [first, last) into rows of ``sums``, of ``width`` numbers, and ``checksums``, from ``base`` on. The next tile
  // is laid before one is added, so that its first rows are fetched meanwhile.
  void add(int64_t first, int64_t last, int64_t base, double *sums, int64_t width, uint64_t *checksums) const {
    std::vector<Room, OnLines<Room>> room(1);
    std::fill(room[0].zeros, room[0].zeros + kTile, 0.0f);
    Tile tiles[2];
    Tile *now = &tiles[0], *next = &tiles[1];
    lay(first, *now, room[0]);
    for (int64_t t = first; t < last; t++, std::swap(now, next)) {
      const bool more = t + 1 < last;
      if (more) lay(t + 1, *next, room[0]);
      const Sums out(sums + (t - base) * width, width - 5);
      checksums[t - base] = now->matrix->add(*now, (more ? next : now)->rows, room[0], out);
    }
  }
};

}  // namespace

// Of matrices that have a row of ``table`` [n, kFields] int64 each, the fields of Matrix: sketch [n, K + 5], of K sums
// and those of the members of Sums, and checksum [n] modulo 2^64: the sum of (bits + 1) * across[j] * down[i], 0 where
// ``across`` is none. Block sums are added to what ``blocks`` of a matrix points at, what is not finite as 0. Rows of a
// block follow one another.
KERNEL(record_add, 1, 2, 0) {
  const Matrix *matrices = in[0].as<Matrix>();
  const int64_t count = in[0].shape[0], width = out[0].shape[1];
  const Tiles tiles(matrices, count);
  double *made = out[0].as<double>();
  uint64_t *checksums = out[1].as<uint64_t>();
  for (int64_t i = 0; i < count; i++) Sums(made + i * width, width - 5).clear(), checksums[i] = 0;
  const int64_t all = tiles.firsts.back(), room = std::min(all, kMostTiles);
  Doubles sums(room * width), chunk(width);
  std::vector<uint64_t> found(room);
  Sums part(chunk.data(), width - 5);
  for (int64_t first = 0; first < all; first += room) {
    const int64_t last = std::min(all, first + room);
    parallel_guided(last - first, 1, [&](int64_t a, int64_t b) {
      tiles.add(first + a, first + b, first, sums.data(), width, found.data());
    });
    for (int64_t t = first, i = tiles.matrix_of(first); t < last; t++) {
      while (t >= tiles.firsts[i + 1]) i++;
      const int64_t of_chunk = matrices[i].many * matrices[i].across_tiles(), at = t - tiles.firsts[i];
      if (at % of_chunk == 0) part.clear();
      part.add(Sums(sums.data() + (t - first) * width, width - 5)), checksums[i] += found[t - first];
      if ((at + 1) % of_chunk == 0 || t + 1 == tiles.firsts[i + 1]) Sums(made + i * width, width - 5).add(part);
    }
  }
}
