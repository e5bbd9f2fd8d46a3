// Loops of adamw_ and adamw_stochastic_. Compiled once per CPU level.
//
//   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2                                with g = grad grad_scale
//   p = p decay - rate m / (sqrt(v) root_scale + eps)
//
// Every element is read once and written once, and its result does not depend on where a thread's share begins. Types
// are looked up once for some 32 elements, which costs nothing beside the memory they come from.

#include <algorithm>
#include <bit>
#include <cstring>

#include "adamw.h"
#include "lanes.h"
#include "philox.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

using c10::ScalarType;

template <typename A, typename... Rest>
Lanes<A> load_as(ScalarType dtype, const void* base, int64_t at, Rest... rest) {
  if constexpr (std::is_same_v<A, double>) {
    return load_lanes(static_cast<const double*>(base) + at, rest...);
  } else if (dtype == ScalarType::Float) {
    return load_lanes(static_cast<const float*>(base) + at, rest...);
  } else if (dtype == ScalarType::BFloat16) {
    return load_lanes(static_cast<const c10::BFloat16*>(base) + at, rest...);
  } else {
    return load_lanes(static_cast<const c10::Half*>(base) + at, rest...);
  }
}

template <typename A, typename... Rest>
void store_as(ScalarType dtype, void* base, int64_t at, const Lanes<A>& v, Rest... rest) {
  if constexpr (std::is_same_v<A, double>) {
    if (dtype == ScalarType::Double) {
      return store_lanes(static_cast<double*>(base) + at, v, rest...);
    }
    double values[kLanes<double>];
    v.store(values);
    const int64_t count = std::min<int64_t>({kLanes<double>, rest...});
    with_type(dtype, [&](auto t) {
      std::transform(values, values + count, static_cast<decltype(t)*>(base) + at, [](double value) {
        return static_cast<decltype(t)>(value);
      });
    });
  } else if (dtype == ScalarType::Float) {
    store_lanes(static_cast<float*>(base) + at, v, rest...);
  } else if (dtype == ScalarType::BFloat16) {
    store_lanes(static_cast<c10::BFloat16*>(base) + at, v, rest...);
  } else {
    store_lanes(static_cast<c10::Half*>(base) + at, v, rest...);
  }
}

// Writes whole vectors of a 16-bit parameter past the caches, to aligned memory. It is written and not read, so an
// ordinary store would first fetch the line it replaces: 2 of 36 bytes an element, and 3% to 9% of the time measured.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kCanStream = true;

template <typename T>
void stream(void* base, int64_t at, const Lanes<float>& v) {
  const at::vec::Vectorized<T> packed = at::vec::convert<T, 1, float, 2>(v);
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<T*>(base) + at), packed);
#else
  _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<T*>(base) + at), packed);
#endif
}

void finish_stream() {
  _mm_sfence();  // what was written is seen by every thread before this one says that it is done
}
#else
constexpr bool kCanStream = false;

template <typename T>
void stream(void*, int64_t, const Lanes<float>&) {}

void finish_stream() {}
#endif

// The coefficients of a call, in every lane.
template <typename A>
struct Rule {
  Lanes<A> scale, beta1, rest1, beta2, rest2, eps, decay, rate, root_scale;

  explicit Rule(const AdamW& op)
      : scale(A(op.grad_scale)),
        beta1(A(op.beta1)),
        rest1(A(1 - op.beta1)),
        beta2(A(op.beta2)),
        rest2(A(1 - op.beta2)),
        eps(A(op.eps)),
        decay(A(op.decay)),
        rate(A(op.rate)),
        root_scale(A(op.root_scale)) {}

  void operator()(Lanes<A>& p, Lanes<A>& m, Lanes<A>& v, Lanes<A> g) const {
    g = g * scale;
    m = fmadd(rest1, g, beta1 * m);
    v = fmadd(rest2 * g, g, beta2 * v);
    p = p * decay - rate * m / fmadd(v.sqrt(), root_scale, eps);
  }
};

