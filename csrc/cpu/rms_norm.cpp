// Driver of rms_norm: checks, memory and threads. The arithmetic is in rms_norm_rows.cpp.

#include "rms_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "rows.h"

namespace megapre::cpu {
namespace {

void check_rows(const at::Tensor& t, const at::Tensor& like, const char* name, const char* like_name) {
  TORCH_CHECK_VALUE(
      t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), "rms_norm: ", name, " is ", t.scalar_type(),
      " ", t.sizes(), " but ", like_name, " is ", like.scalar_type(), " ", like.sizes(),
      "; they must have the same shape and dtype");
}

void check_input(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "rms_norm: the input has no dimension to normalise over");
  TORCH_CHECK_TYPE(
      is_supported(x.scalar_type()), "rms_norm: dtype ", x.scalar_type(), "; supported are fp32, bf16, fp16, fp64");
  TORCH_CHECK_VALUE(
      weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: weight has shape ", weight.sizes(),
      " but rows of the input have ", x.size(-1), " elements");
}

at::Tensor to_acc(const at::Tensor& weight, const at::Tensor& x) {
  return weight.to(acc_dtype(x.scalar_type())).contiguous();
}

at::Tensor contiguous_like(const at::Tensor& x) {
  return at::empty_like(x, at::MemoryFormat::Contiguous);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, const at::Tensor& weight, double eps, const std::optional<at::Tensor>& residual) {
  check_input(x, weight);
  at::Tensor y = contiguous_like(x);
  at::Tensor h = at::empty({0}, x.options());
  const at::Tensor weight_acc = to_acc(weight, x);
  const Rows x_rows(x);
  at::Tensor rstd = at::empty({x_rows.count}, weight_acc.options());
  std::optional<Rows> residual_rows;
  if (residual.has_value()) {
    check_rows(*residual, x, "residual", "x");
    residual_rows.emplace(*residual);
    h = contiguous_like(x);
  }
  const RmsNormForward op{
      .dtype = x.scalar_type(),
      .width = x_rows.width,
      .eps = eps,
      .x = x_rows.data(),
      .x_stride = x_rows.stride,
      .residual = residual_rows ? residual_rows->data() : nullptr,
      .residual_stride = residual_rows ? residual_rows->stride : 0,
      .weight = weight_acc.data_ptr(),
      .y = y.data_ptr(),
      .h = residual_rows ? h.data_ptr() : nullptr,
      .rstd = rstd.data_ptr(),
  };
  const RmsNormKernels& kernels = MEGAPRE_CHOOSE(rms_norm_kernels);
  at::parallel_for(0, x_rows.count, grain(op.width), [&](int64_t begin, int64_t end) {
    kernels.forward(op, begin, end);
  });
  return {y, h, rstd};
}

// Adds up the parts of dweight in their order, whichever threads wrote them.
template <typename A>
void sum_parts(A* parts, int64_t count, int64_t width) {
  at::parallel_for(0, width, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = begin; i < end; ++i) {
        parts[i] += parts[part * width + i];
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& dh, const at::Tensor& h, const at::Tensor& weight,
    const at::Tensor& rstd) {
  check_input(h, weight);
  check_rows(dy, h, "dy", "h");
  const c10::ScalarType acc = acc_dtype(h.scalar_type());
  const Rows h_rows(h), dy_rows(dy);
  TORCH_CHECK_VALUE(
      rstd.numel() == h_rows.count && rstd.scalar_type() == acc, "rms_norm_backward: rstd is ",
      rstd.scalar_type(), " with ", rstd.numel(), " elements; one ", acc, " per row of h ", h.sizes(), " is needed");
  std::optional<Rows> dh_rows;
  if (dh.has_value()) {
    check_rows(*dh, h, "dh", "h");
    dh_rows.emplace(*dh);
  }
  const at::Tensor weight_acc = to_acc(weight, h);
  const at::Tensor rstd_rows = rstd.contiguous();
  at::Tensor dx = contiguous_like(h);
  const int64_t width = h_rows.width;
  const RmsNormBackward op{
      .dtype = h.scalar_type(),
      .width = width,
      .dy = dy_rows.data(),
      .dy_stride = dy_rows.stride,
      .dh = dh_rows ? dh_rows->data() : nullptr,
      .dh_stride = dh_rows ? dh_rows->stride : 0,
      .h = h_rows.data(),
      .h_stride = h_rows.stride,
      .weight = weight_acc.data_ptr(),
      .rstd = rstd_rows.data_ptr(),
      .dx = dx.data_ptr(),
  };
  // The cut of the rows depends on the number of threads alone, so equal calls give equal bits.
  const int64_t rows = h_rows.count;
  const int64_t wanted = std::clamp<int64_t>(rows / grain(width), 1, at::get_num_threads());
  const int64_t rows_per_part = std::max<int64_t>(1, at::divup(rows, wanted));
  const int64_t parts = std::max<int64_t>(1, at::divup(rows, rows_per_part));
  at::Tensor dweight = at::empty({parts, width}, weight_acc.options());
  at::Tensor blocks = at::empty({parts, width}, weight_acc.options());
  const RmsNormKernels& kernels = MEGAPRE_CHOOSE(rms_norm_kernels);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t part_bytes = width * dweight.element_size();
    for (int64_t part = begin; part < end; ++part) {
      kernels.backward(
          op, part * rows_per_part, std::min(rows, (part + 1) * rows_per_part),
          static_cast<char*>(dweight.data_ptr()) + part * part_bytes,
          static_cast<char*>(blocks.data_ptr()) + part * part_bytes);
    }
  });
  if (acc == c10::kDouble) {
    sum_parts(dweight.data_ptr<double>(), parts, width);
  } else {
    sum_parts(dweight.data_ptr<float>(), parts, width);
  }
  return {dx, dweight.select(0, 0).to(weight.scalar_type(), /*non_blocking=*/false, /*copy=*/true)};
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("rms_norm", &megapre::cpu::rms_norm);
  m.impl("rms_norm_backward", &megapre::cpu::rms_norm_backward);
}
