// Matrix tiles of AMX: permission, configuration and the product of a pair of row tiles with a strip.
//
// The state of the tiles is large, so Linux grants it to a process only on request. Without the instructions, or where
// the request is refused (an old kernel, a sandbox, a small signal stack), has_tiles() is false and vectors are used.
#pragma once

#include <cstdint>

#include "vec.h"

constexpr int64_t kTilePair = 32;  // rows of two tiles

// 32 rows of bfloat16 pairs, ``row`` apart; from one step of 16 pairs to the next, ``step``.
struct TileRows {
  const uint32_t *data;
  int64_t row, step;
};

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Asked of the kernel once per process; the grant holds for all of its threads, and a forked child inherits it.
inline bool has_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Eight tiles of 16 rows of 64 bytes for the current thread, while the object lives; released afterwards, so that a
// switch to another thread need not save them.
struct Tiles {
  bool active;
  explicit Tiles(bool wanted) : active(wanted) {
    if (!active) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (active) _tile_release();
  }
};

// c [32, 32] (+)= x [32, pairs] w [pairs, 32] of bfloat16 pairs, ``pairs`` a multiple of 16. Tiles 0 to 3 hold c, 4 and
// 5 two tiles of rows, 6 and 7 two tiles of outputs: four loads for four products. x is loaded as what is used once, so
// that w stays in the first cache; meanwhile ``share`` lines a step from ``ahead`` on, which need not exist, come into
// the second.
__attribute__((noinline)) inline void multiply_tiles(TileRows x, const uint32_t *w, int64_t pairs, float *c, bool add,
                                                     const uint32_t *ahead, int64_t share) {
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
  constexpr long kRowC = 32 * sizeof(float), kRowW = 32 * sizeof(uint32_t);
  const long row = x.row * sizeof(uint32_t);
  if (add) {
    _tile_loadd(0, c, kRowC);
    _tile_loadd(1, c + 16, kRowC);
    _tile_loadd(2, c + 16 * 32, kRowC);
    _tile_loadd(3, c + 16 * 32 + 16, kRowC);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < pairs; p += 16, x.data += x.step, w += 16 * 32) {
    for (int64_t i = 0; i < share; i++, ahead += 16) __builtin_prefetch(ahead, 0, 2);
    _tile_loadd(6, w, kRowW);
    _tile_stream_loadd(4, x.data, row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 16, kRowW);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, x.data + 16 * x.row, row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kRowC);
  _tile_stored(1, c + 16, kRowC);
  _tile_stored(2, c + 16 * 32, kRowC);
  _tile_stored(3, c + 16 * 32 + 16, kRowC);
  asm volatile("" ::: "memory");
}
#else
inline bool has_tiles() { return false; }
struct Tiles {
  explicit Tiles(bool) {}
};
inline void multiply_tiles(TileRows, const uint32_t *, int64_t, float *, bool, const uint32_t *, int64_t) {}
#endif
