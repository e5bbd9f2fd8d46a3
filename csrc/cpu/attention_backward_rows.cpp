// Tile loops of the backward pass of attention (Dao 2023, algorithm 2). Compiled once per CPU level.
//
//   p = exp(scale q k^T - lse),   dp = do v^T,   delta = rowsum(do * o) - dlse,   ds = p (dp - delta)
//   dv = p^T do,   dk = scale ds^T q,   dq = scale ds k
//
// Scores are computed transposed, keys down and queries across: s^T = k q^T and dp^T = v do^T come out of the products
// as p^T and ds^T are wanted for dv and dk. dq is summed up transposed too: dq^T = k^T ds^T takes ds^T as it is.

#include "attention_tiles.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where one task keeps its tiles.
template <typename W>
struct Work {
  int64_t tiles;
  int64_t packed_bytes;  // of one tile of queries, in either form
  char* q;               // [tiles] packed, to be multiplied by ds^T
  char* q_transposed;    // [tiles] packed, to be multiplied by keys
  char* d_o;             // the same of do
  char* d_o_transposed;
  float* dq;             // [tiles][width][kQueryTile], without the scale
  float* lse;            // [tiles][kQueryTile], times -kBase
  float* delta;          // [tiles][kQueryTile]
  W* keys;               // [kKeyTile][width]
  W* keys_transposed;
  W* values;
  float* s;              // [kKeyTile][kQueryTile], as all below
  float* dp;
  W* p;
  W* ds;
  char* packed_ds;
  float* row;            // [kQueryTile][width]
  int64_t bytes;

  Work(const Attention& op, char* base) {
    Space space(base);
    const Products& products = *op.products;
    const int64_t width = op.padded_dim, size = kQueryTile * width;
    packed_bytes = std::max(products.packed_bytes(kQueryTile, width), products.packed_bytes(width, kQueryTile));
    packed_bytes = (packed_bytes + 63) / 64 * 64;
    tiles = tiles_at_once(op, 4 * packed_bytes + size * static_cast<int64_t>(sizeof(float)));
    q = space.take<char>(tiles * packed_bytes);
    q_transposed = space.take<char>(tiles * packed_bytes);
    d_o = space.take<char>(tiles * packed_bytes);
    d_o_transposed = space.take<char>(tiles * packed_bytes);
    dq = space.take<float>(tiles * size);
    lse = space.take<float>(tiles * kQueryTile);
    delta = space.take<float>(tiles * kQueryTile);
    keys = space.take<W>(kKeyTile * width);
    keys_transposed = space.take<W>(kKeyTile * width);
    values = space.take<W>(kKeyTile * width);
    s = space.take<float>(kKeyTile * kQueryTile);
    dp = space.take<float>(kKeyTile * kQueryTile);
    p = space.take<W>(kKeyTile * kQueryTile);
    ds = space.take<W>(kKeyTile * kQueryTile);
    packed_ds = space.take<char>(products.packed_bytes(kKeyTile, kQueryTile));
    row = space.take<float>(size);
    bytes = space.used();
  }
};

template <typename T>
float dot(const T* a, const T* b, int64_t count) {
  Lanes<float> total(0);
  for_lanes<T>(count, [&](int64_t i, auto... rest) {
    total = fmadd(load_lanes(a + i, rest...), load_lanes(b + i, rest...), total);
  });
  return sum<float>(total);
}

