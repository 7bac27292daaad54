// Dispatch from a view's dtype to a C++ type, and loads and stores with tails, rounding and non-temporal stores.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "kernel.h"
#include "vec.h"

// body(static_cast<T *>(nullptr)) with T the type of a floating-point dtype; others are refused in Python.
template <typename Body>
void with_type(int32_t dtype, const Body &body) {
  switch (dtype) {
    case BF16: return body(static_cast<bf16 *>(nullptr));
    case F16: return body(static_cast<f16 *>(nullptr));
    default: return body(static_cast<float *>(nullptr));
  }
}
template <typename Body>
void with_types(int32_t first, int32_t second, const Body &body) {
  with_type(first, [&](auto *a) { with_type(second, [&](auto *b) { body(a, b); }); });
}

template <typename T>
static inline vf get(const T *p, int n) {
  return n == W ? load(p) : load_part(p, n);
}

static inline vf clear_after(vf x, int n) {
  float lanes[W];
  store(lanes, x);
  for (int i = n; i < W; i++) lanes[i] = 0.0f;
  return load(lanes);
}

template <typename T>
static inline vf rounded(vf x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T lanes[W];
  store(lanes, x);
  return load(lanes);
}

// Whether an output is larger than the caches: it is then written with non-temporal stores, which save reading every
// cache line before it is overwritten.
constexpr int64_t kFarBytes = 8 << 20;
static inline bool streams(const View &view) {
  const int64_t bytes = view.size() * (view.dtype == F32 ? 4 : view.dtype == F64 || view.dtype == I64 ? 8 : 2);
  return bytes >= kFarBytes && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

template <typename T>
static inline void put(T *p, vf x, int n, bool far = false) {
  if (n < W) return store_part(p, x, n);
#if defined(__x86_64__)
  constexpr size_t kPieces = W * sizeof(T) / 16;
  if (kPieces && far && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>)
      if (reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_ps(p, (__m512)x);
#endif
    // MindSpore's memory begins 16 bytes after the start of a line; the processor combines the pieces of a line.
    __m128i pieces[std::max<size_t>(1, kPieces)];
    store(reinterpret_cast<T *>(pieces), x);
#pragma GCC unroll 4
    for (size_t i = 0; i < kPieces; i++) _mm_stream_si128(reinterpret_cast<__m128i *>(p) + i, pieces[i]);
    return;
  }
#endif
  store(p, x);
}
// Elements from p to the next cache line: vectors from there on are written with one store each, and loaded likewise
// where inputs and output have the same alignment, as MindSpore's have. 0 where no element begins a line.
template <typename T>
static inline int64_t to_line(const T *p) {
  const uintptr_t beyond = reinterpret_cast<uintptr_t>(p) % 64;
  return beyond % sizeof(T) ? 0 : (64 - beyond) % 64 / sizeof(T);
}

// body(i, n) for the elements [first, last), n <= W at a time, with whole vectors from ``first`` + ``head`` on.
template <typename Body>
__attribute__((always_inline)) inline void by_vectors(int64_t first, int64_t last, int64_t head, const Body &body) {
  int64_t i = first, to = std::min(last, first + head);
  for (bool whole = true;; whole = false, to = last) {
    while (i < to) {
      const int n = static_cast<int>(std::min<int64_t>(W, to - i));
      body(i, n);
      i += n;
    }
    if (!whole) return;
    for (; i + W <= last; i += W) body(i, W);
  }
}

// Prefetch of the next row during the computation of this one, so that memory and processor work in parallel. With two
// passes over a row, each prefetches one of the inputs.
template <typename T>
static inline void ahead(const T *p, bool far) {
  if (far) __builtin_prefetch(p, 0, 2);
}

// Zero ``count`` elements.
template <typename T>
static inline void clear(T *p, int64_t count, bool far) {
  by_vectors(0, count, to_line(p), [&](int64_t i, int n) { put(p + i, splat(0.0f), n, far); });
}

// The same for float32. AMD's CLZERO clears a cache line in less than half the time of non-temporal stores
// (measured: 55 to 77 GB/s and 27 GB/s) and needs a fence as they do.
static inline void clear(float *p, int64_t count, bool far) {
#if defined(__CLZERO__)
  if (far) {
    const int64_t head = std::min(count, to_line(p)), lines = (count - head) / 16;
    std::memset(p, 0, head * sizeof(float));
    for (int64_t i = 0; i < lines; i++) _mm_clzero(p + head + i * 16);
    std::memset(p + head + lines * 16, 0, (count - head - lines * 16) * sizeof(float));
    return;
  }
#endif
  by_vectors(0, count, to_line(p), [&](int64_t i, int n) { put(p + i, splat(0.0f), n, far); });
}

static inline void fence(bool far) {
#if defined(__x86_64__)
  if (far) _mm_sfence();
#endif
}

static inline int64_t load_index(const View &view, int64_t i) {
  return view.dtype == I64 ? view.as<int64_t>()[i] : view.as<int32_t>()[i];
}
