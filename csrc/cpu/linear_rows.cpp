// Row loops of the linear layer: what happens to a tile of a product on its way to memory. Compiled once per CPU level.

#include "lanes.h"
#include "linear.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
void finish_rows(int64_t m, int64_t n, const float* c, int64_t ldc, const float* bias, T* out, int64_t ldo, bool accumulate) {
  for (int64_t row = 0; row < m; ++row, c += ldc, out += ldo) {
    for_lanes<T>(n, [&](int64_t i, auto... count) {
      auto v = load_lanes(c + i, count...);
      if (bias != nullptr) {
        v = v + load_lanes(bias + i, count...);
      }
      if (accumulate) {
        v = v + load_lanes(out + i, count...);
      }
      store_lanes(out + i, v, count...);
    });
  }
}

template <typename T>
void sum_rows(int64_t m, int64_t n, const T* a, int64_t lda, float* sums, bool accumulate) {
  for (int64_t row = 0; row < m; ++row, a += lda) {
    Lanes<float> total(0);
    for_lanes<T>(n, [&](int64_t i, auto... count) { total = total + load_lanes(a + i, count...); });
    sums[row] = (accumulate ? sums[row] : 0.0f) + sum<float>(total);
  }
}

// The driver sends the 16-bit types and fp32.
template <typename F>
void with_type_up_to_fp32(c10::ScalarType dtype, const F& f) {
  with_type(dtype, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), double>) {
      f(t);
    }
  });
}

void finish(
    c10::ScalarType dtype, int64_t m, int64_t n, const float* c, int64_t ldc, const float* bias, void* out,
    int64_t ldo, bool accumulate) {
  with_type_up_to_fp32(
      dtype, [&](auto t) { finish_rows(m, n, c, ldc, bias, static_cast<decltype(t)*>(out), ldo, accumulate); });
}

void row_sums(
    c10::ScalarType dtype, int64_t m, int64_t n, const void* a, int64_t lda, float* sums, bool accumulate) {
  with_type_up_to_fp32(
      dtype, [&](auto t) { sum_rows(m, n, static_cast<const decltype(t)*>(a), lda, sums, accumulate); });
}

}  // namespace

const LinearKernels linear_kernels{finish, row_sums};

}  // namespace megapre::cpu::CPU_CAPABILITY