// Packs a tile of queries and of the gradients of their outputs. Rows past the last query get lse = +inf, so p = 0.
template <typename T, typename W>
void load_queries(
    const Attention& op, const AttentionUnit& unit, const QueryTile& tile, const Work<W>& work, int64_t at) {
  const Products& products = *op.products;
  const int64_t width = op.padded_dim, offset = at * work.packed_bytes;
  W* rows = work.keys;  // not in use yet
  const T* d_o = row_of<T>(op.d_o, unit.batch, tile.head, tile.row);
  gather(row_of<T>(op.q, unit.batch, tile.head, tile.row), op.q.row, tile.count, op.dim, kQueryTile, width, rows);
  products.pack(kQueryTile, width, rows, width, work.q + offset);
  products.pack_transposed(width, kQueryTile, rows, width, work.q_transposed + offset);
  gather(d_o, op.d_o.row, tile.count, op.dim, kQueryTile, width, rows);
  products.pack(kQueryTile, width, rows, width, work.d_o + offset);
  products.pack_transposed(width, kQueryTile, rows, width, work.d_o_transposed + offset);

  float* lse = work.lse + at * kQueryTile;
  float* delta = work.delta + at * kQueryTile;
  const int64_t row = (unit.batch * op.heads + tile.head) * op.queries + tile.row;
  const T* o = row_of<T>(op.o, unit.batch, tile.head, tile.row);
  for (int64_t i = 0; i < tile.count; ++i) {
    lse[i] = -kBase<T> * op.lse[row + i];
    delta[i] = dot(d_o + i * op.d_o.row, o + i * op.o.row, op.dim) - (op.dlse == nullptr ? 0.0f : op.dlse[row + i]);
  }
  std::fill(lse + tile.count, lse + kQueryTile, -kInfinity);
  std::fill(delta + tile.count, delta + kQueryTile, 0.0f);
}

// p^T and ds^T of a tile. With kMasked, key `row` is visible to query i if first[i] <= row < end[i].
template <typename T, typename W, bool kMasked>
void scores(
    const Attention& op, const Work<W>& work, const float* lse, const float* delta, const float* first,
    const float* end) {
  const Lanes<float> scale(static_cast<float>(op.scale) * kBase<T>), zero(0);
  for (int64_t row = 0; row < kKeyTile; ++row) {
    const Lanes<float> key(static_cast<float>(row));
#pragma GCC unroll 4
    for (int64_t i = 0; i < kQueryTile; i += kWidth) {
      const int64_t at = row * kQueryTile + i;
      auto p = power<T>(fmadd(Lanes<float>::loadu(work.s + at), scale, Lanes<float>::loadu(lse + i)));
      if constexpr (kMasked) {
        const auto visible = (Lanes<float>::loadu(first + i) <= key) & (key < Lanes<float>::loadu(end + i));
        p = Lanes<float>::blendv(zero, p, visible);
      }
      store_tile(work.p + at, p);
      store_tile(work.ds + at, p * (Lanes<float>::loadu(work.dp + at) - Lanes<float>::loadu(delta + i)));
    }
  }
}

// Where the visible keys of each query begin and end, seen from key `key`. Queries past the last see none.
void relative_spans(const QueryTile& tile, int64_t key, float* first, float* end) {
  for (int64_t i = 0; i < kQueryTile; ++i) {
    const bool exists = i < tile.count;
    first[i] = exists ? static_cast<float>(std::clamp<int64_t>(tile.first[i] - key, 0, kKeyTile)) : 0.0f;
    end[i] = exists ? static_cast<float>(std::clamp<int64_t>(tile.end[i] - key, 0, kKeyTile)) : 0.0f;
  }
}

