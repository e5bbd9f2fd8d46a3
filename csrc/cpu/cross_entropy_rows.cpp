// Row loops of cross_entropy. Compiled once per CPU level.
//
// With lse = log(sum_j exp(x_j)), p_j = exp(x_j - lse), t the label, V the vocabulary, e the label smoothing and z the
// weight of the z-loss (PaLM, Chowdhery et al. 2022, section 5):
//
//   loss     = (1 - e) (lse - x_t) + e (lse - sum_j x_j / V) + z lse^2
//   dx_j     = dloss (p_j (1 + 2 z lse) - e/V - (1 - e) [j = t])
//
// The sum runs over the row once with a running maximum (Milakov & Gimelshein 2018), a block of columns at a time. When
// the gradient follows at once, the exponentials of a row stay in a scratch row in the second-level cache: they are the
// costly part, and are not computed again.
//
// A shard holds columns [first, first + columns) of rows whose other columns are elsewhere. Its statistics and those of the
// other shards together give lse, by which each shard's gradient is its own business.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cross_entropy.h"
#include "exponential.h"
#include "lanes.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
acc_t<T> block_max(const T* x, int64_t count) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  const Lanes<A> lowest(-std::numeric_limits<A>::infinity());
  Lanes<A> even = lowest, odd = lowest;
  int64_t i = 0;
  for (; i + 2 * n <= count; i += 2 * n) {
    even = maximum(even, load_lanes(x + i));
    odd = maximum(odd, load_lanes(x + i + n));
  }
  for (; i < count; i += n) {
    const int64_t rest = std::min(n, count - i);
    even = maximum(even, rest == n ? load_lanes(x + i) : Lanes<A>::set(lowest, load_lanes(x + i, rest), rest));
  }
  return max<A>(maximum(even, odd));
}

// Returns sum(exp(x - reference)) and leaves the terms in `exps` if it is not null; adds sum(x) to `sum_x` if asked.
template <typename T, bool kKeep, bool kSumX>
acc_t<T> block_exps(const T* x, int64_t count, acc_t<T> reference, acc_t<T>* exps, acc_t<T>& sum_x) {
  using A = acc_t<T>;
  constexpr int64_t n = kLanes<T>;
  const Lanes<A> shift(reference), zero(0);
  Lanes<A> total(0), total_x(0);
  int64_t i = 0;
  for (; i + n <= count; i += n) {
    const auto v = load_lanes(x + i);
    const auto e = exponential<T>(v - shift);
    total = total + e;
    if constexpr (kKeep) {
      e.store(exps + i);
    }
    if constexpr (kSumX) {
      total_x = total_x + v;
    }
  }
  if (i < count) {
    const int64_t rest = count - i;
    const auto v = load_lanes(x + i, rest);
    const auto e = Lanes<A>::set(zero, exponential<T>(v - shift), rest);
    total = total + e;
    if constexpr (kKeep) {
      e.store(exps + i, static_cast<int>(rest));
    }
    if constexpr (kSumX) {
      total_x = total_x + v;  // lanes beyond `rest` were loaded as 0
    }
  }
  if constexpr (kSumX) {
    sum_x += sum<A>(total_x);
  }
  return sum<A>(total);
}

template <typename A>
struct RowStats {
  A max;
  A log_sum;  // log(sum_j exp(x_j - max)); kept apart from max, their sum would lose the digits of a small loss
  A sum;
  A sum_x;
};

