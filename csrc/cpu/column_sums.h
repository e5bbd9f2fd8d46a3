// Sums over rows, such as the gradient of a norm's weight, for drivers: repeatable, without atomics.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace megapre::cpu {

// The rows are cut into parts, one a thread at most, and the sums of the parts are added up in their order. The cut
// depends on the number of threads alone, so equal calls give equal bits.
//
// `kinds` sums of `width` columns each are taken at once. The row loops get, for each part, the memory for all of them
// and for as much scratch behind it: 2 * kinds * width accumulators.
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t width, int64_t kinds, c10::ScalarType acc)
      : rows_(rows), width_(width), kinds_(kinds) {
    const int64_t wanted = std::clamp<int64_t>(rows / grain(width), 1, at::get_num_threads());
    rows_per_part_ = std::max<int64_t>(1, at::divup(rows, wanted));
    parts_ = std::max<int64_t>(1, at::divup(rows, rows_per_part_));
    sums_ = at::empty({parts_, 2 * kinds * width}, at::TensorOptions().dtype(acc));
  }

  // Calls loop(begin, end, sums) for every part.
  template <typename F>
  void run(const F& loop) {
    at::parallel_for(0, parts_, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        char* sums = static_cast<char*>(sums_.data_ptr()) + part * sums_.stride(0) * sums_.element_size();
        loop(part * rows_per_part_, std::min(rows_, (part + 1) * rows_per_part_), static_cast<void*>(sums));
      }
    });
    if (sums_.scalar_type() == c10::kDouble) {
      add_parts(sums_.data_ptr<double>());
    } else {
      add_parts(sums_.data_ptr<float>());
    }
  }

  // One of the sums [width], in memory of its own.
  at::Tensor take(int64_t kind, c10::ScalarType dtype) const {
    return sums_.select(0, 0).narrow(0, kind * width_, width_).to(dtype, /*non_blocking=*/false, /*copy=*/true);
  }

 private:
  template <typename A>
  void add_parts(A* sums) const {
    const int64_t stride = sums_.stride(0);
    at::parallel_for(0, kinds_ * width_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts_; ++part) {
        for (int64_t i = begin; i < end; ++i) {
          sums[i] += sums[part * stride + i];
        }
      }
    });
  }

  int64_t rows_, width_, kinds_, rows_per_part_, parts_;
  at::Tensor sums_;
};

}  // namespace megapre::cpu
