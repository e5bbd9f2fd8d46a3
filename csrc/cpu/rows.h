// Tensors seen as rows, for the drivers of ops that work row by row.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace megapre::cpu {

// The four float types that the row loops are compiled for.
inline bool is_supported(c10::ScalarType dtype) {
  return dtype == c10::kFloat || dtype == c10::kBFloat16 || dtype == c10::kDouble || dtype == c10::kHalf;
}

inline c10::ScalarType acc_dtype(c10::ScalarType dtype) {
  return dtype == c10::kDouble ? c10::kDouble : c10::kFloat;
}

inline bool is_half_width(c10::ScalarType dtype) {
  return dtype == c10::kBFloat16 || dtype == c10::kHalf;
}

// t with the elements of its last dim as neighbours; copied only where they are not.
inline at::Tensor with_neighbours(const at::Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

// Before t is written where it lies: the elements of a row must be neighbours, and rows must not overlap. The latter holds
// if each dim, by rising stride, steps over all that the dims before it reach.
inline void check_writable(const char* op, const at::Tensor& t, const char* name) {
  c10::SmallVector<int64_t, 5> dims(t.dim());
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  bool apart = true;
  int64_t reach = 1;
  for (const int64_t dim : dims) {
    if (t.size(dim) > 1 && t.numel() > 0) {
      apart = apart && t.stride(dim) >= reach;
      reach += (t.size(dim) - 1) * t.stride(dim);
    }
  }
  TORCH_CHECK_VALUE(
      apart && (t.stride(-1) == 1 || t.size(-1) <= 1), op, ": ", name, " has shape ", t.sizes(), " and strides ",
      t.strides(), "; to be written, the ", t.size(-1),
      " elements of a row must be neighbours and rows must not overlap");
}

// A vector of weights, or of biases, as the row loops of x read it.
inline at::Tensor to_acc(const at::Tensor& vector, const at::Tensor& x) {
  return vector.to(acc_dtype(x.scalar_type())).contiguous();
}

// For each tensor that an op writes into, after its checks. Autograd compares versions to notice that a tensor which it
// saved for a backward has been overwritten.
inline void raise_version(const at::Tensor& t) {
  t.unsafeGetTensorImpl()->bump_version();
}

// `stride` elements lie between the starts of two rows; elements of a row are neighbours.
struct Rows {
  at::Tensor holder;
  int64_t count;
  int64_t width;
  int64_t stride;

  // Copies only what has no single row stride.
  explicit Rows(const at::Tensor& t) : holder(t), width(t.size(-1)), stride(row_stride(t)) {
    count = c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
    if (stride < 0) {
      holder = t.contiguous();
      stride = width;
    }
  }

  void* data() const {
    return holder.data_ptr();
  }

 private:
  // The distance from every row to the next across all leading dims; -1 where there is no such number.
  static int64_t row_stride(const at::Tensor& t) {
    if (t.stride(-1) != 1 && t.size(-1) > 1) {
      return -1;
    }
    int64_t stride = t.size(-1), outer = -1;
    for (int64_t dim = t.dim() - 2; dim >= 0; --dim) {
      if (t.size(dim) == 1) {  // its stride means nothing
        continue;
      }
      if (outer == -1) {
        stride = t.stride(dim);
      } else if (t.stride(dim) != outer) {
        return -1;
      }
      outer = t.stride(dim) * t.size(dim);
    }
    return stride;
  }
};

// Rows a thread should have at least, so that starting it pays: about 32,768 elements.
inline int64_t grain(int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
}

}  // namespace megapre::cpu
