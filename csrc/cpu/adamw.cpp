// Driver of adamw_ and adamw_stochastic_: checks, scalars and threads. The arithmetic is in adamw_rows.cpp.

#include "adamw.h"

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>

#include "rows.h"

namespace megapre::cpu {
namespace {

// A parameter from here on is not in any cache when it is next read.
constexpr int64_t kStreamBytes = 8 << 20;

bool can_stream(const at::Tensor& param) {
  return param.element_size() == 2 && static_cast<int64_t>(param.nbytes()) >= kStreamBytes &&
      reinterpret_cast<uintptr_t>(param.const_data_ptr()) % 64 == 0;
}

void check_flat(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_VALUE(
      t.dim() == 1 && t.numel() == like.numel(), op, ": ", name, " has shape ", t.sizes(),
      "; all tensors must be flat and of the length of the first, ", like.sizes());
  TORCH_CHECK_TYPE(
      is_supported(t.scalar_type()), op, ": ", name, " is ", t.scalar_type(), "; supported are fp32, bf16, fp16, fp64");
}

double number(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 0, op, ": ", name, " has shape ", t.sizes(), "; it must be 0-dim");
  return t.item().toDouble();
}

// Flat memory to update: the tensor's own, or where that has gaps a copy, which `finish` writes back.
struct InPlace {
  const at::Tensor& target;
  at::Tensor flat;

  explicit InPlace(const at::Tensor& t) : target(t), flat(t.contiguous()) {}

  void finish() const {
    if (flat.is_same(target)) {
      raise_version(target);
    } else {
      target.copy_(flat);
    }
  }
};

struct Hyper {
  const at::Tensor& lr;
  const at::Tensor& step;
  const std::optional<at::Tensor>& grad_scale;
  const std::optional<at::Tensor>& found_inf;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
};

struct Counter {
  int64_t seed;
  int64_t offset;
};

void run(
    const char* name, const at::Tensor* param, const at::Tensor& master, const at::Tensor& exp_avg,
    const at::Tensor& exp_avg_sq, const at::Tensor& grad_in, const Hyper& hyper, const Counter* counter) {
  check_flat(name, counter ? "param" : "master", master, master);
  check_flat(name, "exp_avg", exp_avg, master);
  check_flat(name, "exp_avg_sq", exp_avg_sq, master);
  check_flat(name, "grad", grad_in, master);
  TORCH_CHECK_VALUE(
      exp_avg.scalar_type() == exp_avg_sq.scalar_type(), name, ": both moments must share a dtype; they are ",
      exp_avg.scalar_type(), " and ", exp_avg_sq.scalar_type());
  if (counter) {
    TORCH_CHECK_TYPE(
        master.scalar_type() == c10::kBFloat16, name, ": param is ", master.scalar_type(), "; it must be bf16");
    TORCH_CHECK_TYPE(
        exp_avg.scalar_type() == c10::kBFloat16 || exp_avg.scalar_type() == c10::kFloat, name, ": moments are ",
        exp_avg.scalar_type(), "; they must be fp32 or bf16");
    TORCH_CHECK_VALUE(counter->offset >= 0, name, ": offset = ", counter->offset, "; it must not be negative");
  } else {
    TORCH_CHECK_VALUE(
        master.scalar_type() == exp_avg.scalar_type(), name, ": master and moments must share a dtype; they are ",
        master.scalar_type(), " and ", exp_avg.scalar_type());
  }
  if (param) {
    check_flat(name, "param", *param, master);
    TORCH_CHECK_TYPE(
        param->scalar_type() != c10::kDouble || master.scalar_type() == c10::kDouble, name, ": param is ",
        param->scalar_type(), ", but its master ", master.scalar_type(), "; the master must not be the narrower one");
  }
  const double lr = number(name, "lr", hyper.lr);
  const double step = number(name, "step", hyper.step);
  const double grad_scale = hyper.grad_scale ? number(name, "grad_scale", *hyper.grad_scale) : 1.0;
  const double found_inf = hyper.found_inf ? number(name, "found_inf", *hyper.found_inf) : 0.0;
  if (found_inf != 0) {
    return;
  }
  const at::Tensor grad = (master.scalar_type() == c10::kDouble || grad_in.scalar_type() == c10::kDouble
                               ? grad_in.to(acc_dtype(master.scalar_type()))
                               : grad_in)
                              .contiguous();
  const InPlace master_flat(master), avg_flat(exp_avg), sq_flat(exp_avg_sq);
  std::optional<InPlace> param_flat;
  if (param) {
    param_flat.emplace(*param);
  }
  const AdamW op{
      .master_dtype = master.scalar_type(),
      .moment_dtype = exp_avg.scalar_type(),
      .grad_dtype = grad.scalar_type(),
      .param_dtype = param ? param->scalar_type() : master.scalar_type(),
      .master = master_flat.flat.data_ptr(),
      .exp_avg = avg_flat.flat.data_ptr(),
      .exp_avg_sq = sq_flat.flat.data_ptr(),
      .grad = grad.const_data_ptr(),
      .param = param ? param_flat->flat.data_ptr() : nullptr,
      .stream = param && can_stream(param_flat->flat),
      .grad_scale = grad_scale,
      .beta1 = hyper.beta1,
      .beta2 = hyper.beta2,
      .eps = hyper.eps,
      .decay = 1 - lr * hyper.weight_decay,
      .rate = lr / -std::expm1(step * std::log(hyper.beta1)),
      .root_scale = 1 / std::sqrt(-std::expm1(step * std::log(hyper.beta2))),
      .seed = counter ? static_cast<uint64_t>(counter->seed) : 0,
      .step = static_cast<uint32_t>(static_cast<int64_t>(step)),
      .offset = counter ? counter->offset : 0,
  };
  const AdamWKernels& kernels = MEGAPRE_CHOOSE(adamw_kernels);
  const auto update = counter ? kernels.update_stochastic : kernels.update;
  const int64_t count = master.numel();
  at::parallel_for(0, at::divup(count, kAdamWCut), grain(kAdamWCut), [&](int64_t begin, int64_t end) {
    update(op, begin * kAdamWCut, std::min(count, end * kAdamWCut));
  });
  master_flat.finish();
  avg_flat.finish();
  sq_flat.finish();
  if (param) {
    param_flat->finish();
  }
}

void adamw_(
    const std::optional<at::Tensor>& param, at::Tensor& master, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
    const at::Tensor& grad, const at::Tensor& lr, const at::Tensor& step, const std::optional<at::Tensor>& grad_scale,
    const std::optional<at::Tensor>& found_inf, double beta1, double beta2, double eps, double weight_decay) {
  const Hyper hyper{lr, step, grad_scale, found_inf, beta1, beta2, eps, weight_decay};
  run("adamw_", param ? &*param : nullptr, master, exp_avg, exp_avg_sq, grad, hyper, nullptr);
}

void adamw_stochastic_(
    at::Tensor& param, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& lr,
    const at::Tensor& step, const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
    double beta1, double beta2, double eps, double weight_decay, int64_t seed, int64_t offset) {
  const Hyper hyper{lr, step, grad_scale, found_inf, beta1, beta2, eps, weight_decay};
  const Counter counter{seed, offset};
  run("adamw_stochastic_", nullptr, param, exp_avg, exp_avg_sq, grad, hyper, &counter);
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("adamw_", &megapre::cpu::adamw_);
  m.impl("adamw_stochastic_", &megapre::cpu::adamw_stochastic_);
}
