// Products of float32 matrices in AMX tiles of bfloat16, each number as the three parts of split.h.
//
// c = a b is the sum of six of the nine products of parts: the terms left out are below 2^-24 of |a| |b|. A tile sums 32
// steps of k before it adds to c, so that c is rounded 6 times for 32 steps where multiply-adds round it 32 times.
#pragma once

#include "matmul.h"
#include "split.h"
#include "tiles.h"

constexpr int64_t kTileDepth = 32;                // steps of k of a tile: 16 pairs
constexpr int64_t kTileFloats = 16 * 16;          // words of a tile
constexpr int64_t kStepFloats = 6 * kTileFloats;  // of 32 steps of k of a panel: [3 parts][2 tiles][16][16 pairs]

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__linux__)
#define SPLIT_TILES 1

// Pairs along k, a below b in every word, of the three parts of a and b; to: the parts' tiles, two tiles apart.
inline void put_pairs(vf a, vf b, float *to) {
  const Split x = split(a), y = split(b);
  const auto pair = [](vf low, vf high) {
    return (vf)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)low, 16), (__m512i)high);
  };
  store(to, pair(x.first, y.first));
  store(to + 2 * kTileFloats, pair(x.second, y.second));
  store(to + 4 * kTileFloats, pair(x.third, y.third));
}

// The three tiles of a block of 16 rows and 32 steps of k, with the pairs in rows (DOWN: an operand b) or the matrix's
// rows in rows (a).
template <bool DOWN>
inline void pack_tiles(const float *p, int64_t row, int64_t column, float *to) {
  alignas(64) float even[W * W], odd[W * W];
  if (column == 1 && DOWN) {  // [16, 32] in memory: transposed, a row holds one step of k
    transpose_block(p, row, even, W);
    transpose_block(p + W, row, odd, W);
    for (int i = 0; i < W / 2; i++) {
      put_pairs(load(even + 2 * i * W), load(even + (2 * i + 1) * W), to + i * W);
      put_pairs(load(odd + 2 * i * W), load(odd + (2 * i + 1) * W), to + (W / 2 + i) * W);
    }
  } else if (column == 1) {
    vi first, second;
    for (int i = 0; i < W; i++) first[i] = 2 * i, second[i] = 2 * i + 1;
    for (int i = 0; i < W; i++) {
      const vf x = load(p + i * row), y = load(p + i * row + W);
      put_pairs(__builtin_shuffle(x, y, first), __builtin_shuffle(x, y, second), to + i * W);
    }
  } else if (DOWN) {
    for (int i = 0; i < W; i++) put_pairs(load(p + 2 * i * column), load(p + (2 * i + 1) * column), to + i * W);
  } else {  // [32, 16] in memory: the even and the odd steps of k, transposed
    transpose_block(p, 2 * column, even, W);
    transpose_block(p + column, 2 * column, odd, W);
    for (int i = 0; i < W; i++) put_pairs(load(even + i * W), load(odd + i * W), to + i * W);
  }
}

// Tiles of a block at the matrix's edge: ``rows`` of 16 rows and ``depth`` of 32 steps exist, the others are zero.
template <bool DOWN>
void pack_edge(const float *p, int64_t row, int64_t column, int64_t rows, int64_t depth, float *to) {
  alignas(64) float block[16 * kTileDepth] = {};
  const int64_t block_row = column == 1 ? kTileDepth : 1, block_column = column == 1 ? 1 : 16;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < depth; j++) block[i * block_row + j * block_column] = p[i * row + j * column];
  pack_tiles<DOWN>(block, block_row, block_column, to);
}

// ``panels`` panels [steps][3 parts][2 tiles][16][16 pairs] of the 32 rows each from ``first`` on, of ``rows`` in all, and
// of ``steps`` times 32 steps of k from ``from`` on, of k in all; zero where the matrix has no element.
template <bool DOWN>
void pack_panels(const Operand &x, int64_t first, int64_t panels, int64_t rows, int64_t from, int64_t steps, int64_t k,
                 float *to) {
  const auto block = [&](int64_t t, int64_t s) {
    const int64_t row = first + 16 * t, step = from + s * kTileDepth;
    const int64_t have = std::clamp<int64_t>(rows - row, 0, 16), deep = std::clamp<int64_t>(k - step, 0, kTileDepth);
    float *tile = to + (t / 2 * steps + s) * kStepFloats + t % 2 * kTileFloats;
    if (have == 16 && deep == kTileDepth)
      pack_tiles<DOWN>(x.data + row * x.row + step * x.column, x.row, x.column, tile);
    else
      pack_edge<DOWN>(have ? x.data + row * x.row + step * x.column : x.data, x.row, x.column, have, deep, tile);
  };
  // In the order of memory, which the processor's prefetchers follow.
  if (x.column == 1)
    for (int64_t t = 0; t < 2 * panels; t++)
      for (int64_t s = 0; s < steps; s++) block(t, s);
  else
    for (int64_t s = 0; s < steps; s++)
      for (int64_t t = 0; t < 2 * panels; t++) block(t, s);
}

// c [32, 32] = begin + a b, where ``begin`` is c itself, one row (a bias) for all rows with begin_row 0, or null for zero.
// Tiles 0 to 3 hold c, 4 and 5 a part of a, 6 and 7 a part of b. Small products first; in this order of the six only one
// operand changes from one to the next: 14 loads for 24 products of tiles.
__attribute__((noinline)) inline void multiply_panels(const float *a, const float *b, int64_t steps, const float *begin,
                                                      int64_t begin_row, float *c, int64_t c_row) {
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
  const long from = begin_row * sizeof(float), row = c_row * sizeof(float);
  for (int64_t i = 0; i < 32; i++) __builtin_prefetch(c + i * c_row, 1), __builtin_prefetch(c + i * c_row + 16, 1);
  if (begin) {
    _tile_loadd(0, begin, from);
    _tile_loadd(1, begin + 16, from);
    _tile_loadd(2, begin + 16 * begin_row, from);
    _tile_loadd(3, begin + 16 * begin_row + 16, from);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // The instructions' tiles are constants: hence macros.
#define LOAD_PART(first, second, x, part)                           \
  _tile_loadd(first, (x) + 2 * (part) * kTileFloats, 64);           \
  _tile_loadd(second, (x) + (2 * (part) + 1) * kTileFloats, 64)
#define MULTIPLY            \
  _tile_dpbf16ps(0, 4, 6);  \
  _tile_dpbf16ps(1, 4, 7);  \
  _tile_dpbf16ps(2, 5, 6);  \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t s = 0; s < steps; s++, a += kStepFloats, b += kStepFloats) {
    LOAD_PART(4, 5, a, 2);
    LOAD_PART(6, 7, b, 0);
    MULTIPLY;  // third * first
    LOAD_PART(4, 5, a, 1);
    MULTIPLY;  // second * first
    LOAD_PART(6, 7, b, 1);
    MULTIPLY;  // second * second
    LOAD_PART(4, 5, a, 0);
    MULTIPLY;  // first * second
    LOAD_PART(6, 7, b, 2);
    MULTIPLY;  // first * third
    LOAD_PART(6, 7, b, 0);
    MULTIPLY;  // first * first
  }
#undef LOAD_PART
#undef MULTIPLY
  _tile_stored(0, c, row);
  _tile_stored(1, c + 16, row);
  _tile_stored(2, c + 16 * c_row, row);
  _tile_stored(3, c + 16 * c_row + 16, row);
  asm volatile("" ::: "memory");
}
#endif
