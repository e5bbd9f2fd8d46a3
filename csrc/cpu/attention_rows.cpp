// Tile loops of the forward pass of attention (Dao 2023, algorithm 1). Compiled once per CPU level.
//
//   s = scale q k^T,   m = running maximum of a row of s,   p = exp(s - m),   o = sum p v / sum p,   lse = m + log(sum p)
//
// A tile of keys is packed once and meets all tiles of queries that the cache holds, those of the group's heads too.

#include <cmath>

#include "attention_tiles.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where one task keeps its tiles.
template <typename W>
struct Work {
  int64_t tiles;
  W* q;         // [tiles][kQueryTile][width]
  float* o;     // [tiles][kQueryTile][width], not yet divided by the sum
  float* max;   // [tiles][kQueryTile], times kBase
  float* sum;   // [tiles][kQueryTile]
  W* rows;      // [kKeyTile][width]: keys or values on their way into packed form
  char* keys;
  char* values;
  float* s;     // [kQueryTile][kKeyTile]
  W* p;
  int64_t bytes;

  Work(const Attention& op, char* base) {
    Space space(base);
    const int64_t width = op.padded_dim();
    tiles = tiles_at_once(op, kQueryTile * width * static_cast<int64_t>(sizeof(W) + sizeof(float)));
    q = space.take<W>(tiles * kQueryTile * width);
    o = space.take<float>(tiles * kQueryTile * width);
    max = space.take<float>(tiles * kQueryTile);
    sum = space.take<float>(tiles * kQueryTile);
    rows = space.take<W>(kKeyTile * width);
    keys = space.take<char>(op.products->packed_bytes(width, kKeyTile));
    values = space.take<char>(op.products->packed_bytes(kKeyTile, width));
    s = space.take<float>(kQueryTile * kKeyTile);
    p = space.take<W>(kQueryTile * kKeyTile);
    bytes = space.used();
  }
};

// Scores of a row of which only keys [first, end) are visible: times `scale` there, -inf elsewhere.
void hide(float* s, int64_t first, int64_t end, float scale) {
  for (int64_t i = 0; i < kKeyTile; ++i) {
    s[i] = i >= first && i < end ? s[i] * scale : -kInfinity;
  }
}

float row_max(const float* s, float scale) {
  const Lanes<float> f(scale);
  Lanes<float> top = Lanes<float>::loadu(s) * f;
  for (int64_t i = kWidth; i < kKeyTile; i += kWidth) {
    top = maximum(top, Lanes<float>::loadu(s + i) * f);
  }
  return max<float>(top);
}

// p = power(scale s - reference) and its sum.
template <typename T, typename W>
float row_powers(const float* s, float scale, float reference, W* p) {
  const Lanes<float> f(scale), shift(-reference);
  Lanes<float> total(0);
  for (int64_t i = 0; i < kKeyTile; i += kWidth) {
    const auto e = power<T>(fmadd(Lanes<float>::loadu(s + i), f, shift));
    total = total + e;
    store_tile(p + i, e);
  }
  return sum<float>(total);
}

void multiply_row(float* o, int64_t width, float factor) {
  using V = at::vec::Vectorized<float>;
  const V f(factor);
  for (int64_t i = 0; i < width; i += V::size()) {
    (V::loadu(o + i) * f).store(o + i);
  }
}

// One tile of scores: probabilities so far, and what the new maximum means for what was summed up before.
template <typename T, typename W>
void softmax(
    const Attention& op, const QueryTile& tile, int64_t key, float* s, W* p, float* row_maxima, float* row_sums,
    float* o) {
  const float scale = static_cast<float>(op.scale) * kBase<T>;
  const bool covered = tile.span.covers(key, key + kKeyTile);
  const int64_t width = op.padded_dim();
  for (int64_t row = 0; row < tile.count; ++row, s += kKeyTile, p += kKeyTile, o += width) {
    if (!covered) {
      hide(s, tile.first[row] - key, tile.end[row] - key, scale);
    }
    const float factor = covered ? scale : 1.0f;
    const float here = row_max(s, factor), before = row_maxima[row];
    // Not std::max: a NaN must win.
    const float top = here > before || std::isnan(here) ? here : before;
    // Nothing visible so far: any finite reference gives the zeros that belong there.
    const float reference = top == -kInfinity ? 0.0f : top;
    const float total = row_powers<T>(s, factor, reference, p);
    if (top == before) {
      row_sums[row] += total;
      continue;
    }
    const float shrink = std::exp((before - top) / kBase<T>);
    row_sums[row] = row_sums[row] * shrink + total;
    row_maxima[row] = top;
    if (before != -kInfinity) {
      multiply_row(o, width, shrink);
    }
  }
}

template <typename T>
void finish(
    const Attention& op, int64_t batch, const QueryTile& tile, const float* o, const float* maxima,
    const float* sums) {
  const int64_t width = op.padded_dim();
  for (int64_t row = 0; row < tile.count; ++row) {
    // A row with NaN or +inf has no softmax; a fast exponential might let it pass for one.
    const float sum = maxima[row] < kInfinity ? sums[row] : std::numeric_limits<float>::quiet_NaN();
    store_row(row_of<T>(op.o, batch, tile.head, tile.row + row), o + row * width, op.dim, 1 / sum);
    op.lse[(batch * op.heads + tile.head) * op.queries + tile.row + row] = maxima[row] / kBase<T> + std::log(sum);
  }
}

template <typename T, typename W>
void run_tiles(const Attention& op, const AttentionUnit& unit, const Work<W>& work, int64_t begin, int64_t end) {
  const int64_t width = op.padded_dim(), size = kQueryTile * width;
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
  std::fill_n(work.sum, (end - begin) * kQueryTile, 0.0f);
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
          kQueryTile, kKeyTile, width, work.q + (t - begin) * size, width, work.keys, work.s, kKeyTile, false);
      softmax<T>(op, tile, key, work.s, work.p, work.max + at, work.sum + at, o);
      op.products->multiply(kQueryTile, width, kKeyTile, work.p, kKeyTile, work.values, o, width, true);
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = (t - begin) * kQueryTile;
    finish<T>(
        op, unit.batch, QueryTile(op, unit, t), work.o + (t - begin) * size, work.max + at, work.sum + at);
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
