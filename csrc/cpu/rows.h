// Tensors seen as rows, for the drivers of ops that work row by row.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstdint>

namespace megapre::cpu {

// The four float types that the row loops are compiled for.
inline bool is_supported(c10::ScalarType dtype) {
  return dtype == c10::kFloat || dtype == c10::kBFloat16 || dtype == c10::kDouble || dtype == c10::kHalf;
}

inline c10::ScalarType acc_dtype(c10::ScalarType dtype) {
  return dtype == c10::kDouble ? c10::kDouble : c10::kFloat;
}

// `stride` elements lie between the starts of two rows; elements of a row are neighbours.
struct Rows {
  at::Tensor holder;
  int64_t count;
  int64_t width;
  int64_t stride;

  // Copies only what has no single row stride.
  explicit Rows(const at::Tensor& t) : holder(t), width(t.size(-1)) {
    const bool strided = t.dim() == 2 && (t.stride(1) == 1 || width == 1);
    if (!strided) {
      holder = t.contiguous();
    }
    count = c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
    stride = strided ? t.stride(0) : width;
  }

  void* data() const {
    return holder.data_ptr();
  }
};

// Rows a thread should have at least, so that starting it pays: about 32,768 elements.
inline int64_t grain(int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
}

}  // namespace megapre::cpu
