// Tile loops of the forward pass of attention (Dao 2023, algorithm 1). Compiled once per CPU level.
//
//   s = scale q k^T,   m = maximum of a row of s so far,   p = exp(s - m)
//   o = sum p v / sum p,   lse = m + log(sum p)
//
// A tile of keys is packed once and meets all tiles of queries that the cache holds, those of the group's heads too.

#include <cmath>

#include "attention_tiles.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 16 numbers, in as many vectors as that takes.
constexpr int kGroup = 16;
using Group = at::vec::VectorizedN<float, kGroup / at::vec::Vectorized<float>::size()>;

// Where one task keeps its tiles.
template <typename W>
struct Work {
  int64_t tiles;
  W* q;         // [tiles][kQueryTile][width]
  float* o;     // [tiles][kQueryTile][width], not yet divided by the sum
  float* max;   // [tiles][kQueryTile], times kBase
  float* sum;   // [tiles][kQueryTile][kWidth], a part of the sum in each lane
  W* rows;      // [kKeyTile][width]: keys or values on their way into packed form
  char* keys;
  char* values;
  float* s;     // [kQueryTile][kKeyTile]
  W* p;
  int64_t bytes;

  Work(const Attention& op, char* base) {
    Space space(base);
    const int64_t width = op.padded_dim;
    tiles = tiles_at_once(op, kQueryTile * width * static_cast<int64_t>(sizeof(W) + sizeof(float)));
    q = space.take<W>(tiles * kQueryTile * width);
    o = space.take<float>(tiles * kQueryTile * width);
    max = space.take<float>(tiles * kQueryTile);
    sum = space.take<float>(tiles * kQueryTile * kWidth);
    rows = space.take<W>(kKeyTile * width);
    keys = space.take<char>(op.products->packed_bytes(width, kKeyTile));
    values = space.take<char>(op.products->packed_bytes(kKeyTile, width));
    s = space.take<float>(kQueryTile * kKeyTile);
    p = space.take<W>(kQueryTile * kKeyTile);
    bytes = space.used();
  }
};

// Rows of a tile that take part in products: whole groups, so that their shapes are few and one query costs little.
int64_t multiplied(const QueryTile& tile) {
  return (tile.count + kGroup - 1) / kGroup * kGroup;
}

// Scores of a row of which only keys [first, end) are visible: times `scale` there, -inf elsewhere.
void hide(float* s, int64_t first, int64_t end, float scale) {
  for (int64_t i = 0; i < kKeyTile; ++i) {
    s[i] = i >= first && i < end ? s[i] * scale : -kInfinity;
  }
}

// tops[i] = largest scale * s of row i, kGroup rows at a time: the maxima of the lanes of a row are turned to lie below
// one another, which spares a walk across the lanes for every row.
void row_maxima(int64_t rows, const float* s, float scale, float* tops) {
  const Group f(scale);
  alignas(64) float lanes[kGroup * kGroup], turned[kGroup * kGroup];
  for (int64_t row = 0; row < rows; row += kGroup) {
    for (int64_t i = 0; i < kGroup; ++i) {
      const float* at = s + (row + i) * kKeyTile;
      Group top = Group::loadu(at) * f;
      for (int64_t j = kGroup; j < kKeyTile; j += kGroup) {
        top = maximum(top, Group::loadu(at + j) * f);
      }
      top.store(lanes + i * kGroup);
    }
    at::vec::transpose_mxn<float, kGroup, kGroup>(lanes, kGroup, turned, kGroup);
    Group top = Group::loadu(turned);
    for (int64_t i = 1; i < kGroup; ++i) {
      top = maximum(top, Group::loadu(turned + i * kGroup));
    }
    top.store(tops + row);
  }
}

// p = power(scale s - reference); returns its sum in parts, one a lane.
template <typename T, typename W>
Lanes<float> row_powers(const float* s, float scale, float reference, W* p) {
  const Lanes<float> f(scale), shift(-reference);
  Lanes<float> total(0);
#pragma GCC unroll 4
  for (int64_t i = 0; i < kKeyTile; i += kWidth) {
    const auto e = power<T>(fmadd(Lanes<float>::loadu(s + i), f, shift));
    total = total + e;
    store_tile(p + i, e);
  }
  return total;
}

void multiply_row(float* o, int64_t width, float factor) {
  const Group f(factor);
  for (int64_t i = 0; i < width; i += kGroup) {
    (Group::loadu(o + i) * f).store(o + i);
  }
}

