// dK and dV of attention on the tensor cores of sm_80 and up (attention_backward.cu).
//
// A block owns a tile of keys of one key head and walks the queries of all heads of its group, so that the group's sum
// stays in registers. Its scores are transposed, keys by queries: P and dS are operands as they lie in registers and
// never pass through shared memory.
#pragma once

#include <device/exp2.h>
#include <device/shared.h>

#include "attention_tiles.h"

namespace megapre::cuda {

// Rows are keys, columns queries. With head dims above 128 dK and dV do not fit in registers together.
constexpr AttentionTiles key_tiles(int dim) {
  return dim <= 64   ? AttentionTiles{4, 2, 32, 2}
      : dim <= 128 ? AttentionTiles{8, 1, 64, 2}
                   : AttentionTiles{4, 1, 32, 2};
}

// dK, dV or both of a tile of keys.
template <typename T, int D, bool KEYS, bool VALUES>
__global__ void __launch_bounds__(key_tiles(D).threads()) attention_key_gradients_kernel(Attention op) {
  constexpr AttentionTiles kTiles = key_tiles(D);
  constexpr int kRows = kTiles.rows(), kColumns = kTiles.columns, kThreads = kTiles.threads();
  constexpr int M = kTiles.parts, N = kColumns / 8, kSlots = kTiles.slots;
  using Source = typename Tile<T, D>::template Source<kThreads>;
  const BlockPlace place((op.keys + kRows - 1) / kRows, op.key_heads);
  const int first = place.tile * kRows;  // the first keys are seen by most queries: they start first
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 * M, lane = static_cast<int>(threadIdx.x) % 32;
  const TileRange<kColumns> range(
      queries_of(op, place.batch, first), queries_of(op, place.batch, first + kRows - 1));
  const int steps = range.count() * op.group;

  const Tile<T, D> keys{dynamic_shared<T>()}, values{keys.data + kRows * D};
  T* const slots = values.data + kRows * D;
  float* const all_statistics = reinterpret_cast<float*>(slots + 2 * kSlots * kColumns * D);
  Interval* const seen = reinterpret_cast<Interval*>(all_statistics + 2 * kSlots * kColumns);
  for (int i = static_cast<int>(threadIdx.x); i < kRows; i += kThreads) {
    seen[i] = queries_of(op, place.batch, first + i);
  }
  const auto queries = [&](int step) { return Tile<T, D>{slots + step % kSlots * 2 * kColumns * D}; };
  const auto d_outputs = [&](int step) { return Tile<T, D>{slots + (step % kSlots * 2 + 1) * kColumns * D}; };
  const auto statistics = [&](int step) { return all_statistics + step % kSlots * 2 * kColumns; };
  // All tiles of the first head of the group, then all of the next.
  const int first_head = place.head * op.group, part = static_cast<int>(threadIdx.x) * 4;
  int next_tile = range.begin;
  Source q(op.q.of<T>(place.batch, first_head), op.q.row, op.queries, op.dim);
  Source d_o(op.d_o.of<T>(place.batch, first_head), op.d_o.row, op.queries, op.dim);
  const float* of_queries = op.statistics + (int64_t{place.batch} * op.heads + first_head) * op.padded_queries * 2;
  const auto fetch = [&](int step) {
    if (step < steps) {
      queries(step).template copy<kColumns>(q, next_tile * kColumns);
      d_outputs(step).template copy<kColumns>(d_o, next_tile * kColumns);
      if (part < 2 * kColumns) {
        copy_async(statistics(step) + part, of_queries + next_tile * kColumns * 2 + part);
      }
      if (++next_tile == range.end) {
        next_tile = range.begin;
        q.at += op.q.head;
        d_o.at += op.d_o.head;
        of_queries += op.padded_queries * 2;
      }
    }
    copy_async_commit();
  };

  keys.template copy<kRows>(Source(op.k.of<T>(place.batch, place.head), op.k.row, op.keys, op.dim), first);
  if constexpr (KEYS) {
    values.template copy<kRows>(Source(op.v.of<T>(place.batch, place.head), op.v.row, op.keys, op.dim), first);
  }
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) {
    fetch(step);
  }
  float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
  const float scale_log2 = op.scale * kLog2e;
  int tile = range.begin;
  for (int step = 0; step < steps; ++step, tile = tile + 1 == range.end ? range.begin : tile + 1) {
    copy_async_wait<kSlots - 2>();
    __syncthreads();
    fetch(step + kSlots - 1);
    // Of queries 8 n + lane % 4 * 2 and the next one: log2 of the sum and delta of each.
    const auto of_pair = [&](int n) {
      return *reinterpret_cast<const float4*>(statistics(step) + 2 * (8 * n + lane % 4 * 2));
    };
    float p[M][N][4];
    multiply_rows<T, D>(p, keys, row, queries(step));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float4 pair = of_pair(n);
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[m][n][i] = fast_exp2(p[m][n][i] * scale_log2 - (i % 2 == 0 ? pair.x : pair.z));
        }
      }
    }
    if (range.cut(tile)) {
      mask(p, tile * kColumns, 0.0f, seen + row);
    }
    uint32_t left[M][N / 2][4];
    if constexpr (VALUES) {
      as_operand<T>(left, p);
      add_product<T, D>(dv, left, d_outputs(step));
    }
    if constexpr (KEYS) {
      float ds[M][N][4];
      multiply_rows<T, D>(ds, values, row, d_outputs(step));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float4 pair = of_pair(n);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - (i % 2 == 0 ? pair.y : pair.w));
          }
        }
      }
      as_operand<T>(left, ds);
      add_product<T, D>(dk, left, queries(step));
    }
  }

  copy_async_wait<0>();
  __syncthreads();
  float factor[M][2];
  const auto all_rows = [&](float value) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      factor[m][0] = factor[m][1] = value;
    }
  };
  if constexpr (KEYS) {
    all_rows(op.scale);
    store_rows<T, D>(
        dk, factor, keys, row, op.dk.of<T>(place.batch, place.head), op.dk.row, first + row, op.keys, op.dim);
  }
  if constexpr (VALUES) {
    all_rows(1.0f);
    store_rows<T, D>(
        dv, factor, values, row, op.dv.of<T>(place.batch, place.head), op.dv.row, first + row, op.keys, op.dim);
  }
}

}  // namespace megapre::cuda
