// The choice between brgemm and the vector loops.

#include "products.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <exception>

namespace megapre::cpu {
namespace {

// brgemm is no promised interface of torch: its header says by a macro for each dtype that it is there.
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPUBLAS_BRGEMM_F16F16F32) && defined(__x86_64__)

template <typename T>
void brgemm(
    int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* packed, float* c, int64_t ldc,
    bool accumulate) {
  at::native::cpublas::brgemm(
      m, n, k, lda, n, ldc, accumulate, static_cast<const T*>(a), static_cast<const T*>(packed), c, /*is_vnni=*/true);
}

void release() {
  at::native::cpublas::brgemm_release();
}

// Torch may have been built without oneDNN's micro-kernels, and ONEDNN_MAX_CPU_ISA may forbid them what the CPU can do:
// then brgemm raises.
template <typename T>
bool brgemm_runs() {
  constexpr int64_t n = 16;
  const T zeros[n * n] = {};
  float c[n * n];
  try {
    brgemm<T>(n, n, n, zeros, n, zeros, c, n, /*accumulate=*/false);
  } catch (const std::exception&) {
    return false;
  }
  release();
  return true;
}

template <typename T>
const Products* brgemm_products() {
  static const bool runs = brgemm_runs<T>();
  static const Products form = [] {
    Products products = MEGAPRE_CHOOSE(product_kernels).brgemm;
    products.multiply = brgemm<T>;
    products.release = release;
    return products;
  }();
  return runs ? &form : nullptr;
}

const Products* own_products(c10::ScalarType dtype) {
  if (level() != Level::AVX512 || !at::globalContext().userEnabledMkldnn()) {
    return nullptr;
  }
  // A CPU with AMX has avx512bf16 too; attention converts by it.
  if (dtype == c10::kBFloat16 && __builtin_cpu_supports("avx512bf16")) {
    return brgemm_products<c10::BFloat16>();
  }
  if (dtype == c10::kHalf && __builtin_cpu_supports("avx512fp16")) {
    return brgemm_products<c10::Half>();
  }
  return nullptr;
}

#else

const Products* own_products(c10::ScalarType) {
  return nullptr;
}

#endif

}  // namespace

bool has_products_of(c10::ScalarType dtype) {
  return own_products(dtype) != nullptr;
}

const Products& products(c10::ScalarType dtype, int64_t k) {
  const Products* own = k % 2 == 0 ? own_products(dtype) : nullptr;
  if (own != nullptr) {
    return *own;
  }
  const ProductKernels& kernels = MEGAPRE_CHOOSE(product_kernels);
  switch (dtype) {
    case c10::kFloat:
      return kernels.of_float;
    case c10::kBFloat16:
      return kernels.of_bfloat16;
    case c10::kHalf:
      return kernels.of_half;
    default:
      TORCH_CHECK_TYPE(false, "tile products of ", dtype, ": supported are fp32, bf16, fp16");
  }
}

}  // namespace megapre::cpu
