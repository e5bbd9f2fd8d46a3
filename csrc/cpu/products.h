// Products of tiles, for ops that hold their operands in cache: attention, linear layers, linear + cross-entropy.
//
// Two forms. Where the CPU multiplies 16-bit types itself (AVX-512 bf16, AMX) at::native::cpublas::brgemm: oneDNN's
// micro-kernels, compiled at run time for each shape of tile, so few shapes should occur. Everywhere else the vector
// loops of products_rows.cpp, which compute in fp32.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "level.h"

namespace megapre::cpu {

// All sizes and strides are in elements. The elements of a row are neighbours; ld.. lie between the starts of two rows.
struct Products {
  // What `pack` and `transpose` fill k up to by zeros: at least to an even number, and for brgemm to one of few.
  int64_t (*filled)(int64_t k);

  // Bytes of a packed B of k rows and n columns.
  int64_t (*packed_bytes)(int64_t k, int64_t n);

  // Packs B for `multiply`, from B itself [k, n] or from its transpose [n, k]; the latter fills up an odd k only.
  void (*pack)(int64_t k, int64_t n, const void* b, int64_t ldb, void* packed);
  void (*pack_transposed)(int64_t k, int64_t n, const void* b, int64_t ldb, void* packed);

  // C [m, n] fp32 = A [m, k] B [k, n], added to C where `accumulate`. A is in the dtype that B was packed from. k may be
  // as large as B was filled up, if A has columns of zeros there; then `products` is asked with that k too.
  void (*multiply)(
      int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* packed, float* c, int64_t ldc,
      bool accumulate);

  // at [n, filled(k)] = transpose of a [k, n]: what `multiply` takes as A where the sum runs over the rows of a.
  void (*transpose)(int64_t k, int64_t n, const void* a, int64_t lda, void* at);

  // To be called on each thread after its last `multiply`.
  void (*release)();
};

// The form for operands of `dtype` (fp32, bf16 or fp16) whose products sum over k elements. brgemm takes even k alone.
const Products& products(c10::ScalarType dtype, int64_t k);

// Whether `products` of `dtype` are the CPU's own: bf16 on AVX-512 bf16 or AMX, say.
bool has_products_of(c10::ScalarType dtype);

// One table of the vector form per dtype, and the packing that brgemm wants.
struct ProductKernels {
  Products of_float;
  Products of_bfloat16;
  Products of_half;
  Products brgemm;  // packing of a 16-bit type; `multiply` and `release` are filled in by products.cpp
};

MEGAPRE_DECLARE_LEVELS(ProductKernels, product_kernels)

}  // namespace megapre::cpu
