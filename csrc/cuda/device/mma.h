// Tensor-core products of a warp (sm_80 and up): matrices from shared memory into registers, and D += A B of a 16 x 16 and
// a 16 x 8 matrix with fp32 sums. PTX ISA, "ldmatrix" and "mma.m16n8k16".
//
// With g = lane / 4 and c = 2 * (lane % 4) a lane holds
//   A  a[0] (g, c..c+1)   a[1] (g+8, c..c+1)   a[2] (g, c+8..c+9)   a[3] (g+8, c+8..c+9)     two 16-bit elements each
//   B  b[0] (c..c+1, g)   b[1] (c+8..c+9, g)                                                  (k, n)
//   D  d[0] (g, c)   d[1] (g, c+1)   d[2] (g+8, c)   d[3] (g+8, c+1)                          fp32
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace megapre::cuda {

// Four 8 x 8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8, 16 bytes aligned to 16;
// r[m] gets elements (lane / 4, c) and (lane / 4, c + 1) of matrix m, of its transpose with TRANSPOSED.
template <bool TRANSPOSED = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// T: __nv_bfloat16 or __half, the elements of a and b.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace megapre::cuda
