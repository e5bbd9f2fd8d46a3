// Row loops of gelu, swiglu and geglu. Compiled once per CPU level.
//
//   silu(u) = u s(u),  silu'(u) = s (1 + u (1 - s))          with s(v) = 1 / (1 + exp(-v))        (Elfwing et al. 2017)
//   gelu(u) = u Phi(u),  gelu'(u) = Phi + u Phi'                                        (Hendrycks & Gimpel 2016, eq. 2)
//   tanh form: Phi ~ (1 + tanh(z)) / 2 = s(2 z), so with v = 2 z = 2 sqrt(2/pi) (u + 0.044715 u^3), Phi' = s (1 - s) v'
//
// One exponential and one division give a value and its slope, so a backward pass costs little more than a forward one.
// Where an argument is bounded below, the value beyond the bound is 0 to 1e-35, and the slope to the same.

#include <numbers>

#include "activation.h"
#include "lanes.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

// exp(x) for |x| <= 87: 2^n, whose n goes straight into the exponent's bits, times a polynomial in x - n ln 2. The
// polynomials are minimax in the relative error: 2e-9 for fp32 (1 ulp in all), 3e-6 for the 16-bit types, a hundredth of
// the rounding of fp16.
template <typename T>
at::vec::Vectorized<float> exponential(const at::vec::Vectorized<float>& x) {
  using V = at::vec::Vectorized<float>;
  const V magic(12582912.0f);  // 1.5 * 2^23: the last bits of a sum with it are the other term, rounded to an integer
  const V shifted = fmadd(x, V(std::numbers::log2e_v<float>), magic);
  const V n = shifted - magic;
  V p;
  if constexpr (is_half_width<T>) {
    const V r = fmadd(n, V(-std::numbers::ln2_v<float>), x);
    p = fmadd(V(0.0415136814f), r, V(0.167875916f));
    p = fmadd(fmadd(fmadd(p, r, V(0.50003022f)), r, V(0.99996680f)), r, V(1.0f));
  } else {
    // ln 2 in two parts, the first short enough for exact products.
    const V r = fmadd(n, V(-1.42860677e-6f), fmadd(n, V(-0.693145752f), x));
    p = fmadd(V(0.00138436072f), r, V(0.00837419555f));
    p = fmadd(fmadd(p, r, V(0.0416680053f)), r, V(0.166664302f));
    p = fmadd(fmadd(fmadd(p, r, V(0.49999994f)), r, V(1.0f)), r, V(1.0f));
  }
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits power = at::vec::cast<int32_t>(shifted) << Bits(23);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + power);
}

template <typename T>
Lanes<acc_t<T>> exponential(const Lanes<acc_t<T>>& x) {
  if constexpr (std::is_same_v<T, double>) {
    return x.exp();
  } else {
    return Lanes<float>(exponential<T>(x[0]), exponential<T>(x[1]));
  }
}

// A value and its slope. Forward passes use the value alone: inlined, what only the slope needs is left out.
template <typename A>
struct Activated {
  Lanes<A> value;
  Lanes<A> slope;
};

template <typename T>
Activated<acc_t<T>> silu(const Lanes<acc_t<T>>& x) {
  using A = acc_t<T>;
  const Lanes<A> one(1), low = clamp_min(x, Lanes<A>(-87)), u = clamp_max(low, Lanes<A>(87));
  const auto e = exponential<T>(u.neg());
  const auto s = one / (one + e);
  return {low * s, fmadd(u * s, e * s, s)};  // 1 - s = e s keeps its digits
}

template <typename T>
Activated<acc_t<T>> gelu_tanh(const Lanes<acc_t<T>>& x) {
  using A = acc_t<T>;
  constexpr A k = 2 * std::numbers::sqrt2_v<A> * std::numbers::inv_sqrtpi_v<A>, cube = A(0.044715) * k;
  // |v| = 85 at the bound.
  const Lanes<A> one(1), low = clamp_min(x, Lanes<A>(A(-9.9))), u = clamp_max(low, Lanes<A>(A(9.9)));
  const auto square = u * u;
  const auto minus_v = u * fmadd(square, Lanes<A>(-cube), Lanes<A>(-k));
  const auto e = exponential<T>(minus_v);
  const auto s = one / (one + e);
  const auto u_dv = u * fmadd(square, Lanes<A>(3 * cube), Lanes<A>(k));
  return {low * s, fmadd(u_dv * s, e * s, s)};
}

// Phi(-|u|) = exp(-u^2 / 2) t (a1 + t (a2 + ...)) / 2 with t = 1 / (1 + p |u| / sqrt 2): Abramowitz & Stegun 7.1.26, to
// 8e-8 in absolute terms, as torch has it. fp64 takes the library's erfc instead.
template <typename T>
Activated<acc_t<T>> gelu_erf(const Lanes<acc_t<T>>& x) {
  using A = acc_t<T>;
  using std::numbers::sqrt2_v, std::numbers::inv_sqrtpi_v;
  const Lanes<A> one(1), low = clamp_min(x, Lanes<A>(-13)), u = clamp_max(low, Lanes<A>(13));
  const auto e = exponential<T>(u * u * Lanes<A>(A(-0.5)));
  Lanes<A> phi;
  if constexpr (std::is_same_v<T, double>) {
    phi = (u * Lanes<A>(-sqrt2_v<A> / 2)).erfc() * Lanes<A>(0.5);
  } else {
    const auto t = one / fmadd(u.abs(), Lanes<A>(0.3275911f * sqrt2_v<A> / 2), one);
    auto p = fmadd(t, Lanes<A>(0.5f * 1.061405429f), Lanes<A>(0.5f * -1.453152027f));
    p = fmadd(fmadd(p, t, Lanes<A>(0.5f * 1.421413741f)), t, Lanes<A>(0.5f * -0.284496736f));
    const auto tail = fmadd(p, t, Lanes<A>(0.5f * 0.254829592f)) * t * e;
    phi = Lanes<A>::blendv(tail, one - tail, u >= Lanes<A>(0));
  }
  return {low * phi, fmadd(u * Lanes<A>(inv_sqrtpi_v<A> * sqrt2_v<A> / 2), e, phi)};
}

