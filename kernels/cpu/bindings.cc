// MindSpore binding: one operator that runs any kernel by number.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernel.h"
#include "ms_extension/api.h"

extern "C" {
int tele_kernel(const char *name, int *inputs, int *outputs, int *scalars);
void tele_run(int number, const View *in, const View *out, const double *scalars);
void tele_set_threads(int threads);
int tele_has_split();
void tele_refuse_split(int refuse);
}

namespace {

constexpr std::pair<ms::TypeId, Dtype> kDtypes[] = {
  {ms::TypeId::kNumberTypeFloat32, F32}, {ms::TypeId::kNumberTypeBFloat16, BF16},
  {ms::TypeId::kNumberTypeFloat16, F16}, {ms::TypeId::kNumberTypeInt32, I32},
  {ms::TypeId::kNumberTypeInt64, I64},   {ms::TypeId::kNumberTypeFloat64, F64},
  {ms::TypeId::kNumberTypeInt8, I8},
};

View view_of(const ms::Tensor &tensor) {
  View view{};
  view.dtype = -1;
  for (const auto &[type, code] : kDtypes)
    if (tensor.data_type() == type) view.dtype = code;
  if (view.dtype < 0) throw std::invalid_argument("dtype: not one of the kernels' dtypes");
  const auto &shape = tensor.shape();
  const auto stride = tensor.stride();
  if (shape.size() > 6) throw std::invalid_argument("shape: more than 6 axes");
  view.ndim = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); i++) view.shape[i] = shape[i], view.stride[i] = stride[i];
  view.data = tensor.GetDataPtr();
  return view;
}

class Runner : public ms::pynative::PyboostRunner {
 public:
  Runner(int number, std::vector<double> scalars)
      : PyboostRunner("tele_kernel"), number_(number), scalars_(std::move(scalars)) {}
  void LaunchKernel() override {
    std::vector<View> in, out;
    for (const auto &tensor : inputs()) in.push_back(view_of(tensor));
    for (const auto &tensor : outputs()) out.push_back(view_of(tensor));
    tele_run(number_, in.data(), out.data(), scalars_.data());
  }

 protected:
  // The base class hands the launch to a queue of its own, for which MindSpore's operators on the CPU do not wait: with
  // asynchronous launches they would read outputs before they are written (findings/
  // mindspore-operators-do-not-wait-for-a-custom-one.sh). Launched here, a kernel has its place in their order.
  void _DispatchLaunchTask() override { LaunchKernel(); }

 private:
  int number_;
  std::vector<double> scalars_;
};

using Specs = std::vector<std::pair<int, std::vector<int64_t>>>;

// The first ``strided`` inputs keep their strides; the others are made contiguous.
std::vector<ms::Tensor> launch(int number, std::vector<ms::Tensor> inputs, const Specs &specs,
                               const std::vector<double> &scalars, int strided) {
  std::vector<ms::Tensor> outputs;
  for (const auto &[code, shape] : specs) outputs.emplace_back(kDtypes[code].first, shape);
  for (size_t i = 0; i < inputs.size(); i++)
    if (static_cast<int>(i) < strided)
      inputs[i].SetNeedContiguous(false);
    else if (!inputs[i].is_contiguous())
      inputs[i] = inputs[i].contiguous();
  std::make_shared<Runner>(number, scalars)->Run(inputs, outputs);
  return outputs;
}

template <int N>
pybind11::object call(int number, const std::vector<ms::Tensor> &inputs, const Specs &specs,
                      const std::vector<double> &scalars, int strided) {
  return ms::pynative::PyboostRunner::Call<N>(
    [](int number, std::vector<ms::Tensor> inputs, Specs specs, std::vector<double> scalars, int strided) {
      return launch(number, std::move(inputs), specs, scalars, strided);
    },
    number, inputs, specs, scalars, strided);
}

pybind11::object run(int number, const std::vector<ms::Tensor> &inputs, const Specs &specs,
                     const std::vector<double> &scalars, int strided) {
  switch (specs.size()) {
    case 0: return call<0>(number, inputs, specs, scalars, strided);
    case 1: return call<1>(number, inputs, specs, scalars, strided);
    case 2: return call<2>(number, inputs, specs, scalars, strided);
    case 3: return call<3>(number, inputs, specs, scalars, strided);
    default: throw std::invalid_argument("outputs: more than 3");
  }
}

std::tuple<int, int, int, int> find(const std::string &name) {
  int inputs = 0, outputs = 0, scalars = 0;
  const int number = tele_kernel(name.c_str(), &inputs, &outputs, &scalars);
  return {number, inputs, outputs, scalars};
}

}  // namespace

PYBIND11_MODULE(MS_EXTENSION_NAME, m) {
  m.def("run", &run, "outputs of a kernel by its number");
  m.def("find", &find, "number (-1: unknown), and counts of inputs, outputs and scalars of a kernel");
  m.def("has_split", [] { return tele_has_split() != 0; }, "whether float32 products can use matrix tiles");
  m.def("refuse_split", [](bool refuse) { tele_refuse_split(refuse); }, "float32 products without matrix tiles");
  m.def("set_threads", &tele_set_threads, "maximum threads of a kernel; 0: OMP_NUM_THREADS, or one per processor");
}
