// The choice between brgemm and the vector loops.

#include "products.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

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

template <typename T>
Products brgemm_products() {
  Products form = MEGAPRE_CHOOSE(product_kernels).brgemm;
  form.multiply = brgemm<T>;
  form.release = release;
  return form;
}

const Products* own_products(c10::ScalarType dtype) {
  static const bool avx512 = level() == Level::AVX512;
  static const bool bf16 = avx512 && (__builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16"));
  static const bool fp16 = avx512 && __builtin_cpu_supports("avx512fp16");
  if (dtype == c10::kBFloat16 && bf16) {
    static const Products form = brgemm_products<c10::BFloat16>();
    return &form;
  }
  if (dtype == c10::kHalf && fp16) {
    static const Products form = brgemm_products<c10::Half>();
    return &form;
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
