// Loop of grad_norm. Compiled once per CPU level.
//
// A block is summed in fp32 (fp64 for fp64). Squares leave the range of fp32 long before the gradients do, above 1e19
// and below 1e-23: a block whose sum says so is read again, out of the cache, and summed in fp64. So the norm is not
// finite only where a gradient is not, or where it is itself beyond fp32, and a scaled loss loses nothing.

#include <algorithm>
#include <limits>

#include "grad_norm.h"
#include "lanes.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
acc_t<T> block_squares(const T* x, int64_t count) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  Lanes<A> even(0), odd(0);
  int64_t i = 0;
  for (; i + 2 * n <= count; i += 2 * n) {
    const auto a = load_lanes(x + i), b = load_lanes(x + i + n);
    even = fmadd(a, a, even);
    odd = fmadd(b, b, odd);
  }
  for (; i < count; i += n) {
    const int64_t rest = std::min(n, count - i);
    const auto a = rest == n ? load_lanes(x + i) : load_lanes(x + i, rest);
    even = fmadd(a, a, even);
  }
  return sum<A>(even + odd);
}

template <typename T>
double block_squares_wide(const T* x, int64_t count) {
  constexpr int64_t n = 16;
  double parts[n] = {};
  int64_t i = 0;
  for (; i + n <= count; i += n) {
    for (int64_t lane = 0; lane < n; ++lane) {
      const double value = static_cast<double>(static_cast<acc_t<T>>(x[i + lane]));
      parts[lane] += value * value;
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const double value = static_cast<double>(static_cast<acc_t<T>>(x[i]));
    parts[lane] += value * value;
  }
  double total = 0;
  for (const double part : parts) {
    total += part;
  }
  return total;
}

void squares(c10::ScalarType dtype, const void* grad, int64_t count, int64_t begin, int64_t end, double* sums) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* x = static_cast<const T*>(grad);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kNormBlock, length = std::min(kNormBlock, count - first);
      const auto sum = block_squares(x + first, length);
      // Below 1e-30 the sum of 4,096 squares may have lost some that were below fp32's smallest normal number.
      const bool in_range = sum >= 1e-30f && sum <= std::numeric_limits<float>::max();
      sums[block] = in_range ? static_cast<double>(sum) : block_squares_wide(x + first, length);
    }
  });
}

}  // namespace

const GradNormKernels grad_norm_kernels{squares};

}  // namespace megapre::cpu::CPU_CAPABILITY
