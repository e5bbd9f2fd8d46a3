// dQ of attention on the tensor cores of sm_80 and up (attention_backward.cu): as the forward, with dO beside Q and
// sums of dS k_j in the place of sums of p v_j.
#pragma once

#include <device/exp2.h>
#include <device/shared.h>

#include "attention_tiles.h"

namespace megapre::cuda {

// Rows are queries, columns keys.
constexpr AttentionTiles query_tiles(int dim) {
  return dim <= 32 ? AttentionTiles{4, 2, 64, 2}
      : dim <= 96  ? AttentionTiles{4, 2, 32, 2}
      : dim <= 128 ? AttentionTiles{8, 1, 64, 2}
                   : AttentionTiles{4, 1, 32, 2};
}

template <typename T, int D>
__global__ void __launch_bounds__(query_tiles(D).threads()) attention_query_gradient_kernel(Attention op) {
  constexpr AttentionTiles kTiles = query_tiles(D);
  constexpr int kRows = kTiles.rows(), kColumns = kTiles.columns, kThreads = kTiles.threads();
  constexpr int M = kTiles.parts, N = kColumns / 8, kSlots = kTiles.slots;
  using Source = typename Tile<T, D>::template Source<kThreads>;
  const int count = (op.queries + kRows - 1) / kRows;
  const BlockPlace place(count, op.heads);
  const int first = (count - 1 - place.tile) * kRows;  // the last queries see most keys: they start first
  const int key_head = place.head / op.group, row = static_cast<int>(threadIdx.x) / 32 * 16 * M;
  const TileRange<kColumns> range(
      keys_of(op, place.batch, first), keys_of(op, place.batch, first + kRows - 1));
  const int steps = range.count();

  const Tile<T, D> queries{dynamic_shared<T>()}, d_outputs{queries.data + kRows * D};
  T* const slots = d_outputs.data + kRows * D;
  const auto keys = [&](int step) { return Tile<T, D>{slots + step % kSlots * 2 * kColumns * D}; };
  const auto values = [&](int step) { return Tile<T, D>{slots + (step % kSlots * 2 + 1) * kColumns * D}; };
  Interval* const seen = reinterpret_cast<Interval*>(slots + 2 * kSlots * kColumns * D);
  for (int i = static_cast<int>(threadIdx.x); i < kRows; i += kThreads) {
    seen[i] = keys_of(op, place.batch, first + i);
  }
  const Source k(op.k.of<T>(place.batch, key_head), op.k.row, op.keys, op.dim);
  const Source v(op.v.of<T>(place.batch, key_head), op.v.row, op.keys, op.dim);
  const auto fetch = [&](int step) {
    if (step < steps) {
      keys(step).template copy<kColumns>(k, (range.begin + step) * kColumns);
      values(step).template copy<kColumns>(v, (range.begin + step) * kColumns);
    }
    copy_async_commit();
  };

  queries.template copy<kRows>(Source(op.q.of<T>(place.batch, place.head), op.q.row, op.queries, op.dim), first);
  d_outputs.template copy<kRows>(
      Source(op.d_o.of<T>(place.batch, place.head), op.d_o.row, op.queries, op.dim), first);
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) {
    fetch(step);
  }
  float2 statistics[M][2];  // log2 of the sum, delta
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
      const int64_t at = (int64_t{place.batch} * op.heads + place.head) * op.padded_queries + query;
      statistics[m][half] = *reinterpret_cast<const float2*>(op.statistics + 2 * at);
    }
  }
  float dq[M][D / 8][4] = {};
  const float scale_log2 = op.scale * kLog2e;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kSlots - 2>();
    __syncthreads();
    fetch(step + kSlots - 1);
    const int tile = range.begin + step;
    float p[M][N][4], ds[M][N][4];
    multiply_rows<T, D>(p, queries, row, keys(step));
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[m][n][i] = fast_exp2(p[m][n][i] * scale_log2 - statistics[m][i / 2].x);
        }
      }
    }
    if (range.cut(tile)) {
      mask(p, tile * kColumns, 0.0f, seen + row);
    }
    multiply_rows<T, D>(ds, d_outputs, row, values(step));
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - statistics[m][i / 2].y);
        }
      }
    }
    uint32_t left[M][N / 2][4];
    as_operand<T>(left, ds);
    add_product<T, D>(dq, left, keys(step));
  }

  copy_async_wait<0>();
  __syncthreads();
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    factor[m][0] = factor[m][1] = op.scale;
  }
  store_rows<T, D>(
      dq, factor, queries, row, op.dq.of<T>(place.batch, place.head), op.dq.row, first + row, op.queries, op.dim);
}

}  // namespace megapre::cuda
