// Row loops of rms_norm (Zhang & Sennrich 2019, eq. 4). Compiled once per CPU level.
//
//   h = x + residual,  rstd = 1/sqrt(mean(h^2) + eps),  y = h * rstd * w
//   dx = rstd * (g - h * rstd^2 * mean(g * h)) + dh  with g = dy * w,   dw = sum over rows of dy * h * rstd
//
// A row is read from memory once and again from the first-level cache, so each loop costs the memory traffic alone:
// 2 (3 or 4 with a residual) tensors forward, 3 (4 with dh) backward.

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "rms_norm.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

// Two independent sums hide the latency of the additions.
template <typename T>
acc_t<T> sum_of_squares(const T* h, int64_t width) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  Lanes<A> even(0), odd(0);
  int64_t i = 0;
  for (; i + 2 * n <= width; i += 2 * n) {
    const auto a = load_lanes(h + i), b = load_lanes(h + i + n);
    even = fmadd(a, a, even);
    odd = fmadd(b, b, odd);
  }
  for (; i < width; i += n) {
    const auto a = i + n <= width ? load_lanes(h + i) : load_lanes(h + i, width - i);
    even = fmadd(a, a, even);
  }
  return sum<A>(even + odd);
}

template <typename T>
void add(const T* x, const T* residual, T* h, int64_t width) {
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + n <= width; i += n) {
    store_lanes(h + i, load_lanes(x + i) + load_lanes(residual + i));
  }
  if (i < width) {
    store_lanes(h + i, load_lanes(x + i, width - i) + load_lanes(residual + i, width - i), width - i);
  }
}

template <typename T>
void forward_rows(const RmsNormForward& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  const int64_t width = op.width;
  const A* w = static_cast<const A*>(op.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* h = static_cast<const T*>(op.x) + row * op.x_stride;
    if (op.residual != nullptr) {
      T* out = static_cast<T*>(op.h) + row * width;
      add(h, static_cast<const T*>(op.residual) + row * op.residual_stride, out, width);
      h = out;  // the rounded sum: what the backward pass will read
    }
    const A mean = sum_of_squares(h, width) / static_cast<A>(width);
    const A rstd = A(1) / std::sqrt(mean + static_cast<A>(op.eps));
    static_cast<A*>(op.rstd)[row] = rstd;
    const Lanes<A> scale(rstd);
    T* y = static_cast<T*>(op.y) + row * width;
    int64_t i = 0;
    for (; i + n <= width; i += n) {
      store_lanes(y + i, load_lanes(h + i) * scale * load_lanes(w + i));
    }
    if (i < width) {
      store_lanes(y + i, load_lanes(h + i, width - i) * scale * load_lanes(w + i, width - i), width - i);
    }
  }
}

// dweight += dy * h * rstd, returns sum(dy * w * h).
template <typename T>
acc_t<T> accumulate_row(
    const T* dy, const T* h, const acc_t<T>* w, acc_t<T> rstd, acc_t<T>* dweight, int64_t width) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  const Lanes<A> scale(rstd);
  Lanes<A> dot(0);
  int64_t i = 0;
  for (; i + n <= width; i += n) {
    const auto p = load_lanes(dy + i) * load_lanes(h + i);
    dot = fmadd(p, load_lanes(w + i), dot);
    store_lanes(dweight + i, fmadd(p, scale, load_lanes(dweight + i)));
  }
  if (i < width) {
    const int64_t rest = width - i;
    const auto p = load_lanes(dy + i, rest) * load_lanes(h + i, rest);
    dot = fmadd(p, load_lanes(w + i, rest), dot);
    store_lanes(dweight + i, fmadd(p, scale, load_lanes(dweight + i, rest)), rest);
  }
  return sum<A>(dot);
}

template <typename T, bool kHasDh>
void input_gradient(
    const T* dy, const T* dh, const T* h, const acc_t<T>* w, acc_t<T> rstd, acc_t<T> slope, T* dx, int64_t width) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  const Lanes<A> scale(rstd), minus_slope(-slope);
  const auto step = [&](int64_t i, auto... count) {
    const auto g = load_lanes(dy + i, count...) * load_lanes(w + i, count...);
    auto dx_i = fmadd(load_lanes(h + i, count...), minus_slope, g * scale);
    if constexpr (kHasDh) {
      dx_i = dx_i + load_lanes(dh + i, count...);
    }
    store_lanes(dx + i, dx_i, count...);
  };
  int64_t i = 0;
  for (; i + n <= width; i += n) {
    step(i);
  }
  if (i < width) {
    step(i, width - i);
  }
}

// Long sums of dweight lose digits: 32 rows are summed in `block` first, then blocks are added up.
constexpr int64_t kBlockRows = 32;

template <typename T>
void backward_rows(const RmsNormBackward& op, int64_t begin, int64_t end, void* dweight, void* block) {
  using A = acc_t<T>;
  const int64_t width = op.width;
  const A* w = static_cast<const A*>(op.weight);
  A* total = static_cast<A*>(dweight);
  A* partial = static_cast<A*>(block);
  std::fill_n(total, width, A(0));
  for (int64_t first = begin; first < end; first += kBlockRows) {
    std::fill_n(partial, width, A(0));
    for (int64_t row = first; row < std::min(first + kBlockRows, end); ++row) {
      const T* dy = static_cast<const T*>(op.dy) + row * op.dy_stride;
      const T* h = static_cast<const T*>(op.h) + row * op.h_stride;
      T* dx = static_cast<T*>(op.dx) + row * width;
      const A rstd = static_cast<const A*>(op.rstd)[row];
      const A dot = accumulate_row(dy, h, w, rstd, partial, width);
      const A slope = rstd * rstd * rstd * dot / static_cast<A>(width);
      if (op.dh != nullptr) {
        const T* dh = static_cast<const T*>(op.dh) + row * op.dh_stride;
        input_gradient<T, true>(dy, dh, h, w, rstd, slope, dx, width);
      } else {
        input_gradient<T, false>(dy, nullptr, h, w, rstd, slope, dx, width);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      total[i] += partial[i];
    }
  }
}

void forward(const RmsNormForward& op, int64_t begin, int64_t end) {
  with_type(op.dtype, [&](auto t) { forward_rows<decltype(t)>(op, begin, end); });
}

void backward(const RmsNormBackward& op, int64_t begin, int64_t end, void* dweight, void* block) {
  with_type(op.dtype, [&](auto t) { backward_rows<decltype(t)>(op, begin, end, dweight, block); });
}

}  // namespace

const RmsNormKernels rms_norm_kernels{forward, backward};

}  // namespace megapre::cpu::CPU_CAPABILITY
