// Driver of gelu, swiglu and geglu: checks, memory, policy. The kernels are in activation_rows.h.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "activation_rows.h"
#include "column_sum.h"
#include "launch.h"
#include "ops.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

void check_input(const char* op, const Tensor& x, bool gated) {
  check(x.dim() >= 1, op, ": the input has no dimension");
  check(
      !gated || x.size(-1) % 2 == 0, op, ": the last dim is ", x.size(-1), "; gate and up need an even one");
}

std::vector<int64_t> sizes_of_y(const Tensor& x, bool gated) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() /= gated ? 2 : 1;
  return sizes;
}

// x alone; what else there is the caller adds.
template <typename T>
ActivationRows<T> arguments(const Rows& x, bool gated) {
  ActivationRows<T> op{};
  op.rows = x.count;
  op.width = gated ? x.width / 2 : x.width;
  op.x = static_cast<const T*>(x.holder.data_ptr());
  op.x_stride = x.stride;
  return op;
}

template <Activation kActivation, typename T, int N>
void launch_as(const char* name, const ActivationRows<T>& op, cudaStream_t stream) {
  const int64_t pieces = op.rows * (op.width / N), per_block = int64_t{kPieces} * kActivationThreads;
  check(
      pieces <= std::numeric_limits<int>::max() * (N > 1 ? 1 : per_block), name, ": ", op.rows, " rows of ", op.width,
      " are more than one launch can have; cut the rows into parts");
  const Launch how{
      .op = name,
      .grid = dim3(static_cast<unsigned>((pieces + per_block - 1) / per_block)),
      .block = dim3(kActivationThreads),
      .stream = stream};
  if (op.dy == nullptr) {
    launch(how, activation_kernel<kActivation, T, N, false>, op);
  } else {
    launch(how, activation_kernel<kActivation, T, N, true>, op);
  }
}

// `aligned`: rows, and gate and up, are multiples of 16 bytes.
template <Activation kActivation, typename T>
void run(const char* name, const ActivationRows<T>& op, bool aligned, cudaStream_t stream) {
  if (op.rows == 0 || op.width == 0) {
    return;
  }
  if (aligned && op.width % kWide<T> == 0) {
    launch_as<kActivation, T, kWide<T>>(name, op, stream);
  } else {
    launch_as<kActivation, T, 1>(name, op, stream);
  }
}

// As many blocks along the rows as fill the device four times over all columns, each with eight rows or more.
template <Activation kActivation, typename T, int N>
void run_with_bias_as(
    const char* name, ActivationRows<T> op, const Tensor& x, const ParameterGradient& dbias, cudaStream_t stream) {
  const int64_t columns = (op.width + 32 * N - 1) / (32 * N);
  const int64_t wanted = (int64_t{4} * multiprocessors() + columns - 1) / std::max<int64_t>(columns, 1);
  const int64_t parts = std::min(wanted, (op.rows + 7) / 8);
  const Tensor partials = empty(x, {parts, op.width}, ScalarType::Float);
  op.partials = static_cast<float*>(partials.data_ptr());
  if (parts > 0 && columns > 0) {
    const Launch how{
        .op = name,
        .grid = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(parts)),
        .block = dim3(256),
        .stream = stream};
    launch(how, activation_bias_kernel<kActivation, T, N>, op);
  }
  const ColumnSums sums{
      .partials = op.partials,
      .rows = parts,
      .columns = op.width,
      .out = {dbias.out.data_ptr(), nullptr},
      .is_fp32 = {dbias.is_fp32, false}};
  column_sums<T>(name, sums, 1, stream);
}

template <Activation kActivation, typename T>
void run_with_bias(
    const char* name, const ActivationRows<T>& op, bool aligned, const Tensor& x, const ParameterGradient& dbias,
    cudaStream_t stream) {
  if (aligned) {
    run_with_bias_as<kActivation, T, kWide<T>>(name, op, x, dbias, stream);
  } else {
    run_with_bias_as<kActivation, T, 1>(name, op, x, dbias, stream);
  }
}

// ---- gelu -----------------------------------------------------------------------------------------------------------

void check_bias(const Tensor& x, const OptionalTensor& bias) {
  check_input("gelu", x, /*gated=*/false);
  check(
      !bias.has_value() || (bias->dim() == 1 && bias->size(0) == x.size(-1)), "gelu: bias is ",
      describe(bias.value_or(x)), " but rows of the input have ", x.size(-1), " elements");
  check_device("gelu", bias.value_or(x), x, "bias");
}

// The bias as the kernels read it.
OptionalTensor ready_bias(const Tensor& x, const OptionalTensor& bias) {
  return bias.has_value() ? OptionalTensor(parameter(*bias, x)) : std::nullopt;
}

