// Row loops of layer_norm (Ba et al. 2016, eq. 4) and rms_norm (Zhang & Sennrich 2019, eq. 4), which has no mean and no
// bias. Compiled once per CPU level.
//
//   h = x + residual,  c = h - mean(h),  rstd = 1/sqrt(mean(c^2) + eps),  y = c * rstd * w + b
//   dx = rstd * (g - mean(g) - c * rstd^2 * mean(g * c)) + dh  with g = dy * w;   rms_norm: c = h, and no mean(g)
//   dw = sum over rows of dy * c * rstd,  db = sum over rows of dy
//
// A row is read from memory once and again from the first-level cache, so each loop costs the memory traffic alone:
// 2 (4 with a residual) tensors forward, 3 (4 with dh) backward.

#include <cmath>
#include <type_traits>

#include "lanes.h"
#include "norm.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
void add(const T* x, const T* residual, T* h, int64_t width) {
  for_lanes<T>(width, [&](int64_t i, auto... count) {
    store_lanes(h + i, load_lanes(x + i, count...) + load_lanes(residual + i, count...), count...);
  });
}

template <typename A>
struct Moments {
  A mean;      // 0 for rms_norm
  A variance;  // mean of squares for rms_norm
};

template <typename T, bool kCentred>
Moments<acc_t<T>> moments(const T* h, int64_t width) {
  using A = acc_t<T>;
  const A elements = static_cast<A>(width);
  A sums[2];
  if constexpr (!kCentred) {
    sum_row<T, 1>(width, sums, [&](Lanes<A>* total, int64_t i, auto... count) {
      const auto v = load_lanes(h + i, count...);
      total[0] = fmadd(v, v, total[0]);
    });
    return {A(0), sums[0] / elements};
  }
  sum_row<T, 1>(width, sums, [&](Lanes<A>* total, int64_t i, auto... count) {
    total[0] = total[0] + load_lanes(h + i, count...);
  });
  const A mean = sums[0] / elements;
  const Lanes<A> shift(mean);
  sum_row<T, 2>(width, sums, [&](Lanes<A>* total, int64_t i, auto... count) {
    const auto c = first_lanes<A>(load_lanes(h + i, count...) - shift, count...);
    total[0] = total[0] + c;
    total[1] = fmadd(c, c, total[1]);
  });
  // What the first sum lost to rounding, far from zero (Chan, Golub & LeVeque 1983, eq. 1.7).
  const A rest = sums[0] / elements;
  const A variance = sums[1] / elements - rest * rest;
  return {mean + rest, variance < 0 ? A(0) : variance};
}

// v - mean; v itself for rms_norm.
template <bool kCentred, typename A>
Lanes<A> centre(const Lanes<A>& v, const Lanes<A>& mean) {
  if constexpr (kCentred) {
    return v - mean;
  } else {
    return v;
  }
}

template <typename T, bool kCentred, bool kBias>
void scale_row(
    const T* h, const acc_t<T>* w, const acc_t<T>* b, acc_t<T> mean, acc_t<T> rstd, T* y, int64_t width) {
  using A = acc_t<T>;
  const Lanes<A> shift(mean), scale(rstd);
  for_lanes<T>(width, [&](int64_t i, auto... count) {
    const auto normed = centre<kCentred>(load_lanes(h + i, count...), shift) * scale;
    if constexpr (kBias) {
      store_lanes(y + i, fmadd(normed, load_lanes(w + i, count...), load_lanes(b + i, count...)), count...);
    } else {
      store_lanes(y + i, normed * load_lanes(w + i, count...), count...);
    }
  });
}

template <typename T, bool kCentred>
void forward_rows(const NormForward& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t width = op.width;
  const A* w = static_cast<const A*>(op.weight);
  const A* b = static_cast<const A*>(op.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* h = static_cast<const T*>(op.x) + row * op.x_stride;
    if (op.residual != nullptr) {
      T* out = static_cast<T*>(op.h) + row * width;
      add(h, static_cast<const T*>(op.residual) + row * op.residual_stride, out, width);
      h = out;  // the rounded sum: what the backward pass will read
    }
    const Moments<A> m = moments<T, kCentred>(h, width);
    const A rstd = A(1) / std::sqrt(m.variance + static_cast<A>(op.eps));
    static_cast<A*>(op.rstd)[row] = rstd;
    if constexpr (kCentred) {
      static_cast<A*>(op.mean)[row] = m.mean;
    }
    T* y = static_cast<T*>(op.y) + row * width;
    if (b != nullptr) {
      scale_row<T, kCentred, true>(h, w, b, m.mean, rstd, y, width);
    } else {
      scale_row<T, kCentred, false>(h, w, b, m.mean, rstd, y, width);
    }
  }
}

