// Row loops of rope (Su et al. 2021, eq. 34). Compiled once per CPU level.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)      for the inverse sin has the other sign
//
// A token's cosines and sines are read from memory once and serve all its heads from the first-level cache, so the loop
// costs one read and one write of the heads.

#include <cstring>

#include "lanes.h"
#include "rope.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

// (a, b) turned by the angle, for anything that multiplies like a vector. Inlined by force, as what follows: a call, with
// its vectors passed through memory, costs more than the rotation.
template <bool kInverse, typename V>
__attribute__((always_inline)) inline void turn(V& a, V& b, const V& cos, const V& sin) {
  const V signed_sin = kInverse ? sin.neg() : sin;
  const V turned = fmadd(a, cos, (b * signed_sin).neg());
  b = fmadd(b, cos, a * signed_sin);
  a = turned;
}

// Pairs (i, i + half).
template <typename T, bool kInverse>
void rotate_halves(const T* in, T* out, const acc_t<T>* cos, const acc_t<T>* sin, int64_t half) {
  constexpr int64_t n = kLanes<T>;
  const auto step = [&](int64_t i, auto... count) __attribute__((always_inline)) {
    auto a = load_lanes(in + i, count...), b = load_lanes(in + half + i, count...);
    const auto c = load_lanes(cos + i, count...), s = load_lanes(sin + i, count...);
    turn<kInverse>(a, b, c, s);
    store_lanes(out + i, a, count...);
    store_lanes(out + half + i, b, count...);
  };
  int64_t i = 0;
  for (; i + n <= half; i += n) {
    step(i);
  }
  if (i < half) {
    step(i, half - i);
  }
}

// Pairs (2i, 2i + 1): a group of lanes holds half as many pairs.
template <typename T, bool kInverse>
void rotate_neighbours(const T* in, T* out, const acc_t<T>* cos, const acc_t<T>* sin, int64_t half) {
  using V = at::vec::Vectorized<acc_t<T>>;
  constexpr int64_t n = V::size();
  const auto turned = [](const auto& x, const V& c, const V& s) __attribute__((always_inline)) {
    auto [a, b] = at::vec::deinterleave2(x[0], x[1]);
    turn<kInverse>(a, b, c, s);
    const auto [low, high] = at::vec::interleave2(a, b);
    return Lanes<acc_t<T>>(low, high);
  };
  int64_t i = 0;
  for (; i + n <= half; i += n) {
    store_lanes(out + 2 * i, turned(load_lanes(in + 2 * i), V::loadu(cos + i), V::loadu(sin + i)));
  }
  if (i < half) {
    const int64_t rest = half - i;
    const auto x = load_lanes(in + 2 * i, 2 * rest);
    store_lanes(out + 2 * i, turned(x, V::loadu(cos + i, rest), V::loadu(sin + i, rest)), 2 * rest);
  }
}

// Asks for a head of the next token: the hardware loses its track where the tokens of a projection lie apart. Cold heads
// rotate in half the time, at a tenth more where they are in cache.
template <typename T>
void fetch(const T* head, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) {
    __builtin_prefetch(head + i);
  }
}

template <typename T, bool kInterleaved, bool kInverse>
void rotate_rows(const RopeRows& op, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / op.sequence, place = token % op.sequence;
    const int64_t position = op.positions == nullptr ? place : op.positions[token];
    const A* cos = static_cast<const A*>(op.cos) + position * op.half;
    const A* sin = static_cast<const A*>(op.sin) + position * op.half;
    for (const RopePart* part = op.parts; part < op.parts + op.count; ++part) {
      const T* in = static_cast<const T*>(part->in) + batch * part->in_batch + place * part->in_token;
      T* out = static_cast<T*>(part->out) + batch * part->out_batch + place * part->out_token;
      for (int64_t head = 0; head < part->heads; ++head, in += part->in_head, out += part->out_head) {
        fetch(in + part->in_token, 2 * op.half);
        if (!part->rotate) {
          std::memcpy(static_cast<void*>(out), in, 2 * op.half * sizeof(T));
        } else if constexpr (kInterleaved) {
          rotate_neighbours<T, kInverse>(in, out, cos, sin, op.half);
        } else {
          rotate_halves<T, kInverse>(in, out, cos, sin, op.half);
        }
      }
    }
  }
}

void rotate(const RopeRows& op, int64_t begin, int64_t end) {
  with_type(op.dtype, [&](auto t) {
    using T = decltype(t);
    const auto rows = op.interleaved ? (op.inverse ? rotate_rows<T, true, true> : rotate_rows<T, true, false>)
                                     : (op.inverse ? rotate_rows<T, false, true> : rotate_rows<T, false, false>);
    rows(op, begin, end);
  });
}

}  // namespace

const RopeKernels rope_kernels{rotate};

}  // namespace megapre::cpu::CPU_CAPABILITY
