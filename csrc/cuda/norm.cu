// Driver of layer_norm and rms_norm: checks, memory, policy. The kernels are in norm_forward.h and norm_backward.h.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "column_sum.h"
#include "launch.h"
#include "norm_backward.h"
#include "norm_forward.h"
#include "ops.h"
#include "parameter.h"
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
  check_device(kind.name, weight, x, "weight");
  check_device(kind.name, bias.value_or(weight), x, "bias");
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

Tensor checked_statistic(Kind kind, const Tensor& t, const Rows& rows, const Tensor& h, const char* name) {
  check(
      t.numel() == rows.count && t.scalar_type() == ScalarType::Float, kind.name, "_backward: ", name, " is ",
      describe(t), "; one fp32 per row of h ", describe(h), " is needed");
  check_device(kind.name, t, h, name);
  return torch::stable::contiguous(t);
}

// dx, dweight, dbias (empty without a bias).
std::tuple<Tensor, Tensor, Tensor> backward(
    Kind kind, const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& rstd) {
  check_input(kind, h, weight, bias);
  check_like(kind.name, dy, h, "dy", "h");
  if (dh.has_value()) {
    check_like(kind.name, *dh, h, "dh", "h");
  }
  const DeviceGuard guard(h);
  const Rows h_rows(h), dy_rows(dy);
  check(
      h_rows.count <= std::numeric_limits<int>::max() / 2, kind.name, "_backward: h ", describe(h),
      "; up to 2^30 rows are taken");
  const std::optional<Rows> dh_rows = dh.has_value() ? std::optional<Rows>(*dh) : std::nullopt;
  const Tensor rstd_rows = checked_statistic(kind, rstd, h_rows, h, "rstd");
  const OptionalTensor mean_rows =
      kind.centred ? OptionalTensor(checked_statistic(kind, *mean, h_rows, h, "mean")) : std::nullopt;
  const Tensor w = parameter(weight, h);
  Tensor dx = empty(h, sizes_of(h), h.scalar_type());
  const ParameterGradient dweight(weight, h_rows.width, h);
  const ParameterGradient dbias(bias.value_or(weight), bias.has_value() ? h_rows.width : 0, h);
  dispatch(kind.name, h.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = h_rows.aligned() && dy_rows.aligned() && (!dh_rows || dh_rows->aligned());
    const NormPolicy policy = backward_policy(h_rows.width, aligned, capability() >= 90);
    const int outputs = bias.has_value() ? 2 : 1;
    const int64_t parts =
        h_rows.count == 0 ? 0 : backward_parts<T>(kind.name, policy, kind.centred, h_rows.count);
    const Tensor partials = empty(h, {outputs, parts, h_rows.width}, ScalarType::Float);
    const NormBackward<T> op{
        .centred = kind.centred,
        .rows = h_rows.count,
        .width = h_rows.width,
        .per_width = 1.0f / static_cast<float>(std::max<int64_t>(h_rows.width, 1)),
        .dy = static_cast<const T*>(dy_rows.holder.data_ptr()),
        .dy_stride = dy_rows.stride,
        .dh = dh_rows ? static_cast<const T*>(dh_rows->holder.data_ptr()) : nullptr,
        .dh_stride = dh_rows ? dh_rows->stride : 0,
        .h = static_cast<const T*>(h_rows.holder.data_ptr()),
        .h_stride = h_rows.stride,
        .weight = w.data_ptr(),
        .weight_is_fp32 = w.scalar_type() == ScalarType::Float,
        .has_bias = bias.has_value(),
        .mean = mean_rows ? static_cast<const float*>(mean_rows->data_ptr()) : nullptr,
        .rstd = static_cast<const float*>(rstd_rows.data_ptr()),
        .dx = static_cast<T*>(dx.data_ptr()),
        .partials = static_cast<float*>(partials.data_ptr()),
        .parts = parts,
    };
    if (h_rows.count > 0 && h_rows.width > 0) {
      norm_backward(kind.name, policy, op, aligned, current_stream(h));
    }
    const ColumnSums sums{
        .partials = op.partials,
        .rows = parts,
        .columns = h_rows.width,
        .out = {dweight.out.data_ptr(), dbias.out.data_ptr()},
        .is_fp32 = {dweight.is_fp32, dbias.is_fp32}};
    column_sums<T>(kind.name, sums, outputs, current_stream(h));
  });
  return {dx, dweight.take(), dbias.take()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(
    Tensor x, Tensor weight, OptionalTensor bias, double eps, OptionalTensor residual) {
  return forward(kLayerNorm, x, weight, bias, eps, residual);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, OptionalTensor residual) {
  const auto [y, h, mean, rstd] = forward(kRmsNorm, x, weight, std::nullopt, eps, residual);
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    Tensor dy, OptionalTensor dh, Tensor h, Tensor weight, OptionalTensor bias, Tensor mean, Tensor rstd) {
  return backward(kLayerNorm, dy, dh, h, weight, bias, mean, rstd);
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, OptionalTensor dh, Tensor h, Tensor weight, Tensor rstd) {
  const auto [dx, dweight, dbias] = backward(kRmsNorm, dy, dh, h, weight, std::nullopt, std::nullopt, rstd);
  return {dx, dweight};
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("layer_norm", TORCH_BOX(&megapre::cuda::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&megapre::cuda::layer_norm_backward));
  m.impl("rms_norm", TORCH_BOX(&megapre::cuda::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&megapre::cuda::rms_norm_backward));
}