template <Activation kActivation, typename T>
Activated<acc_t<T>> activate(const Lanes<acc_t<T>>& x) {
  if constexpr (kActivation == Activation::SILU) {
    return silu<T>(x);
  } else if constexpr (kActivation == Activation::GELU_TANH) {
    return gelu_tanh<T>(x);
  } else {
    return gelu_erf<T>(x);
  }
}

// Inlines all that is called. With sanitizers, which surround every access by code, that would take the compiler minutes.
#if defined(__SANITIZE_ADDRESS__)
#define MEGAPRE_FLATTEN
#else
#define MEGAPRE_FLATTEN [[gnu::flatten]]
#endif

template <Activation kActivation, typename T>
MEGAPRE_FLATTEN void forward_rows(const ActivationRows& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* bias = static_cast<const A*>(op.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(op.x) + row * op.x_stride;
    T* y = static_cast<T*>(op.out) + row * op.width;
    if (op.gated) {
      const T* up = x + op.width;
      for_lanes<T>(op.width, [&](int64_t i, auto... count) {
        const auto value = activate<kActivation, T>(load_lanes(x + i, count...)).value;
        store_lanes(y + i, value * load_lanes(up + i, count...), count...);
      });
    } else if (bias != nullptr) {
      for_lanes<T>(op.width, [&](int64_t i, auto... count) {
        const auto u = load_lanes(x + i, count...) + load_lanes(bias + i, count...);
        store_lanes(y + i, activate<kActivation, T>(u).value, count...);
      });
    } else {
      for_lanes<T>(op.width, [&](int64_t i, auto... count) {
        store_lanes(y + i, activate<kActivation, T>(load_lanes(x + i, count...)).value, count...);
      });
    }
  }
}

template <Activation kActivation, typename T>
void gated_backward_row(const T* dy, const T* x, T* dx, int64_t width) {
  for_lanes<T>(width, [&](int64_t i, auto... count) {
    const auto gate = activate<kActivation, T>(load_lanes(x + i, count...));
    const auto d = load_lanes(dy + i, count...);
    store_lanes(dx + i, d * load_lanes(x + width + i, count...) * gate.slope, count...);
    store_lanes(dx + width + i, d * gate.value, count...);
  });
}

template <Activation kActivation, typename T>
MEGAPRE_FLATTEN void backward_rows(const ActivationRows& op, int64_t begin, int64_t end, void* sums) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(op.x);
  const T* dy = static_cast<const T*>(op.dy);
  T* dx = static_cast<T*>(op.out);
  if (op.bias == nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      const T *x_row = x + row * op.x_stride, *dy_row = dy + row * op.dy_stride;
      if (op.gated) {
        gated_backward_row<kActivation>(dy_row, x_row, dx + row * 2 * op.width, op.width);
        continue;
      }
      for_lanes<T>(op.width, [&](int64_t i, auto... count) {
        const auto slope = activate<kActivation, T>(load_lanes(x_row + i, count...)).slope;
        store_lanes(dx + row * op.width + i, load_lanes(dy_row + i, count...) * slope, count...);
      });
    }
    return;
  }
  const A* bias = static_cast<const A*>(op.bias);
  sum_blocks(static_cast<A*>(sums), op.width, begin, end, [&](int64_t row, A* dbias) {
    const T *x_row = x + row * op.x_stride, *dy_row = dy + row * op.dy_stride;
    for_lanes<T>(op.width, [&](int64_t i, auto... count) {
      const auto u = load_lanes(x_row + i, count...) + load_lanes(bias + i, count...);
      const auto d = load_lanes(dy_row + i, count...) * activate<kActivation, T>(u).slope;
      store_lanes(dx + row * op.width + i, d, count...);
      store_lanes(dbias + i, load_lanes(dbias + i, count...) + d, count...);
    });
  });
}

// Calls f(activation, T{}) with the activation as a constant.
template <typename F>
void with_activation(const ActivationRows& op, const F& f) {
  with_type(op.dtype, [&](auto t) {
    switch (op.activation) {
      case Activation::SILU:
        return f(std::integral_constant<Activation, Activation::SILU>{}, t);
      case Activation::GELU_TANH:
        return f(std::integral_constant<Activation, Activation::GELU_TANH>{}, t);
      default:
        return f(std::integral_constant<Activation, Activation::GELU_ERF>{}, t);
    }
  });
}

void forward(const ActivationRows& op, int64_t begin, int64_t end) {
  with_activation(op, [&](auto activation, auto t) { forward_rows<activation(), decltype(t)>(op, begin, end); });
}

void backward(const ActivationRows& op, int64_t begin, int64_t end, void* sums) {
  with_activation(op, [&](auto activation, auto t) {
    backward_rows<activation(), decltype(t)>(op, begin, end, sums);
  });
}

}  // namespace

const ActivationKernels activation_kernels{forward, backward};

}  // namespace megapre::cpu::CPU_CAPABILITY