template <typename T>
ActivationRows<T> arguments(const Rows& x, const OptionalTensor& bias) {
  ActivationRows<T> op = arguments<T>(x, /*gated=*/false);
  op.bias = bias.has_value() ? bias->data_ptr() : nullptr;
  op.bias_is_fp32 = bias.has_value() && bias->scalar_type() == ScalarType::Float;
  return op;
}

Tensor gelu(Tensor x, OptionalTensor bias_in, bool tanh) {
  check_bias(x, bias_in);
  const DeviceGuard guard(x);
  const OptionalTensor bias = ready_bias(x, bias_in);
  const Rows rows(x);
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  dispatch("gelu", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    ActivationRows<T> op = arguments<T>(rows, bias);
    op.out = static_cast<T*>(y.data_ptr());
    const auto form = tanh ? run<Activation::GELU_TANH, T> : run<Activation::GELU_ERF, T>;
    form("gelu", op, rows.aligned(), current_stream(x));
  });
  return y;
}

// dx, dbias (empty without a bias).
std::tuple<Tensor, Tensor> gelu_backward(Tensor dy, Tensor x, OptionalTensor bias_in, bool tanh) {
  const char* name = "gelu_backward";
  check_bias(x, bias_in);
  check_like(name, dy, x, "dy", "x");
  const DeviceGuard guard(x);
  const OptionalTensor bias = ready_bias(x, bias_in);
  const Rows rows(x), dy_rows(dy);
  Tensor dx = empty(x, sizes_of(x), x.scalar_type());
  const ParameterGradient dbias(bias_in.value_or(x), bias_in.has_value() ? x.size(-1) : 0, x);
  dispatch(name, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    ActivationRows<T> op = arguments<T>(rows, bias);
    op.dy = static_cast<const T*>(dy_rows.holder.data_ptr());
    op.dy_stride = dy_rows.stride;
    op.out = static_cast<T*>(dx.data_ptr());
    const bool aligned = rows.aligned() && dy_rows.aligned();
    if (bias.has_value()) {
      const auto form = tanh ? run_with_bias<Activation::GELU_TANH, T> : run_with_bias<Activation::GELU_ERF, T>;
      form(name, op, aligned, x, dbias, current_stream(x));
    } else {
      const auto form = tanh ? run<Activation::GELU_TANH, T> : run<Activation::GELU_ERF, T>;
      form(name, op, aligned, current_stream(x));
    }
  });
  return {dx, dbias.take()};
}

// ---- swiglu, geglu --------------------------------------------------------------------------------------------------

template <Activation kActivation>
Tensor gated(Tensor x) {
  const char* name = kActivation == Activation::SWIGLU ? "swiglu" : "geglu";
  check_input(name, x, /*gated=*/true);
  const DeviceGuard guard(x);
  const Rows rows(x);
  Tensor y = empty(x, sizes_of_y(x, /*gated=*/true), x.scalar_type());
  dispatch(name, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    ActivationRows<T> op = arguments<T>(rows, /*gated=*/true);
    op.out = static_cast<T*>(y.data_ptr());
    run<kActivation, T>(name, op, rows.aligned(), current_stream(x));
  });
  return y;
}

template <Activation kActivation>
Tensor gated_backward(Tensor dy, Tensor x) {
  const char* name = kActivation == Activation::SWIGLU ? "swiglu_backward" : "geglu_backward";
  check_input(name, x, /*gated=*/true);
  check(
      sizes_of(dy) == sizes_of_y(x, /*gated=*/true) && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
      name, ": dy is ", describe(dy), " but x is ", describe(x), "; half its last dim, its dtype and device are needed");
  const DeviceGuard guard(x);
  const Rows rows(x), dy_rows(dy);
  Tensor dx = empty(x, sizes_of(x), x.scalar_type());
  dispatch(name, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    ActivationRows<T> op = arguments<T>(rows, /*gated=*/true);
    op.dy = static_cast<const T*>(dy_rows.holder.data_ptr());
    op.dy_stride = dy_rows.stride;
    op.out = static_cast<T*>(dx.data_ptr());
    run<kActivation, T>(name, op, rows.aligned() && dy_rows.aligned(), current_stream(x));
  });
  return dx;
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  using megapre::cuda::Activation;
  m.impl("gelu", TORCH_BOX(&megapre::cuda::gelu));
  m.impl("gelu_backward", TORCH_BOX(&megapre::cuda::gelu_backward));
  m.impl("swiglu", TORCH_BOX(&megapre::cuda::gated<Activation::SWIGLU>));
  m.impl("swiglu_backward", TORCH_BOX(&megapre::cuda::gated_backward<Activation::SWIGLU>));
  m.impl("geglu", TORCH_BOX(&megapre::cuda::gated<Activation::GEGLU>));
  m.impl("geglu_backward", TORCH_BOX(&megapre::cuda::gated_backward<Activation::GEGLU>));
}
