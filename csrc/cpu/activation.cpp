// Driver of gelu, swiglu and geglu: checks, memory and threads. The arithmetic is in activation_rows.cpp.

#include "activation.h"

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

void check_input(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, name, ": the input has no dimension");
  TORCH_CHECK_TYPE(
      is_supported(x.scalar_type()), name, ": dtype ", x.scalar_type(), "; supported are fp32, bf16, fp16, fp64");
}

void check_gradient(const char* name, const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(
      dy.sizes() == sizes && dy.scalar_type() == x.scalar_type(), name, "_backward: dy is ", dy.scalar_type(), " ",
      dy.sizes(), " but y is ", x.scalar_type(), " ", sizes);
}

// x alone; bias, dy and what is written the caller adds.
ActivationRows describe(const Rows& x_rows, const at::Tensor& x, Activation activation, bool gated) {
  return {
      .dtype = x.scalar_type(),
      .activation = activation,
      .gated = gated,
      .width = gated ? x_rows.width / 2 : x_rows.width,
      .x = x_rows.data(),
      .x_stride = x_rows.stride,
      .bias = nullptr,
      .dy = nullptr,
      .dy_stride = 0,
      .out = nullptr,
  };
}

// Forward without dy; backward with it, but for the sums over rows that a bias needs.
void run(const ActivationRows& op, int64_t rows) {
  const ActivationKernels& kernels = MEGAPRE_CHOOSE(activation_kernels);
  at::parallel_for(0, rows, grain(op.width), [&](int64_t begin, int64_t end) {
    op.dy == nullptr ? kernels.forward(op, begin, end) : kernels.backward(op, begin, end, nullptr);
  });
}

// ---- gelu ----------------------------------------------------------------------------------------------------------

ActivationRows gelu_rows(const Rows& x_rows, const at::Tensor& x, const at::Tensor& bias_acc, bool tanh) {
  ActivationRows op = describe(x_rows, x, tanh ? Activation::GELU_TANH : Activation::GELU_ERF, /*gated=*/false);
  op.bias = bias_acc.defined() ? bias_acc.data_ptr() : nullptr;
  return op;
}

// The bias in the accumulation type, undefined without one.
at::Tensor checked_bias(const at::Tensor& x, const OptionalTensor& bias) {
  check_input("gelu", x);
  if (!bias.has_value()) {
    return {};
  }
  TORCH_CHECK_VALUE(
      bias->dim() == 1 && bias->size(0) == x.size(-1), "gelu: bias has shape ", bias->sizes(),
      " but rows of the input have ", x.size(-1), " elements");
  return to_acc(*bias, x);
}

at::Tensor gelu(const at::Tensor& x, const OptionalTensor& bias, bool tanh) {
  const at::Tensor bias_acc = checked_bias(x, bias);
  const Rows x_rows(x);
  at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  ActivationRows op = gelu_rows(x_rows, x, bias_acc, tanh);
  op.out = y.data_ptr();
  run(op, x_rows.count);
  return y;
}

std::tuple<at::Tensor, at::Tensor> gelu_backward(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& bias, bool tanh) {
  const at::Tensor bias_acc = checked_bias(x, bias);
  check_gradient("gelu", dy, x, x.sizes());
  const Rows x_rows(x), dy_rows(dy);
  at::Tensor dx = at::empty_like(x, at::MemoryFormat::Contiguous);
  ActivationRows op = gelu_rows(x_rows, x, bias_acc, tanh);
  op.dy = dy_rows.data();
  op.dy_stride = dy_rows.stride;
  op.out = dx.data_ptr();
  if (!bias.has_value()) {
    run(op, x_rows.count);
    return {dx, at::empty({0}, x.options())};
  }
  const ActivationKernels& kernels = MEGAPRE_CHOOSE(activation_kernels);
  ColumnSums sums(x_rows.count, x_rows.width, 1, bias_acc.scalar_type());
  sums.run([&](int64_t begin, int64_t end, void* into) { kernels.backward(op, begin, end, into); });
  return {dx, sums.take(0, bias->scalar_type())};
}

// ---- swiglu, geglu -------------------------------------------------------------------------------------------------

struct Gated {
  const char* name;
  Activation activation;
};

constexpr Gated kSwiglu{"swiglu", Activation::SILU}, kGeglu{"geglu", Activation::GELU_TANH};

// The shape of y.
at::DimVector checked_sizes(Gated kind, const at::Tensor& x) {
  check_input(kind.name, x);
  TORCH_CHECK_VALUE(
      x.size(-1) % 2 == 0, kind.name, ": the last dim is ", x.size(-1), "; gate and up need an even one");
  at::DimVector sizes(x.sizes());
  sizes.back() /= 2;
  return sizes;
}

template <const Gated& kind>
at::Tensor gated(const at::Tensor& x) {
  const at::DimVector sizes = checked_sizes(kind, x);
  const Rows x_rows(x);
  at::Tensor y = at::empty(sizes, x.options());
  ActivationRows op = describe(x_rows, x, kind.activation, /*gated=*/true);
  op.out = y.data_ptr();
  run(op, x_rows.count);
  return y;
}

template <const Gated& kind>
at::Tensor gated_backward(const at::Tensor& dy, const at::Tensor& x) {
  check_gradient(kind.name, dy, x, checked_sizes(kind, x));
  const Rows x_rows(x), dy_rows(dy);
  at::Tensor dx = at::empty_like(x, at::MemoryFormat::Contiguous);
  ActivationRows op = describe(x_rows, x, kind.activation, /*gated=*/true);
  op.dy = dy_rows.data();
  op.dy_stride = dy_rows.stride;
  op.out = dx.data_ptr();
  run(op, x_rows.count);
  return dx;
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("gelu", &megapre::cpu::gelu);
  m.impl("gelu_backward", &megapre::cpu::gelu_backward);
  m.impl("swiglu", &megapre::cpu::gated<megapre::cpu::kSwiglu>);
  m.impl("swiglu_backward", &megapre::cpu::gated_backward<megapre::cpu::kSwiglu>);
  m.impl("geglu", &megapre::cpu::gated<megapre::cpu::kGeglu>);
  m.impl("geglu_backward", &megapre::cpu::gated_backward<megapre::cpu::kGeglu>);
}
