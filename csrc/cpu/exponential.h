// The exponential of the row loops whose results are rounded to 16 bits. As lanes.h, only for files compiled once per level.
#pragma once

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#include <numbers>

#include "lanes.h"

namespace megapre::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
// 2^x to a relative 1.5e-7, the coefficients fitted to that on [0, 1); 0 gives 1, -inf gives 0, NaN gives NaN.
inline __m512 power_of_two(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.00186713028f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00901702978f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0557999201f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240164474f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693151295f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}
#endif

// exp(x). For the 16-bit types to a relative 1e-7 (1 + |x|) with AVX-512, 20 ulp without; for the others to about 2 ulp.
template <typename T>
inline Lanes<acc_t<T>> exponential(const Lanes<acc_t<T>>& x) {
  if constexpr (!is_half_width<T>) {
    return x.exp();
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    using V = at::vec::Vectorized<float>;
    const V to_base_two(std::numbers::log2e_v<float>);
    return Lanes<float>(V(power_of_two(x[0] * to_base_two)), V(power_of_two(x[1] * to_base_two)));
#else
    return x.exp_u20();
#endif
  }
}

}  // namespace megapre::cpu::CPU_CAPABILITY
