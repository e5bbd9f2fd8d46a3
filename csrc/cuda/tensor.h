// Tensors as the host side of an op sees them: checks, dtypes, rows.
#pragma once

#include <device/torch.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "vector.h"

namespace megapre::cuda {

using OptionalTensor = std::optional<Tensor>;

// A ValueError of `parts` in a row, unless it holds.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());
  }
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// "Float [8, 64]"
inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " [";
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    text << (dim ? ", " : "") << t.size(dim);
  }
  text << "]";
  return text.str();
}

template <typename T>
struct Type {
  using type = T;
};

// body(Type<T>) for the T of a dtype: fp32, bf16 or fp16.
template <typename Body>
void dispatch(const char* op, ScalarType dtype, Body body) {
  check(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": dtype ",
      torch::headeronly::toString(dtype), "; the CUDA kernels take fp32, bf16 and fp16");
  if (dtype == ScalarType::Float) {
    body(Type<float>{});
  } else if (dtype == ScalarType::BFloat16) {
    body(Type<bf16>{});
  } else {
    body(Type<fp16>{});
  }
}

// A kernel that reads memory of another device ends the process's use of its own.
inline void check_device(const char* op, const Tensor& t, const Tensor& like, const char* name) {
  check(t.device() == like.device(), op, ": ", name, " is on another device than ", describe(like), "; move it there");
}

inline void check_like(const char* op, const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  check(
      sizes_of(t) == sizes_of(like) && t.scalar_type() == like.scalar_type() && t.device() == like.device(), op, ": ",
      name, " is ", describe(t), " but ", like_name, " is ", describe(like),
      "; they must have the same shape, dtype and device");
}

// Before t is written where it lies: the elements of a row must be neighbours, and rows must not overlap. The latter holds
// if each dim, by rising stride, steps over all that the dims before it reach.
inline void check_writable(const char* op, const Tensor& t, const char* name) {
  std::vector<int64_t> dims(t.dim());
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
  check(
      apart && (t.stride(-1) == 1 || t.size(-1) <= 1), op, ": ", name, " is ", describe(t), " with a stride of ",
      t.stride(-1), " along its last dim; to be written, the ", t.size(-1),
      " elements of a row must be neighbours and rows must not overlap");
}

// For each tensor that an op writes into, after its checks. Autograd compares versions to notice that a tensor which it
// saved for a backward has been overwritten; a write to nothing of it counts, and launches nothing.
inline void raise_version(const Tensor& t) {
  Tensor whole = t;
  Tensor nothing = torch::stable::narrow(whole, 0, 0, 0);
  torch::stable::zero_(nothing);
}

inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A tensor [..., width] as rows of neighbours, `stride` elements apart; copied only where it has no single stride.
struct Rows {
  Tensor holder;
  int64_t count = 1;
  int64_t width;
  int64_t stride;

  explicit Rows(const Tensor& t) : holder(t), width(t.size(-1)) {
    for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) {
      count *= t.size(dim);
    }
    stride = row_stride(t);
    if (stride < 0) {
      holder = torch::stable::contiguous(t);
      stride = width;
    }
  }

  // Rows and strides are multiples of 16 bytes.
  bool aligned() const {
    const int64_t wide = 16 / static_cast<int64_t>(holder.element_size());
    return is_aligned(holder.data_ptr()) && stride % wide == 0 && width % wide == 0;
  }

 private:
  // The distance from every row to the next across all leading dims; -1 where there is no such number.
  static int64_t row_stride(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.stride(last) != 1 && t.size(last) > 1) {
      return -1;
    }
    int64_t stride = t.size(last), outer = -1;
    for (int64_t dim = last - 1; dim >= 0; --dim) {
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

}  // namespace megapre::cuda
