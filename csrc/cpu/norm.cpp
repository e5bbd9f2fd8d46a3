// Driver of layer_norm and rms_norm: checks, memory and threads. The arithmetic is in norm_rows.cpp.

#include "norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "column_sums.h"
#include "rows.h"

namespace megapre::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// "layer_norm" or "rms_norm", for messages; layer_norm is the one that subtracts the mean.
struct Kind {
  const char* name;
  bool centred;
};

constexpr Kind kLayerNorm{"layer_norm", true}, kRmsNorm{"rms_norm", false};

void check_rows(Kind kind, const at::Tensor& t, const at::Tensor& like, const char* name, const char* like_name) {
  TORCH_CHECK_VALUE(
      t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), kind.name, ": ", name, " is ",
      t.scalar_type(), " ", t.sizes(), " but ", like_name, " is ", like.scalar_type(), " ", like.sizes(),
      "; they must have the same shape and dtype");
}

void check_input(Kind kind, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1, kind.name, ": the input has no dimension to normalise over");
  TORCH_CHECK_TYPE(
      is_supported(x.scalar_type()), kind.name, ": dtype ", x.scalar_type(),
      "; supported are fp32, bf16, fp16, fp64");
  TORCH_CHECK_VALUE(
      weight.dim() == 1 && weight.size(0) == x.size(-1), kind.name, ": weight has shape ", weight.sizes(),
      " but rows of the input have ", x.size(-1), " elements");
  TORCH_CHECK_VALUE(
      !bias.has_value() || bias->sizes() == weight.sizes(), kind.name, ": bias has shape ",
      bias.value_or(weight).sizes(), " but weight has shape ", weight.sizes());
}

void check_statistic(Kind kind, const at::Tensor& t, const Rows& h_rows, const at::Tensor& h, const char* name) {
  const c10::ScalarType acc = acc_dtype(h.scalar_type());
  TORCH_CHECK_VALUE(
      t.numel() == h_rows.count && t.scalar_type() == acc, kind.name, "_backward: ", name, " is ", t.scalar_type(),
      " with ", t.numel(), " elements; one ", acc, " per row of h ", h.sizes(), " is needed");
}

at::Tensor contiguous_like(const at::Tensor& x) {
  return at::empty_like(x, at::MemoryFormat::Contiguous);
}

// y, h (empty without a residual), mean (empty for rms_norm), rstd.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    Kind kind, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps,
    const OptionalTensor& residual) {
  check_input(kind, x, weight, bias);
  const Rows x_rows(x);
  const at::Tensor weight_acc = to_acc(weight, x);
  const at::Tensor bias_acc = bias.has_value() ? to_acc(*bias, x) : at::Tensor();
  std::optional<Rows> residual_rows;
  if (residual.has_value()) {
    check_rows(kind, *residual, x, "residual", "x");
    residual_rows.emplace(*residual);
  }
  at::Tensor y = contiguous_like(x);
  at::Tensor h = residual_rows ? contiguous_like(x) : at::empty({0}, x.options());
  at::Tensor mean = at::empty({kind.centred ? x_rows.count : 0}, weight_acc.options());
  at::Tensor rstd = at::empty({x_rows.count}, weight_acc.options());
  const NormForward op{
      .dtype = x.scalar_type(),
      .centred = kind.centred,
      .width = x_rows.width,
      .eps = eps,
      .x = x_rows.data(),
      .x_stride = x_rows.stride,
      .residual = residual_rows ? residual_rows->data() : nullptr,
      .residual_stride = residual_rows ? residual_rows->stride : 0,
      .weight = weight_acc.data_ptr(),
      .bias = bias.has_value() ? bias_acc.data_ptr() : nullptr,
      .y = y.data_ptr(),
      .h = residual_rows ? h.data_ptr() : nullptr,
      .mean = mean.data_ptr(),
      .rstd = rstd.data_ptr(),
  };
  const NormKernels& kernels = MEGAPRE_CHOOSE(norm_kernels);
  at::parallel_for(0, x_rows.count, grain(op.width), [&](int64_t begin, int64_t end) {
    kernels.forward(op, begin, end);
  });
  return {y, h, mean, rstd};
}

// dx, dweight, dbias (empty without a bias).
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    Kind kind, const at::Tensor& dy, const OptionalTensor& dh, const at::Tensor& h, const at::Tensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& rstd) {
  check_input(kind, h, weight, bias);
  check_rows(kind, dy, h, "dy", "h");
  const Rows h_rows(h), dy_rows(dy);
  check_statistic(kind, rstd, h_rows, h, "rstd");
  if (kind.centred) {
    check_statistic(kind, mean, h_rows, h, "mean");
  }
  std::optional<Rows> dh_rows;
  if (dh.has_value()) {
    check_rows(kind, *dh, h, "dh", "h");
    dh_rows.emplace(*dh);
  }
  const at::Tensor weight_acc = to_acc(weight, h);
  const at::Tensor rstd_rows = rstd.contiguous();
  const at::Tensor mean_rows = kind.centred ? mean.contiguous() : at::Tensor();
  at::Tensor dx = contiguous_like(h);
  const NormBackward op{
      .dtype = h.scalar_type(),
      .centred = kind.centred,
      .width = h_rows.width,
      .dy = dy_rows.data(),
      .dy_stride = dy_rows.stride,
      .dh = dh_rows ? dh_rows->data() : nullptr,
      .dh_stride = dh_rows ? dh_rows->stride : 0,
      .h = h_rows.data(),
      .h_stride = h_rows.stride,
      .weight = weight_acc.data_ptr(),
      .has_bias = bias.has_value(),
      .mean = kind.centred ? mean_rows.data_ptr() : nullptr,
      .rstd = rstd_rows.data_ptr(),
      .dx = dx.data_ptr(),
  };
  const NormKernels& kernels = MEGAPRE_CHOOSE(norm_kernels);
  ColumnSums sums(h_rows.count, h_rows.width, op.has_bias ? 2 : 1, weight_acc.scalar_type());
  sums.run([&](int64_t begin, int64_t end, void* into) { kernels.backward(op, begin, end, into); });
  return {
      dx, sums.take(0, weight.scalar_type()),
      op.has_bias ? sums.take(1, bias->scalar_type()) : at::empty({0}, weight.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps,
    const OptionalTensor& residual) {
  return forward(kLayerNorm, x, weight, bias, eps, residual);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const at::Tensor& dy, const OptionalTensor& dh, const at::Tensor& h, const at::Tensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& rstd) {
  return backward(kLayerNorm, dy, dh, h, weight, bias, mean, rstd);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, const at::Tensor& weight, double eps, const OptionalTensor& residual) {
  const auto [y, h, mean, rstd] = forward(kRmsNorm, x, weight, std::nullopt, eps, residual);
  return {y, h, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& dy, const OptionalTensor& dh, const at::Tensor& h, const at::Tensor& weight,
    const at::Tensor& rstd) {
  const auto [dx, dweight, dbias] = backward(kRmsNorm, dy, dh, h, weight, std::nullopt, at::Tensor(), rstd);
  return {dx, dweight};
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("layer_norm", &megapre::cpu::layer_norm);
  m.impl("layer_norm_backward", &megapre::cpu::layer_norm_backward);
  m.impl("rms_norm", &megapre::cpu::rms_norm);
  m.impl("rms_norm_backward", &megapre::cpu::rms_norm_backward);
}