template <typename T, typename W>
void run_tiles(
    const Attention& op, const AttentionUnit& unit, const Work<W>& work, int64_t begin, int64_t end, float* dk,
    float* dv) {
  const Products& products = *op.products;
  const int64_t width = op.padded_dim, size = kQueryTile * width;
  int64_t first_key = op.keys, end_key = 0;
  for (int64_t t = begin; t < end; ++t) {
    const QueryTile tile(op, unit, t);
    load_queries<T>(op, unit, tile, work, t - begin);
    first_key = std::min(first_key, tile.span.some_first);
    end_key = std::max(end_key, tile.span.some_end);
  }
  std::fill_n(work.dq, (end - begin) * size, 0.0f);
  for (int64_t key = first_key / kKeyTile * kKeyTile; key < end_key; key += kKeyTile) {
    const int64_t count = std::min(kKeyTile, op.keys - key);
    gather(
        row_of<T>(op.k, unit.batch, unit.key_head, key), op.k.row, count, op.dim, kKeyTile, width, work.keys);
    gather(
        row_of<T>(op.v, unit.batch, unit.key_head, key), op.v.row, count, op.dim, kKeyTile, width, work.values);
    products.transpose(kKeyTile, width, work.keys, width, work.keys_transposed);
    for (int64_t t = begin; t < end; ++t) {
      const QueryTile tile(op, unit, t);
      if (!tile.span.touches(key, key + kKeyTile)) {
        continue;
      }
      const int64_t offset = (t - begin) * work.packed_bytes, at = (t - begin) * kQueryTile;
      products.multiply(
          kKeyTile, kQueryTile, width, work.keys, width, work.q_transposed + offset, work.s, kQueryTile, false);
      products.multiply(
          kKeyTile, kQueryTile, width, work.values, width, work.d_o_transposed + offset, work.dp, kQueryTile, false);
      if (tile.span.covers(key, key + kKeyTile)) {
        scores<T, W, false>(op, work, work.lse + at, work.delta + at, nullptr, nullptr);
      } else {
        float first[kQueryTile], past[kQueryTile];
        relative_spans(tile, key, first, past);
        scores<T, W, true>(op, work, work.lse + at, work.delta + at, first, past);
      }
      products.multiply(
          kKeyTile, width, kQueryTile, work.p, kQueryTile, work.d_o + offset, dv + key * width, width, true);
      products.multiply(
          kKeyTile, width, kQueryTile, work.ds, kQueryTile, work.q + offset, dk + key * width, width, true);
      products.pack(kKeyTile, kQueryTile, work.ds, kQueryTile, work.packed_ds);
      products.multiply(
          width, kQueryTile, kKeyTile, work.keys_transposed, kKeyTile, work.packed_ds,
          work.dq + (t - begin) * size, kQueryTile, true);
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    const QueryTile tile(op, unit, t);
    const float* dq = work.dq + (t - begin) * size;
    for (int64_t i = 0; i < kQueryTile; i += 16) {
      for (int64_t j = 0; j < width; j += 16) {
        at::vec::transpose_mxn<float, 16, 16>(dq + j * kQueryTile + i, kQueryTile, work.row + i * width + j, width);
      }
    }
    T* out = row_of<T>(op.dq, unit.batch, tile.head, tile.row);
    for (int64_t i = 0; i < tile.count; ++i) {
      store_row(out + i * op.dq.row, work.row + i * width, op.dim, static_cast<float>(op.scale));
    }
  }
}

void run(const Attention& op, const AttentionUnit& unit, char* space, float* sums) {
  std::fill_n(sums, op.sums_size, 0.0f);
  with_types(op, [&](auto t, auto w) {
    const Work<decltype(w)> work(op, space);
    for (int64_t begin = unit.begin; begin < unit.end; begin += work.tiles) {
      run_tiles<decltype(t)>(
          op, unit, work, begin, std::min(begin + work.tiles, unit.end), sums, sums + op.sums_size / 2);
    }
  });
}

template <typename T>
void store_keys(
    const Attention& op, const Heads& out, int64_t batch, int64_t key_head, const float* sums, int64_t parts,
    double factor) {
  using V = at::vec::Vectorized<float>;
  const int64_t width = op.padded_dim;
  float total[kLargestDim];
  for (int64_t key = 0; key < op.keys; ++key) {
    const float* row = sums + key * width;
    if (parts > 1) {
      for (int64_t i = 0; i < width; i += V::size()) {
        V t = V::loadu(row + i);
        for (int64_t part = 1; part < parts; ++part) {
          t = t + V::loadu(row + part * op.sums_size + i);
        }
        t.store(total + i);
      }
      row = total;
    }
    store_row(row_of<T>(out, batch, key_head, key), row, op.dim, static_cast<float>(factor));
  }
}

void store(const Attention& op, int64_t batch, int64_t key_head, const float* sums, int64_t parts) {
  with_types(op, [&](auto t, auto) {
    store_keys<decltype(t)>(op, op.dk, batch, key_head, sums, parts, op.scale);
    store_keys<decltype(t)>(op, op.dv, batch, key_head, sums + op.sums_size / 2, parts, 1.0);
  });
}

int64_t space(const Attention& op) {
  int64_t bytes = 0;
  with_types(op, [&](auto, auto w) { bytes = Work<decltype(w)>(op, nullptr).bytes; });
  return bytes;
}

}  // namespace

const AttentionBackward attention_backward{space, run, store};

}  // namespace megapre::cpu::CPU_CAPABILITY
