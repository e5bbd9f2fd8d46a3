// Driver of adamw_ and adamw_stochastic_: checks, memory. The kernel is in adamw_update.h. Nothing on the host waits for
// the device or looks at its memory, so a call can be captured in a CUDA graph.
//
// Floor: bytes / copy rate; fp32 state with 16-bit gradients and parameters moves 28 bytes an element, 6.5 ms per 1e9 on an
// H200. adamw_stochastic_ with bf16 moments moves 14.
// Not yet run on a GPU; proven by tests/cuda/.

#include <cmath>

#include "adamw_update.h"
#include "launch.h"
#include "ops.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

void check_flat(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(
      t.dim() == 1 && t.numel() == like.numel() && t.device() == like.device(), op, ": ", name, " is ", describe(t),
      "; all tensors must be flat, on one device and of the length of the first, ", describe(like));
}

// Flat memory to update: the tensor's own, or where that has gaps a copy, which `finish` writes back.
struct InPlace {
  Tensor target, flat;

  explicit InPlace(const Tensor& t) : target(t), flat(t.is_contiguous() ? t : torch::stable::contiguous(t)) {}

  void finish() {
    if (target.is_contiguous()) {
      raise_version(target);
    } else {
      torch::stable::copy_(target, flat);
    }
  }
};

// Numbers that the kernel reads. What is neither fp32 nor fp64 is converted, on the device, and held here.
struct Told {
  Tensor lr, step;
  OptionalTensor grad_scale, found_inf;

  Told(
      const char* op, const Tensor& state, const Tensor& lr_in, const Tensor& step_in, const OptionalTensor& scale_in,
      const OptionalTensor& found_in)
      : lr(ready(op, "lr", lr_in, state)), step(ready(op, "step", step_in, state)) {
    if (scale_in.has_value()) {
      grad_scale = ready(op, "grad_scale", *scale_in, state);
    }
    if (found_in.has_value()) {
      found_inf = ready(op, "found_inf", *found_in, state);
    }
  }

  static Scalar scalar(const Tensor& t) { return {t.data_ptr(), t.scalar_type() == ScalarType::Float}; }
  static Scalar scalar(const OptionalTensor& t) { return t.has_value() ? scalar(*t) : Scalar{nullptr, true}; }

 private:
  static Tensor ready(const char* op, const char* name, const Tensor& t, const Tensor& state) {
    check(
        t.dim() == 0 && t.device() == state.device(), op, ": ", name, " is ", describe(t),
        "; it must be 0-dim and on the device of the state, where it is read");
    const bool as_it_is = t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double;
    return as_it_is ? t : torch::stable::to(t, ScalarType::Double);
  }
};

struct Hyper {
  double beta1, beta2, eps, weight_decay;
};

ParamKind kind_of(const char* op, const OptionalTensor& param) {
  ParamKind kind = ParamKind::kNone;
  if (param.has_value()) {
    dispatch(op, param->scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      kind = sizeof(T) == 4 ? ParamKind::kFloat : std::is_same_v<T, bf16> ? ParamKind::kBFloat16 : ParamKind::kHalf;
    });
  }
  return kind;
}

// Four neighbours whose numbers begin at a multiple of four can be read by one access.
bool in_fours(const Tensor& t, int64_t offset) {
  const auto first = reinterpret_cast<uintptr_t>(t.data_ptr());
  return offset % 4 == 0 && first % (4 * t.element_size()) == 0;
}

// The part of a call that its two ops share; update(op, stream) launches the kernel.
template <typename Update>
void run(
    const char* name, const OptionalTensor& param, const Tensor& master, const Tensor& exp_avg,
    const Tensor& exp_avg_sq, const Tensor& grad_in, const Told& told, const Hyper& hyper, int64_t seed, int64_t offset,
    Update update) {
  const ParamKind kind = kind_of(name, param);
  const Tensor grad = torch::stable::contiguous(grad_in);
  InPlace masters(master), firsts(exp_avg), seconds(exp_avg_sq);
  std::optional<InPlace> params;
  if (param.has_value()) {
    params.emplace(*param);
  }
  bool aligned = in_fours(grad, offset) && (!params || in_fours(params->flat, offset));
  for (const Tensor* t : {&masters.flat, &firsts.flat, &seconds.flat}) {
    aligned = aligned && in_fours(*t, offset);
  }
  const AdamW op{
      .count = master.numel(),
      .master = masters.flat.data_ptr(),
      .exp_avg = firsts.flat.data_ptr(),
      .exp_avg_sq = seconds.flat.data_ptr(),
      .grad = grad.data_ptr(),
      .param = params ? params->flat.data_ptr() : nullptr,
      .param_kind = kind,
      .aligned = aligned,
      .lr = Told::scalar(told.lr),
      .step = Told::scalar(told.step),
      .grad_scale = Told::scalar(told.grad_scale),
      .found_inf = Told::scalar(told.found_inf),
      .beta1 = static_cast<float>(hyper.beta1),
      .rest1 = static_cast<float>(1 - hyper.beta1),
      .beta2 = static_cast<float>(hyper.beta2),
      .rest2 = static_cast<float>(1 - hyper.beta2),
      .eps = static_cast<float>(hyper.eps),
      .log_beta1 = std::log(hyper.beta1),
      .log_beta2 = std::log(hyper.beta2),
      .weight_decay = hyper.weight_decay,
      .seed = static_cast<uint64_t>(seed),
      .offset = offset};
  update(op, current_stream(master));
  for (InPlace* t : {&masters, &firsts, &seconds}) {
    t->finish();
  }
  if (params) {
    params->finish();
  }
}

