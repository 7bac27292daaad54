// Programs: kernels one after another in one call, on views that they share.
//
// A step of decoding is a hundred kernels of microseconds each. Called one by one from Python, the calls take as long as
// the kernels; here they take nothing, and the arithmetic is that of the same kernels called singly.
#include "kernel.h"
#include "types.h"

namespace {
constexpr int kMostViews = 16, kMostScalars = 8;

// of [count] copied to ``to`` by their indices in ``words``.
template <typename T>
const int32_t *gather(const int32_t *words, int count, const T *of, T *to) {
  for (int i = 0; i < count; i++) to[i] = of[words[i]];
  return words + count;
}
}  // namespace

extern "C" {
void tele_run(int number, const View *in, const View *out, const double *scalars);

// words: for each kernel its number, its counts of inputs, outputs and scalars, and their indices in ``views`` and
// ``scalars``; Python checks counts and indices (kernels/cpu/program.py).
void tele_run_program(const int32_t *words, int64_t count, const View *views, const double *scalars) {
  View in[kMostViews], out[kMostViews];
  double given[kMostScalars];
  for (const int32_t *end = words + count; words < end;) {
    const int32_t number = words[0], inputs = words[1], outputs = words[2], values = words[3];
    words = gather(words + 4, inputs, views, in);
    words = gather(words, outputs, views, out);
    words = gather(words, values, scalars, given);
    tele_run(number, in, out, given);
  }
}
}

// in: x [..., C], bias [C] float32; out: x * factor, rounded to the dtype of x, plus bias, in the dtype of the output;
// scalars: factor, has bias
KERNEL(scaled, 2, 1, 2) {
  const int64_t rows = in[0].rows(), columns = in[0].columns();
  const float factor = static_cast<float>(scalar[0]);
  const float *bias = scalar[1] ? in[1].as<float>() : nullptr;
  with_types(in[0].dtype, out[0].dtype, [&](auto *tx, auto *to) {
    using X = std::remove_pointer_t<decltype(tx)>;
    using O = std::remove_pointer_t<decltype(to)>;
    parallel(rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)), [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < columns; i += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, columns - i));
          vf x = get(in[0].as<X>() + row * columns + i, n);
          if (factor != 1.0f) x = rounded<X>(x * factor);
          if (bias) x = x + get(bias + i, n);
          put(out[0].as<O>() + row * columns + i, x, n);
        }
    });
  });
}

// in: x. Nothing is done: a framework has put x where kernels read it.
KERNEL(placed, 1, 0, 0) {}