// With kKeep, exps[j] = exp(x_j - references[j / kColumnBlock]).
template <typename T, bool kKeep, bool kSumX>
RowStats<acc_t<T>> row_stats(const T* x, int64_t vocab, acc_t<T>* exps, acc_t<T>* references) {
  using A = acc_t<T>;
  A running_max = -std::numeric_limits<A>::infinity();
  A sum = 0, sum_x = 0;
  for (int64_t first = 0; first < vocab; first += kColumnBlock) {
    const int64_t count = std::min(kColumnBlock, vocab - first);
    const A in_block = block_max(x + first, count);
    // Not std::max: a NaN must win.
    const A next = in_block > running_max || std::isnan(in_block) ? in_block : running_max;
    // Nothing but -inf so far: any finite reference gives the zeros that belong there.
    const A reference = next == -std::numeric_limits<A>::infinity() ? A(0) : next;
    const A block_sum =
        block_exps<T, kKeep, kSumX>(x + first, count, reference, kKeep ? exps + first : nullptr, sum_x);
    sum = (running_max == next ? sum : sum * std::exp(running_max - next)) + block_sum;
    running_max = next;
    if constexpr (kKeep) {
      references[first / kColumnBlock] = reference;
    }
  }
  // A row with NaN or +inf has no softmax; the fast exponential would let it pass for one.
  if (!(running_max < std::numeric_limits<A>::infinity())) {
    sum = std::numeric_limits<A>::quiet_NaN();
  }
  return {running_max, std::log(sum), sum, sum_x};
}

// Coefficients of one row's gradient: dx_j = scale * p_j - shift, and the label's own element.
template <typename A>
struct RowGradient {
  A scale;
  A shift;
  A at_label;
};

template <typename A>
RowGradient<A> row_gradient(const CrossEntropyRows& op, int64_t row, A lse, A log_p_label) {
  const A dloss = op.dlosses == nullptr ? A(1) : static_cast<const A*>(op.dlosses)[row];
  const A smoothing = static_cast<A>(op.label_smoothing);
  const A z = 2 * static_cast<A>(op.z_loss) * lse;
  const A shift = smoothing / static_cast<A>(op.vocab);
  // p - 1 through expm1: a confident prediction keeps its digits.
  const A at_label = std::expm1(log_p_label) + z * std::exp(log_p_label) + smoothing - shift;
  return {dloss * (1 + z), dloss * shift, dloss * at_label};
}

template <typename A>
A row_loss(const CrossEntropyRows& op, const RowStats<A>& stats, A at_label) {
  const A smoothing = static_cast<A>(op.label_smoothing);
  const A lse = stats.max + stats.log_sum;
  A loss = (stats.max - at_label) + stats.log_sum;
  if (smoothing != 0) {
    loss = (1 - smoothing) * loss + smoothing * (lse - stats.sum_x / static_cast<A>(op.vocab));
  }
  return loss + static_cast<A>(op.z_loss) * lse * lse;
}

// dx = scale * p - shift over columns [0, count), p computed by `probability(i, lanes to load...)`.
template <typename T, typename P>
void write_gradient(T* dx, int64_t count, acc_t<T> scale, acc_t<T> shift, const P& probability) {
  using A = acc_t<T>;
  const Lanes<A> a(scale), b(-shift);
  for_lanes<T>(count, [&](int64_t i, auto... rest) {
    store_lanes(dx + i, fmadd(probability(i, rest...), a, b), rest...);
  });
}

template <typename T, bool kSumX>
void forward_rows(const CrossEntropyRows& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    A loss = 0, lse = 0;
    if (op.labels[row] != op.ignore_index) {
      const T* x = static_cast<const T*>(op.logits) + row * op.stride;
      const RowStats<A> stats = row_stats<T, false, kSumX>(x, op.vocab, nullptr, nullptr);
      loss = row_loss(op, stats, static_cast<A>(x[op.labels[row]]));
      lse = stats.max + stats.log_sum;
    }
    static_cast<A*>(op.losses)[row] = loss;
    static_cast<A*>(op.lse)[row] = lse;
  }
}

template <typename T, bool kSumX>
void local_rows(const CrossEntropyRows& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kStats = kSumX ? 4 : 3;
  for (int64_t row = begin; row < end; ++row) {
    A* out = static_cast<A*>(op.stats) + row * kStats;
    if (op.labels[row] == op.ignore_index) {
      std::fill(out, out + kStats, A(0));
      continue;
    }
    const T* x = static_cast<const T*>(op.logits) + row * op.stride;
    const int64_t label = op.labels[row] - op.first;
    const RowStats<A> stats = row_stats<T, false, kSumX>(x, op.columns, nullptr, nullptr);
    out[0] = stats.max;
    out[1] = stats.sum;
    out[2] = label >= 0 && label < op.columns ? static_cast<A>(x[label]) : A(0);
    if constexpr (kSumX) {
      out[3] = stats.sum_x;
    }
  }
}

