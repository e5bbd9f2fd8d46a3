// Which dataset gives sample i of a blend. Rules and names: megapre/data/blend.py.
//
// The comparison w * max(i, 1) - count decides ties in favour of the first dataset, so it has to round as in NumPy: the
// product first, then the difference. A fused multiply-add would round once and choose another dataset now and then.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "host.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace megapre {
namespace {

using Weights = py::array_t<double, py::array::c_style>;
using Sizes = py::array_t<int64_t, py::array::c_style>;

// `sizes` null: a weighted blend without end. Else a dataset leaves once all its samples were given.
void fill(const double* weights, const int64_t* sizes, int64_t datasets, int64_t size, int16_t* dataset,
          int64_t* sample) {
  std::vector<int64_t> given(datasets, 0);
  std::vector<int64_t> left;  // datasets that still have samples, in order
  for (int64_t d = 0; d < datasets; ++d) {
    if (sizes == nullptr || sizes[d] > 0) left.push_back(d);
  }
  for (int64_t i = 0; i < size; ++i) {
    const double at = std::max(static_cast<double>(i), 1.0);
    double most = -std::numeric_limits<double>::infinity();
    int64_t chosen = -1;
    for (const int64_t d : left) {
      const double wanted = weights[d] * at;
      const double behind = wanted - static_cast<double>(given[d]);
      if (behind > most) {
        most = behind;
        chosen = d;
      }
    }
    if (chosen < 0) throw std::invalid_argument("build_blend wants weights that are finite");
    dataset[i] = static_cast<int16_t>(chosen);
    sample[i] = given[chosen]++;
    if (sizes != nullptr && given[chosen] == sizes[chosen]) {
      left.erase(std::find(left.begin(), left.end(), chosen));
    }
  }
}

py::tuple build_blend(const Weights& weights, int64_t size, const py::object& sizes) {
  const int64_t datasets = weights.size();
  if (datasets < 1 || datasets > std::numeric_limits<int16_t>::max() || size < 0) {
    throw std::invalid_argument("build_blend wants 1 to 32767 weights and a size that is not negative");
  }
  Sizes limits;
  const int64_t* limit = nullptr;
  if (!sizes.is_none()) {
    limits = py::cast<Sizes>(sizes);
    int64_t total = 0;
    for (int64_t d = 0; d < limits.size(); ++d) total += limits.data()[d];
    if (limits.size() != datasets || total != size) {
      throw std::invalid_argument("build_blend wants one size for each weight, adding up to the size of the blend");
    }
    limit = limits.data();
  }
  py::array_t<int16_t> dataset(size);
  py::array_t<int64_t> sample(size);
  const double* weight = weights.data();
  int16_t* dataset_data = dataset.mutable_data();
  int64_t* sample_data = sample.mutable_data();
  {
    py::gil_scoped_release release;
    fill(weight, limit, datasets, size, dataset_data, sample_data);
  }
  return py::make_tuple(dataset, sample);
}

}  // namespace

void define_blend(py::module_& module) {
  module.def("build_blend", &build_blend, py::arg("weights"), py::arg("size"), py::arg("sizes") = py::none(),
             "(dataset int16, sample int64) of each sample of a weighted blend, or of an exhaustive one if sizes are given.");
}

}  // namespace megapre
