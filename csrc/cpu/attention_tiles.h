// What the forward and the backward tile loops of attention share. Only for files compiled once per CPU level; nothing
// here may have external linkage outside the level's namespace (lanes.h says why).
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#include "attention.h"
#include "exponential.h"
#include "lanes.h"

namespace megapre::cpu::CPU_CAPABILITY {

// ---- exponentials ------------------------------------------------------------------------------------------------

// Scores are taken times kBase<T>, so that power<T>(x) = exp(x / kBase<T>): for the 16-bit types 2^x.
template <typename T>
constexpr float kBase = is_half_width<T> ? 1.44269504088896341f : 1.0f;

template <typename T>
inline Lanes<float> power(const Lanes<float>& x) {
  if constexpr (!is_half_width<T>) {
    return x.exp();
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    using V = at::vec::Vectorized<float>;
    return Lanes<float>(V(power_of_two(x[0])), V(power_of_two(x[1])));
#else
    return (x * Lanes<float>(1 / kBase<T>)).exp_u20();
#endif
  }
}

// ---- tiles -------------------------------------------------------------------------------------------------------

constexpr int64_t kWidth = kLanes<float>;  // a step through a row of scores

// Stores lanes as an operand of the products.
inline void store_tile(float* p, const Lanes<float>& v) {
  v.store(p);
}

inline void store_tile(c10::BFloat16* p, const Lanes<float>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  // bf16 tiles exist only where the CPU multiplies bf16, so it converts too; the level itself must not demand that, so
  // the instruction is spelled out instead of left to the compiler.
  const __m512 low = v[0], high = v[1];
  __m512i packed;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(packed) : "v"(high), "v"(low));
  _mm512_storeu_si512(p, packed);
#else
  store_lanes(p, v);
#endif
}

// out [rows, width] = in [count, dim], converted, zeros behind and below.
template <typename T, typename W>
void gather(const T* in, int64_t stride, int64_t count, int64_t dim, int64_t rows, int64_t width, W* out) {
  for (int64_t row = 0; row < count; ++row, in += stride, out += width) {
    if constexpr (std::is_same_v<T, W>) {
      std::copy_n(in, dim, out);
    } else {
      for_lanes<T>(dim, [&](int64_t i, auto... rest) { store_lanes(out + i, load_lanes(in + i, rest...), rest...); });
    }
    std::fill(out + dim, out + width, W(0));
  }
  std::fill_n(out, (rows - count) * width, W(0));
}

// out [count] = factor * in.
template <typename T>
void store_row(T* out, const float* in, int64_t count, float factor) {
  const Lanes<float> f(factor);
  for_lanes<T>(count, [&](int64_t i, auto... rest) { store_lanes(out + i, load_lanes(in + i, rest...) * f, rest...); });
}

template <typename T>
T* row_of(const Heads& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch + row * t.row + head * t.head;
}

// Keys that some, and that all, of a tile's queries see.
struct Span {
  int64_t some_first, some_end;
  int64_t all_first, all_end;

  bool touches(int64_t begin, int64_t end) const {
    return begin < some_end && end > some_first;
  }

  bool covers(int64_t begin, int64_t end) const {
    return all_first <= begin && end <= all_end;
  }
};

// A tile of queries of one head.
struct QueryTile {
  int64_t head;
  int64_t row;     // of its first query
  int64_t count;   // of queries
  const int64_t* first;
  const int64_t* end;
  Span span;

  QueryTile(const Attention& op, const AttentionUnit& unit, int64_t tile) {
    head = unit.key_head * op.group + tile / op.query_tiles;
    row = tile % op.query_tiles * kQueryTile;
    count = std::min(kQueryTile, op.queries - row);
    first = op.first + unit.batch * op.span_stride + row;
    end = op.end + unit.batch * op.span_stride + row;
    span = {first[0], end[count - 1], first[count - 1], end[0]};
  }
};

// Hands out parts of the workspace, each at a multiple of 64 bytes. Without a workspace it only counts.
class Space {
 public:
  explicit Space(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }

  int64_t used() const {
    return used_;
  }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Tiles of queries that are worked on against one tile of keys after the other: as many as stay in the second-level
// cache, of `bytes` each.
inline int64_t tiles_at_once(const Attention& op, int64_t bytes) {
  constexpr int64_t kCacheShare = 384 * 1024;
  return std::clamp<int64_t>(kCacheShare / bytes, 1, op.group * op.query_tiles);
}

// Calls f(T{}, W{}) with the types of the tensors and of the tiles.
template <typename F>
inline void with_types(const Attention& op, const F& f) {
  if (op.dtype == c10::kFloat) {
    f(float{}, float{});
  } else if (op.dtype == c10::kHalf) {
    f(c10::Half{}, float{});
  } else if (op.tile_dtype == c10::kFloat) {
    f(c10::BFloat16{}, float{});
  } else {
    f(c10::BFloat16{}, c10::BFloat16{});
  }
}

}  // namespace megapre::cpu::CPU_CAPABILITY