template <typename T>
void backward_rows(const CrossEntropyRows& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(op.logits) + row * op.stride;
    T* dx = static_cast<T*>(op.gradient) + row * op.gradient_stride;
    if (op.labels[row] == op.ignore_index) {
      std::fill(dx, dx + op.width, T(0));
      continue;
    }
    const int64_t label = op.labels[row] - op.first;
    const bool here = label >= 0 && label < op.columns;
    const A lse = static_cast<const A*>(op.lse)[row];
    const auto g = row_gradient<A>(op, row, lse, here ? static_cast<A>(x[label]) - lse : A(0));
    const Lanes<A> minus_lse(-lse);
    write_gradient(dx, op.columns, g.scale, g.shift, [&](int64_t i, auto... count) {
      return exponential<T>(load_lanes(x + i, count...) + minus_lse);
    });
    if (here) {
      dx[label] = static_cast<T>(g.at_label);
    }
    std::fill(dx + op.columns, dx + op.width, T(0));
  }
}

template <typename T, bool kSumX>
void both_rows(const CrossEntropyRows& op, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<T>;
  A* exps = static_cast<A*>(scratch);
  A* references = exps + op.vocab;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(op.logits) + row * op.stride;
    T* dx = static_cast<T*>(op.gradient) + row * op.gradient_stride;
    const int64_t label = op.labels[row];
    if (label == op.ignore_index) {
      static_cast<A*>(op.losses)[row] = 0;
      std::fill(dx, dx + op.width, T(0));
      continue;
    }
    const A at_label = static_cast<A>(x[label]);
    const RowStats<A> stats = row_stats<T, true, kSumX>(x, op.vocab, exps, references);
    static_cast<A*>(op.losses)[row] = row_loss(op, stats, at_label);
    const auto g = row_gradient<A>(op, row, stats.max + stats.log_sum, (at_label - stats.max) - stats.log_sum);
    for (int64_t first = 0; first < op.vocab; first += kColumnBlock) {
      const int64_t count = std::min(kColumnBlock, op.vocab - first);
      const A to_probability = std::exp(references[first / kColumnBlock] - stats.max) / stats.sum;
      write_gradient(dx + first, count, g.scale * to_probability, g.shift, [&](int64_t i, auto... rest) {
        return load_lanes(exps + first + i, rest...);
      });
    }
    dx[label] = static_cast<T>(g.at_label);
    std::fill(dx + op.vocab, dx + op.width, T(0));
  }
}

// sum_j x_j is wanted by label smoothing alone.
void forward(const CrossEntropyRows& op, int64_t begin, int64_t end) {
  with_type(op.dtype, [&](auto t) {
    const auto rows = op.label_smoothing != 0 ? forward_rows<decltype(t), true> : forward_rows<decltype(t), false>;
    rows(op, begin, end);
  });
}

void local(const CrossEntropyRows& op, int64_t begin, int64_t end) {
  with_type(op.dtype, [&](auto t) {
    const auto rows = op.label_smoothing != 0 ? local_rows<decltype(t), true> : local_rows<decltype(t), false>;
    rows(op, begin, end);
  });
}

void backward(const CrossEntropyRows& op, int64_t begin, int64_t end) {
  with_type(op.dtype, [&](auto t) { backward_rows<decltype(t)>(op, begin, end); });
}

void both(const CrossEntropyRows& op, int64_t begin, int64_t end, void* scratch) {
  with_type(op.dtype, [&](auto t) {
    const auto rows = op.label_smoothing != 0 ? both_rows<decltype(t), true> : both_rows<decltype(t), false>;
    rows(op, begin, end, scratch);
  });
}

}  // namespace

const CrossEntropyKernels cross_entropy_kernels{forward, local, backward, both};

}  // namespace megapre::cpu::CPU_CAPABILITY