void check_state(
    const char* op, const char* first, const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const Tensor& grad) {
  check_flat(op, first, master, master);
  check_flat(op, "exp_avg", exp_avg, master);
  check_flat(op, "exp_avg_sq", exp_avg_sq, master);
  check_flat(op, "grad", grad, master);
  check(
      exp_avg.scalar_type() == exp_avg_sq.scalar_type(), op, ": both moments must share a dtype; they are ",
      describe(exp_avg), " and ", describe(exp_avg_sq));
}

void adamw_(
    OptionalTensor param, Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor grad, Tensor lr, Tensor step,
    OptionalTensor grad_scale, OptionalTensor found_inf, double beta1, double beta2, double eps, double weight_decay) {
  const char* const name = "adamw_";
  check_state(name, "master", master, exp_avg, exp_avg_sq, grad);
  check(
      master.scalar_type() == exp_avg.scalar_type(), name, ": master and moments must share a dtype; they are ",
      describe(master), " and ", describe(exp_avg));
  if (param.has_value()) {
    check_flat(name, "param", *param, master);
  }
  const DeviceGuard guard(master);
  const Told told(name, master, lr, step, grad_scale, found_inf);
  dispatch(name, master.scalar_type(), [&](auto master_type) {
    dispatch(name, grad.scalar_type(), [&](auto grad_type) {
      using State = typename decltype(master_type)::type;
      using Grad = typename decltype(grad_type)::type;
      const auto update = [&](const AdamW& op, cudaStream_t stream) {
        if (op.count > 0) {
          update_flat<State, State, Grad, false>(name, op, stream);
        }
      };
      run(name, param, master, exp_avg, exp_avg_sq, grad, told, {beta1, beta2, eps, weight_decay}, 0, 0, update);
    });
  });
}

void adamw_stochastic_(
    Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor grad, Tensor lr, Tensor step, OptionalTensor grad_scale,
    OptionalTensor found_inf, double beta1, double beta2, double eps, double weight_decay, int64_t seed,
    int64_t offset) {
  const char* const name = "adamw_stochastic_";
  check_state(name, "param", param, exp_avg, exp_avg_sq, grad);
  check(param.scalar_type() == ScalarType::BFloat16, name, ": param is ", describe(param), "; it must be bf16");
  check(
      exp_avg.scalar_type() == ScalarType::BFloat16 || exp_avg.scalar_type() == ScalarType::Float, name,
      ": moments are ", describe(exp_avg), "; they must be fp32 or bf16");
  check(offset >= 0, name, ": offset = ", offset, "; it must not be negative");
  const DeviceGuard guard(param);
  const Told told(name, param, lr, step, grad_scale, found_inf);
  dispatch(name, grad.scalar_type(), [&](auto grad_type) {
    using Grad = typename decltype(grad_type)::type;
    const auto update = [&](const AdamW& op, cudaStream_t stream) {
      if (op.count == 0) {
        return;
      }
      if (exp_avg.scalar_type() == ScalarType::Float) {
        update_flat<bf16, float, Grad, true>(name, op, stream);
      } else {
        update_flat<bf16, bf16, Grad, true>(name, op, stream);
      }
    };
    run(
        name, std::nullopt, param, exp_avg, exp_avg_sq, grad, told, {beta1, beta2, eps, weight_decay}, seed, offset,
        update);
  });
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("adamw_", TORCH_BOX(&megapre::cuda::adamw_));
  m.impl("adamw_stochastic_", TORCH_BOX(&megapre::cuda::adamw_stochastic_));
}
