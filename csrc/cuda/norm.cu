// Driver of layer_norm and rms_norm: checks, memory, policy. The kernels are in norm_forward.h and norm_backward.h.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <optional>
#include <tuple>

#include "launch.h"
#include "norm_forward.h"
#include "ops.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

// layer_norm is the one that subtracts the mean.
struct Kind {
  const char* name;
  bool centred;
};

constexpr Kind kLayerNorm{"layer_norm", true}, kRmsNorm{"rms_norm", false};

void check_input(Kind kind, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check(x.dim() >= 1, kind.name, ": the input has no dimension to normalise over");
  check(
      weight.dim() == 1 && weight.size(0) == x.size(-1), kind.name, ": weight is ", describe(weight),
      " but rows of the input have ", x.size(-1), " elements");
  check(
      !bias.has_value() || sizes_of(*bias) == sizes_of(weight), kind.name, ": bias is ",
      describe(bias.value_or(weight)), " but weight is ", describe(weight));
}

// A vector of weights, or of biases: in the dtype of x or in fp32, neighbours, 16-byte aligned.
Tensor parameter(const Tensor& vector, const Tensor& x) {
  const bool as_it_is = vector.scalar_type() == x.scalar_type() || vector.scalar_type() == ScalarType::Float;
  Tensor ready = torch::stable::contiguous(as_it_is ? vector : torch::stable::to(vector, ScalarType::Float));
  return is_aligned(ready.data_ptr()) ? ready : torch::stable::clone(ready);
}

// y, h (empty without a residual), mean (empty for rms_norm), rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Kind kind, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
    const OptionalTensor& residual) {
  check_input(kind, x, weight, bias);
  if (residual.has_value()) {
    check_like(kind.name, *residual, x, "residual", "x");
  }
  const DeviceGuard guard(x);
  const Rows x_rows(x);
  const std::optional<Rows> residual_rows = residual.has_value() ? std::optional<Rows>(*residual) : std::nullopt;
  const Tensor w = parameter(weight, x);
  const OptionalTensor b = bias.has_value() ? OptionalTensor(parameter(*bias, x)) : std::nullopt;
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  Tensor h = empty(x, residual_rows ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type());
  Tensor mean = empty(x, {kind.centred ? x_rows.count : 0}, ScalarType::Float);
  Tensor rstd = empty(x, {x_rows.count}, ScalarType::Float);
  dispatch(kind.name, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (x_rows.count == 0) {
      return;
    }
    const NormForward<T> op{
        .centred = kind.centred,
        .rows = x_rows.count,
        .width = x_rows.width,
        .eps = static_cast<float>(eps),
        .x = static_cast<const T*>(x_rows.holder.data_ptr()),
        .x_stride = x_rows.stride,
        .residual = residual_rows ? static_cast<const T*>(residual_rows->holder.data_ptr()) : nullptr,
        .residual_stride = residual_rows ? residual_rows->stride : 0,
        .weight = w.data_ptr(),
        .weight_is_fp32 = w.scalar_type() == ScalarType::Float,
        .bias = b ? b->data_ptr() : nullptr,
        .bias_is_fp32 = b && b->scalar_type() == ScalarType::Float,
        .y = static_cast<T*>(y.data_ptr()),
        .h = residual_rows ? static_cast<T*>(h.data_ptr()) : nullptr,
        .mean = kind.centred ? static_cast<float*>(mean.data_ptr()) : nullptr,
        .rstd = static_cast<float*>(rstd.data_ptr()),
    };
    const bool aligned = x_rows.aligned() && (!residual_rows || residual_rows->aligned());
    norm_forward(kind.name, op, aligned, current_stream(x));
  });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(
    Tensor x, Tensor weight, OptionalTensor bias, double eps, OptionalTensor residual) {
  return forward(kLayerNorm, x, weight, bias, eps, residual);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, OptionalTensor residual) {
  const auto [y, h, mean, rstd] = forward(kRmsNorm, x, weight, std::nullopt, eps, residual);
  return {y, h, rstd};
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("layer_norm", TORCH_BOX(&megapre::cuda::layer_norm));
  m.impl("rms_norm", TORCH_BOX(&megapre::cuda::rms_norm));
}