template <typename A, bool kStream>
void update_as(const AdamW& op, int64_t begin, int64_t end) {
  const Rule<A> rule(op);
  for_lanes<A>(end - begin, [&](int64_t at, auto... rest) {
    const int64_t i = begin + at;
    auto p = load_as<A>(op.master_dtype, op.master, i, rest...);
    auto m = load_as<A>(op.moment_dtype, op.exp_avg, i, rest...);
    auto v = load_as<A>(op.moment_dtype, op.exp_avg_sq, i, rest...);
    rule(p, m, v, load_as<A>(op.grad_dtype, op.grad, i, rest...));
    store_as<A>(op.moment_dtype, op.exp_avg, i, m, rest...);
    store_as<A>(op.moment_dtype, op.exp_avg_sq, i, v, rest...);
    store_as<A>(op.master_dtype, op.master, i, p, rest...);
    if constexpr (kStream && sizeof...(rest) == 0) {
      op.param_dtype == ScalarType::BFloat16 ? stream<c10::BFloat16>(op.param, i, p) : stream<c10::Half>(op.param, i, p);
    } else if (op.param != nullptr) {
      store_as<A>(op.param_dtype, op.param, i, p, rest...);
    }
  });
  if constexpr (kStream) {
    finish_stream();
  }
}

void update(const AdamW& op, int64_t begin, int64_t end) {
  if (op.master_dtype == ScalarType::Double) {
    update_as<double, false>(op, begin, end);
  } else if (kCanStream && op.stream) {
    update_as<float, true>(op, begin, end);
  } else {
    update_as<float, false>(op, begin, end);
  }
}

// x plus a random number below its last place in bf16, then cut: up with the probability of the part cut off.
inline uint16_t round_stochastic(float x, uint16_t random) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  const uint32_t quiet = (bits & 0x007FFFFFu) != 0 ? 0x40u : 0u;  // a NaN stays one when its low half is cut off
  return static_cast<uint16_t>(finite ? (bits + random) >> 16 : bits >> 16 | quiet);
}

void store_stochastic(void* base, int64_t at, const Lanes<float>& v, const uint16_t* random, int64_t count) {
  constexpr int64_t n = kLanes<float>;
  float values[n];
  uint16_t rounded[n];
  v.store(values);
  for (int64_t i = 0; i < n; ++i) {
    rounded[i] = round_stochastic(values[i], random[i]);
  }
  std::memcpy(static_cast<c10::BFloat16*>(base) + at, rounded, count * sizeof(uint16_t));
}

void update_stochastic(const AdamW& op, int64_t begin, int64_t end) {
  constexpr int64_t n = kLanes<float>;
  const Rule<float> rule(op);
  const bool narrow_moments = op.moment_dtype == ScalarType::BFloat16;
  // The bits of one group for the parameter and both moments, and room to read a whole vector at its end.
  uint16_t random[3][kPhiloxGroup + n] = {};
  const auto step = [&](int64_t i, int64_t in_group, int64_t count, auto... rest) {
    auto p = load_as<float>(ScalarType::BFloat16, op.master, i, rest...);
    auto m = load_as<float>(op.moment_dtype, op.exp_avg, i, rest...);
    auto v = load_as<float>(op.moment_dtype, op.exp_avg_sq, i, rest...);
    rule(p, m, v, load_as<float>(op.grad_dtype, op.grad, i, rest...));
    store_stochastic(op.master, i, p, random[0] + in_group, count);
    if (narrow_moments) {
      store_stochastic(op.exp_avg, i, m, random[1] + in_group, count);
      store_stochastic(op.exp_avg_sq, i, v, random[2] + in_group, count);
    } else {
      store_as<float>(op.moment_dtype, op.exp_avg, i, m, rest...);
      store_as<float>(op.moment_dtype, op.exp_avg_sq, i, v, rest...);
    }
  };
  for (int64_t i = begin; i < end;) {
    const int64_t number = op.offset + i;
    int64_t in_group = number % kPhiloxGroup;
    const int64_t group_end = std::min(end, i + kPhiloxGroup - in_group);
    for (uint32_t stream = 0; stream < (narrow_moments ? 3 : 1); ++stream) {
      philox_group(op.seed, number / kPhiloxGroup, op.step, stream, random[stream]);
    }
    for (; i + n <= group_end; i += n, in_group += n) {
      step(i, in_group, n);
    }
    if (i < group_end) {
      step(i, in_group, group_end - i, group_end - i);
      i = group_end;
    }
  }
}

}  // namespace

const AdamWKernels adamw_kernels{update, update_stochastic};

}  // namespace megapre::cpu::CPU_CAPABILITY