template <typename A>
struct RowSums {
  A g;   // sum(dy * w); 0 for rms_norm
  A gc;  // sum(dy * w * c)
};

// dweight += dy * c * rstd, dbias += dy.
template <typename T, bool kCentred, bool kBias>
RowSums<acc_t<T>> accumulate_row(
    const T* dy, const T* h, const acc_t<T>* w, acc_t<T> mean, acc_t<T> rstd, acc_t<T>* dweight, acc_t<T>* dbias,
    int64_t width) {
  using A = acc_t<T>;
  const Lanes<A> shift(mean), scale(rstd);
  A sums[2] = {0, 0};
  sum_row<T, 2>(width, sums, [&](Lanes<A>* total, int64_t i, auto... count) {
    const auto d = load_lanes(dy + i, count...), weight = load_lanes(w + i, count...);
    const auto p = d * centre<kCentred>(load_lanes(h + i, count...), shift);
    total[1] = fmadd(p, weight, total[1]);
    store_lanes(dweight + i, fmadd(p, scale, load_lanes(dweight + i, count...)), count...);
    if constexpr (kCentred) {
      total[0] = fmadd(d, weight, total[0]);
    }
    if constexpr (kBias) {
      store_lanes(dbias + i, d + load_lanes(dbias + i, count...), count...);
    }
  });
  return {sums[0], sums[1]};
}

// dx = (dy * w - level) * rstd - c * slope + dh. The difference is 0 in a row of one element, if no compiler makes one
// operation of it and the product: CMakeLists.txt tells it not to.
template <typename T, bool kCentred, bool kHasDh>
void input_gradient(
    const T* dy, const T* dh, const T* h, const acc_t<T>* w, acc_t<T> mean, acc_t<T> rstd, acc_t<T> slope,
    acc_t<T> level, T* dx, int64_t width) {
  using A = acc_t<T>;
  const Lanes<A> shift(mean), scale(rstd), minus_slope(-slope), offset(level);
  for_lanes<T>(width, [&](int64_t i, auto... count) {
    const auto g = centre<kCentred>(load_lanes(dy + i, count...) * load_lanes(w + i, count...), offset);
    auto dx_i = fmadd(centre<kCentred>(load_lanes(h + i, count...), shift), minus_slope, g * scale);
    if constexpr (kHasDh) {
      dx_i = dx_i + load_lanes(dh + i, count...);
    }
    store_lanes(dx + i, dx_i, count...);
  });
}

template <typename T, bool kCentred, bool kBias>
void backward_rows(const NormBackward& op, int64_t begin, int64_t end, void* sums) {
  using A = acc_t<T>;
  const int64_t width = op.width;
  const A* w = static_cast<const A*>(op.weight);
  sum_blocks(static_cast<A*>(sums), (kBias ? 2 : 1) * width, begin, end, [&](int64_t row, A* block) {
    const T* dy = static_cast<const T*>(op.dy) + row * op.dy_stride;
    const T* h = static_cast<const T*>(op.h) + row * op.h_stride;
    T* dx = static_cast<T*>(op.dx) + row * width;
    const A mean = kCentred ? static_cast<const A*>(op.mean)[row] : A(0);
    const A rstd = static_cast<const A*>(op.rstd)[row];
    const RowSums<A> s = accumulate_row<T, kCentred, kBias>(dy, h, w, mean, rstd, block, block + width, width);
    const A slope = rstd * rstd * rstd * s.gc / static_cast<A>(width);
    const A level = s.g / static_cast<A>(width);
    if (op.dh != nullptr) {
      const T* dh = static_cast<const T*>(op.dh) + row * op.dh_stride;
      input_gradient<T, kCentred, true>(dy, dh, h, w, mean, rstd, slope, level, dx, width);
    } else {
      input_gradient<T, kCentred, false>(dy, nullptr, h, w, mean, rstd, slope, level, dx, width);
    }
  });
}

void forward(const NormForward& op, int64_t begin, int64_t end) {
  with_type(op.dtype, [&](auto t) {
    if (op.centred) {
      forward_rows<decltype(t), true>(op, begin, end);
    } else {
      forward_rows<decltype(t), false>(op, begin, end);
    }
  });
}

void backward(const NormBackward& op, int64_t begin, int64_t end, void* sums) {
  with_type(op.dtype, [&](auto t) {
    if (!op.centred) {
      backward_rows<decltype(t), false, false>(op, begin, end, sums);
    } else if (op.has_bias) {
      backward_rows<decltype(t), true, true>(op, begin, end, sums);
    } else {
      backward_rows<decltype(t), true, false>(op, begin, end, sums);
    }
  });
}

}  // namespace

const NormKernels norm_kernels{forward, backward};

}  // namespace megapre::cpu::CPU_CAPABILITY
