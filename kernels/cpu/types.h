// From a view's dtype to the C++ type, and loads and stores that know about tails, rounding and far memory.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "kernel.h"
#include "vec.h"

// body(static_cast<T *>(nullptr)) with T the type of a floating-point dtype. Python refuses the other ones.
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

// An output larger than the caches is not read back from them: writing past them saves the read of every line before
// it is overwritten.
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
    // MindSpore's memory begins 16 bytes behind a line; the processor joins the pieces of one.
    __m128i pieces[std::max<size_t>(1, kPieces)];
    store(reinterpret_cast<T *>(pieces), x);
#pragma GCC unroll 4
    for (size_t i = 0; i < kPieces; i++) _mm_stream_si128(reinterpret_cast<__m128i *>(p) + i, pieces[i]);
    return;
  }
#endif
  store(p, x);
}
// Elements from p to the next line of the caches: vectors from there on are written with one store each, and read so
// where the inputs lie as the output does, as MindSpore's do. 0 where no element begins a line.
template <typename T>
static inline int64_t to_line(const T *p) {
  const uintptr_t beyond = reinterpret_cast<uintptr_t>(p) % 64;
  return beyond % sizeof(T) ? 0 : (64 - beyond) % 64 / sizeof(T);
}

// body(i, n) for the elements [first, last), n <= W at a time, whole vectors beginning ``head`` behind ``first``.
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

// Memory that is read next, asked for while the present row is computed with and written: otherwise memory and
// processor take turns. Of two inputs one is asked for in each pass over the row.
template <typename T>
static inline void ahead(const T *p, bool far) {
  if (far) __builtin_prefetch(p, 0, 2);
}

// Zeros. AMD's processors have an instruction for a line of them, which takes half the time of writing it past the
// caches (measured: 55 to 77 GB/s and 27); a fence has to follow that, too.
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