// One tile of scores: probabilities so far, and what the new maxima mean for what was summed up before.
template <typename T, typename W>
void softmax(
    const Attention& op, const QueryTile& tile, int64_t key, float* s, W* p, float* maxima, float* sums, float* o) {
  float scale = static_cast<float>(op.scale) * kBase<T>;
  if (!tile.span.covers(key, key + kKeyTile)) {
    for (int64_t row = 0; row < tile.count; ++row) {
      hide(s + row * kKeyTile, tile.first[row] - key, tile.end[row] - key, scale);
    }
    scale = 1;
  }
  const int64_t width = op.padded_dim;
  alignas(64) float tops[kQueryTile] = {}, shrink[kQueryTile];
  row_maxima(multiplied(tile), s, scale, tops);
  for (int64_t row = 0; row < kQueryTile; row += kWidth) {
    const auto before = Lanes<float>::loadu(maxima + row);
    const auto top = maximum(before, Lanes<float>::loadu(tops + row));  // a NaN wins
    // Nothing visible so far: any finite reference gives the zeros that belong there.
    const auto reference = maximum(top, Lanes<float>(std::numeric_limits<float>::lowest()));
    top.store(maxima + row);
    reference.store(tops + row);
    power<T>(before - reference).store(shrink + row);
  }
  for (int64_t row = 0; row < tile.count; ++row, s += kKeyTile, p += kKeyTile, o += width, sums += kWidth) {
    const auto total = row_powers<T>(s, scale, tops[row], p);
    fmadd(Lanes<float>::loadu(sums), Lanes<float>(shrink[row]), total).store(sums);
    if (shrink[row] != 1) {
      multiply_row(o, width, shrink[row]);
    }
  }
}

template <typename T>
void finish(
    const Attention& op, int64_t batch, const QueryTile& tile, const float* o, const float* maxima,
    const float* sums) {
  const int64_t width = op.padded_dim;
  for (int64_t row = 0; row < tile.count; ++row) {
    // A row with NaN or +inf has no softmax; a fast exponential might let it pass for one.
    const float total = maxima[row] < kInfinity ? sum<float>(Lanes<float>::loadu(sums + row * kWidth))
                                                : std::numeric_limits<float>::quiet_NaN();
    store_row(row_of<T>(op.o, batch, tile.head, tile.row + row), o + row * width, op.dim, 1 / total);
    op.lse[(batch * op.heads + tile.head) * op.queries + tile.row + row] = maxima[row] / kBase<T> + std::log(total);
  }
}

template <typename T, typename W>
void run_tiles(const Attention& op, const AttentionUnit& unit, const Work<W>& work, int64_t begin, int64_t end) {
  const int64_t width = op.padded_dim, size = kQueryTile * width;
  int64_t first_key = op.keys, end_key = 0;
  for (int64_t t = begin; t < end; ++t) {
    const QueryTile tile(op, unit, t);
    gather(
        row_of<T>(op.q, unit.batch, tile.head, tile.row), op.q.row, tile.count, op.dim, kQueryTile, width,
        work.q + (t - begin) * size);
    first_key = std::min(first_key, tile.span.some_first);
    end_key = std::max(end_key, tile.span.some_end);
  }
  std::fill_n(work.o, (end - begin) * size, 0.0f);
  std::fill_n(work.max, (end - begin) * kQueryTile, -kInfinity);
  std::fill_n(work.sum, (end - begin) * kQueryTile * kWidth, 0.0f);
  for (int64_t key = first_key / kKeyTile * kKeyTile; key < end_key; key += kKeyTile) {
    const int64_t count = std::min(kKeyTile, op.keys - key);
    gather(
        row_of<T>(op.k, unit.batch, unit.key_head, key), op.k.row, count, op.dim, kKeyTile, width, work.rows);
    op.products->pack_transposed(width, kKeyTile, work.rows, width, work.keys);
    gather(
        row_of<T>(op.v, unit.batch, unit.key_head, key), op.v.row, count, op.dim, kKeyTile, width, work.rows);
    op.products->pack(kKeyTile, width, work.rows, width, work.values);
    for (int64_t t = begin; t < end; ++t) {
      const QueryTile tile(op, unit, t);
      if (!tile.span.touches(key, key + kKeyTile)) {
        continue;
      }
      float* o = work.o + (t - begin) * size;
      const int64_t at = (t - begin) * kQueryTile;
      op.products->multiply(
          multiplied(tile), kKeyTile, width, work.q + (t - begin) * size, width, work.keys, work.s, kKeyTile, false);
      softmax<T>(op, tile, key, work.s, work.p, work.max + at, work.sum + at * kWidth, o);
      op.products->multiply(multiplied(tile), width, kKeyTile, work.p, kKeyTile, work.values, o, width, true);
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = (t - begin) * kQueryTile;
    finish<T>(
        op, unit.batch, QueryTile(op, unit, t), work.o + (t - begin) * size, work.max + at, work.sum + at * kWidth);
  }
}

void run(const Attention& op, const AttentionUnit& unit, char* space) {
  with_types(op, [&](auto t, auto w) {
    const Work<decltype(w)> work(op, space);
    std::fill_n(work.p, kQueryTile * kKeyTile, decltype(w)(0));  // rows past the last query are multiplied too
    for (int64_t begin = unit.begin; begin < unit.end; begin += work.tiles) {
      run_tiles<decltype(t)>(op, unit, work, begin, std::min(begin + work.tiles, unit.end));
    }
  });
}

int64_t space(const Attention& op) {
  int64_t bytes = 0;
  with_types(op, [&](auto, auto w) { bytes = Work<decltype(w)>(op, nullptr).bytes; });
  return bytes;
}

}  // namespace

const AttentionForward attention_forward{space, run};

}  // namespace megapre::cpu::CPU_CAPABILITY
