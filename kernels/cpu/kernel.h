// What every kernel file shares: the views that kernels get, their registry, and the parallel loop.
//
// A kernel is a plain function over views, free of MindSpore: bindings.cc hands it tensors, the tests hand it numpy
// arrays through ctypes. Arguments are checked in Python (kernels/cpu/ops.py); a kernel trusts its views.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, I32 = 3, I64 = 4, F64 = 5 };

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

// body(first, last, thread) over [0, n) in one piece a thread, none smaller than ``grain``. The same pieces every time,
// so that sums over them come out with the same bits.
int threads_for(int64_t n, int64_t grain);

template <typename Body>
void parallel(int64_t n, int64_t grain, const Body &body) {
  const int threads = threads_for(n, grain);
  if (threads <= 1) {
    if (n > 0) body(int64_t{0}, n, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
    const int64_t first = n * t / of, last = n * (t + 1) / of;
    if (first < last) body(first, last, static_cast<int>(t));
  }
}

// body(item, thread) for every item, handed out as threads come free.
template <typename Body>
void parallel_items(int64_t n, const Body &body) {
  const int threads = threads_for(n, 1);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; i++) body(i, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) body(i, omp_get_thread_num());
  }
}
