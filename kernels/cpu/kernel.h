// Common declarations of the kernels: tensor views, the registry, and parallel loops.
//
// A kernel is a function over views, independent of MindSpore: bindings.cc passes tensors, the tests pass numpy arrays
// through ctypes. Arguments are checked in Python (kernels/cpu/ops.py), not in a kernel.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, I32 = 3, I64 = 4, F64 = 5, I8 = 6 };

// A tensor of up to 6 axes; strides count elements.
struct View {
  void *data;
  int64_t shape[6];
  int64_t stride[6];
  int32_t ndim;
  int32_t dtype;

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= shape[i];
    return n;
  }
  // Rows of a contiguous [..., columns].
  int64_t rows() const { return shape[ndim - 1] ? size() / shape[ndim - 1] : 0; }
  int64_t columns() const { return shape[ndim - 1]; }
  template <typename T>
  T *as() const {
    return static_cast<T *>(data);
  }
};

// Allocator aligned to cache lines, as a load or store that crosses a line costs two, or to large pages, which Linux is
// asked for: a panel of a packed matrix is scattered over more small pages than a processor keeps addresses of.
template <typename T>
struct OnLines {
  using value_type = T;
  static constexpr size_t kLargePage = 2 << 20;
  static std::align_val_t alignment(size_t n) { return std::align_val_t(n * sizeof(T) >= kLargePage ? kLargePage : 64); }
  T *allocate(size_t n) {
    void *p = ::operator new(n * sizeof(T), alignment(n));
#if defined(__linux__)
    if (n * sizeof(T) >= kLargePage) madvise(p, n * sizeof(T) / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
    return static_cast<T *>(p);
  }
  void deallocate(T *p, size_t n) { ::operator delete(p, alignment(n)); }
  bool operator==(const OnLines &) const { return true; }
  bool operator!=(const OnLines &) const { return false; }
};
using Floats = std::vector<float, OnLines<float>>;

using Kernel = void (*)(const View *in, const View *out, const double *scalars);

struct Registration {
  Registration(const char *name, int inputs, int outputs, int scalars, Kernel kernel);
};

// KERNEL(name, inputs, outputs, scalars) { body over in, out, scalars }
#define KERNEL(name, inputs, outputs, scalars)                                             \
  static void kernel_##name(const View *, const View *, const double *);                   \
  static const Registration register_##name(#name, inputs, outputs, scalars, kernel_##name); \
  static void kernel_##name([[maybe_unused]] const View *in, [[maybe_unused]] const View *out, \
                            [[maybe_unused]] const double *scalar)

// Threads worth starting for n items, at least ``grain`` items each, and the number of pieces they share: several per
// thread, so that a thread that loses its processor, e.g. to a spinning thread of a framework, delays one piece only.
int threads_for(int64_t n, int64_t grain);
constexpr int64_t kTurns = 8;
inline int pieces_for(int64_t n, int64_t grain) {
  const int threads = threads_for(n, grain);
  return threads <= 1 ? 1 : static_cast<int>(std::min(threads * kTurns, n / std::max<int64_t>(1, grain)));
}

// body(first, last, piece) over [0, n) in pieces_for(n, grain) pieces, scheduled dynamically. The pieces are the same
// in every call, so that sums over them are deterministic.
template <typename Body>
void parallel(int64_t n, int64_t grain, const Body &body) {
  const int pieces = pieces_for(n, grain);
  if (pieces <= 1) {
    if (n > 0) body(int64_t{0}, n, 0);
    return;
  }
  struct Context {
    const Body &body;
    int64_t n, of;
  } context{body, n, pieces};
  run_pieces(pieces, threads_for(n, grain), [](void *given, int64_t t) {
    const Context &c = *static_cast<Context *>(given);
    const int64_t first = c.n * t / c.of, last = c.n * (t + 1) / c.of;
    if (first < last) c.body(first, last, static_cast<int>(t));
  }, &context);
}

// body(first, last) over [0, n) in pieces that become smaller, down to one item: threads of unequal speed end together, as
// long as a result does not depend on its piece (guided self-scheduling, Polychronopoulos and Kuck, 1987).
template <typename Body>
void parallel_guided(int64_t n, int64_t grain, const Body &body) {
  const int threads = threads_for(n, grain);
  if (threads <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  std::vector<int64_t> ends;
  for (int64_t end = 0; end < n;) ends.push_back(end += std::max<int64_t>(1, (n - end) / (2 * threads)));
  struct Context {
    const Body &body;
    const int64_t *ends;
  } context{body, ends.data()};
  run_pieces(static_cast<int64_t>(ends.size()), threads, [](void *given, int64_t t) {
    const Context &c = *static_cast<Context *>(given);
    c.body(t ? c.ends[t - 1] : 0, c.ends[t]);
  }, &context);
}

// body(item, hand) for every item, scheduled dynamically; ``hand`` numbers the threads, for buffers of their own.
template <typename Body>
void parallel_items(int64_t n, const Body &body) {
  const int threads = threads_for(n, 1);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; i++) body(i, 0);
    return;
  }
  struct Context {
    const Body &body;
    int64_t n;
    std::atomic<int64_t> next;
  } context{body, n, {0}};
  run_pieces(threads, threads, [](void *given, int64_t t) {
    Context &c = *static_cast<Context *>(given);
    for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) c.body(i, static_cast<int>(t));
  }, &context);
}
