// Vectors for the row loops: load any float type into accumulator lanes, compute there, store back.
// Only for files compiled once per CPU level. Nothing here may have external linkage outside the level's namespace:
// the linker keeps one copy of an inline function, and an AVX-512 copy would crash an older CPU at another level.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace megapre::cpu::CPU_CAPABILITY {

// fp64 computes in fp64, everything else in fp32.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Two vectors of accumulators, as many lanes as one vector of a 16-bit type has.
template <typename A>
using Lanes = at::vec::VectorizedN<A, 2>;

template <typename T>
constexpr int64_t kLanes = Lanes<acc_t<T>>::size();

template <typename T>
constexpr bool is_half_width = sizeof(T) == 2;

template <typename T>
inline Lanes<acc_t<T>> load_lanes(const T* p) {
  if constexpr (is_half_width<T>) {
    return at::vec::convert<float, 2, T, 1>(at::vec::VectorizedN<T, 1>(at::vec::Vectorized<T>::loadu(p)));
  } else {
    return Lanes<T>::loadu(p);
  }
}

// The first `count` (< kLanes) lanes from memory, the others zero.
template <typename T>
inline Lanes<acc_t<T>> load_lanes(const T* p, int64_t count) {
  using at::vec::Vectorized;
  if constexpr (is_half_width<T>) {
    return at::vec::convert<float, 2, T, 1>(at::vec::VectorizedN<T, 1>(Vectorized<T>::loadu(p, count)));
  } else {
    constexpr int64_t n = Vectorized<T>::size();
    return count <= n ? Lanes<T>(Vectorized<T>::loadu(p, count), Vectorized<T>(0))
                      : Lanes<T>(Vectorized<T>::loadu(p), Vectorized<T>::loadu(p + n, count - n));
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// To nearest, ties to even, in eight instructions; at::vec's convert takes seventeen. The upper halves of the lanes are
// the results rounded down. One more where the lower half exceeds a half, or is one and the upper odd, and where that makes
// no 0 of a NaN of all ones (NaN computed here are quiet: the upper half tells them).
inline at::vec::Vectorized<c10::BFloat16> rounded_to_bf16(const Lanes<float>& v) {
  const __m512i lower = _mm512_set_epi32(
      0x003e003c, 0x003a0038, 0x00360034, 0x00320030, 0x002e002c, 0x002a0028, 0x00260024, 0x00220020, 0x001e001c,
      0x001a0018, 0x00160014, 0x00120010, 0x000e000c, 0x000a0008, 0x00060004, 0x00020000);
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i first = _mm512_castps_si512(v[0]), second = _mm512_castps_si512(v[1]);
  const __m512i low = _mm512_permutex2var_epi16(first, lower, second);
  const __m512i high = _mm512_permutex2var_epi16(first, _mm512_add_epi16(lower, one), second);
  const __m512i sticky = _mm512_ternarylogic_epi32(low, high, one, 0xf8);  // low | (high & 1)
  const __mmask32 above = _mm512_cmp_epu16_mask(sticky, _mm512_set1_epi16(-0x8000), _MM_CMPINT_NLE);
  const __m512i next = _mm512_add_epi16(high, one);
  return _mm512_mask_mov_epi16(high, _mm512_mask_test_epi16_mask(above, next, _mm512_set1_epi16(0x7fff)), next);
}
#endif

template <typename T>
inline void store_lanes(T* p, const Lanes<acc_t<T>>& v, int64_t count = kLanes<T>) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    rounded_to_bf16(v).store(p, static_cast<int>(count));
    return;
  }
#endif
  if constexpr (is_half_width<T>) {
    at::vec::convert<T, 1, float, 2>(v).store(p, static_cast<int>(count));
  } else if (count == kLanes<T>) {
    v.store(p);
  } else {
    v.store(p, static_cast<int>(count));
  }
}

// The first `count` lanes of v, the others zero.
template <typename A>
inline Lanes<A> first_lanes(const Lanes<A>& v, int64_t count) {
  return Lanes<A>::set(Lanes<A>(0), v, count);
}

template <typename A>
inline const Lanes<A>& first_lanes(const Lanes<A>& v) {
  return v;
}

template <typename A>
inline A sum(const Lanes<A>& v) {
  using V = at::vec::Vectorized<A>;
  return at::vec::vec_reduce_all([](const V& a, const V& b) { return a + b; }, v);
}

template <typename A>
inline A max(const Lanes<A>& v) {
  using V = at::vec::Vectorized<A>;
  return at::vec::vec_reduce_all([](const V& a, const V& b) { return at::vec::maximum(a, b); }, v);
}

// Calls step(i) for every whole group of kLanes<T> of `width` elements, then step(i, rest) for the `rest` behind them.
// What step takes as `auto... count` it hands on to load_lanes, first_lanes and store_lanes.
template <typename T, typename F>
inline void for_lanes(int64_t width, const F& step) {
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + n <= width; i += n) {
    step(i);
  }
  if (i < width) {
    step(i, width - i);
  }
}

// kSums sums over a row: step(total, i, count...) adds group i to total[0 .. kSums). Two independent sets of them hide
// the latency of the additions.
template <typename T, int kSums, typename F>
inline void sum_row(int64_t width, acc_t<T>* sums, const F& step) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  Lanes<A> even[kSums], odd[kSums];
  for (int at = 0; at < kSums; ++at) {
    even[at] = odd[at] = Lanes<A>(0);
  }
  int64_t i = 0;
  for (; i + 2 * n <= width; i += 2 * n) {
    step(even, i);
    step(odd, i + n);
  }
  if (i + n <= width) {
    step(even, i);
    i += n;
  }
  if (i < width) {
    step(odd, i, width - i);
  }
  for (int at = 0; at < kSums; ++at) {
    sums[at] = sum<A>(even[at] + odd[at]);
  }
}

// Sums over rows [begin, end) of what row_terms(row, block) adds to block[0 .. width), left in sums[0 .. width); the
// block is the `width` elements behind them. Long sums lose digits: 32 rows are summed first, then blocks are added up.
template <typename A, typename F>
inline void sum_blocks(A* sums, int64_t width, int64_t begin, int64_t end, const F& row_terms) {
  constexpr int64_t kBlockRows = 32;
  A* block = sums + width;
  std::fill_n(sums, width, A(0));
  for (int64_t first = begin; first < end; first += kBlockRows) {
    std::fill_n(block, width, A(0));
    for (int64_t row = first; row < std::min(first + kBlockRows, end); ++row) {
      row_terms(row, block);
    }
    for (int64_t i = 0; i < width; ++i) {
      sums[i] += block[i];
    }
  }
}

// Calls f(T{}) with the C++ type of `dtype`. The driver has refused every other dtype before.
template <typename F>
inline void with_type(c10::ScalarType dtype, const F& f) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return f(double{});
    case c10::ScalarType::Float:
      return f(float{});
    case c10::ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return f(c10::Half{});
  }
}

}  // namespace megapre::cpu::CPU_CAPABILITY
