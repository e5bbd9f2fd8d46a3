// dQ of attention on sm_90a (attention_sm90_backward.cu).
//
// A block owns 128 queries of one head, a warpgroup 64 of them, and walks the keys that they see. dS is an operand as it lies
// in registers. With head dims above 128 shared memory has room for one tile of values beside two of keys: the tile of values
// is free, and filled again, while the last product of a step runs.
#pragma once

#include <device/exp2.h>

#include "attention_sm90.h"

namespace megapre::cuda {

// The block's own queries and d_o; rings of keys and of values.
template <int D>
struct QueryTiles {
  static constexpr int kWarpgroups = 2, kRows = 64 * kWarpgroups, kColumns = D <= 128 ? 128 : 64;
  static constexpr int kThreads = kWarpgroup * (kWarpgroups + 1), kKeyStages = 2, kValueStages = D <= 128 ? 2 : 1;
  static constexpr int kOwn = tile_bytes<D>(kRows), kTile = tile_bytes<D>(kColumns);
  static constexpr int kKeys = 2 * kOwn, kValues = kKeys + kKeyStages * kTile;
  static constexpr int kBarriers = kValues + kValueStages * kTile, kShared = kBarriers + 1024;
  static_assert(kShared <= 227 * 1024);
};

template <typename Tiles>
struct QueryBarriers {
  Mbarrier own;
  StageBarriers<Tiles::kKeyStages> keys;
  StageBarriers<Tiles::kValueStages> values;
};

// A step brings a tile of keys and values.
template <typename T, int D>
__global__ void __launch_bounds__(QueryTiles<D>::kThreads, 1) attention_query_gradient_sm90_kernel(
    Attention op, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap dq) {
#ifdef MEGAPRE_SM90A
  using Tiles = QueryTiles<D>;
  constexpr int kRows = Tiles::kRows, kColumns = Tiles::kColumns;
  unsigned char *const queries = dynamic_shared(), *const d_outputs = queries + Tiles::kOwn;
  auto& barriers = *reinterpret_cast<QueryBarriers<Tiles>*>(queries + Tiles::kBarriers);
  const auto keys = [&](int i) { return queries + Tiles::kKeys + i % Tiles::kKeyStages * Tiles::kTile; };
  const auto values = [&](int i) { return queries + Tiles::kValues + i % Tiles::kValueStages * Tiles::kTile; };

  const int query_tiles = (op.queries + kRows - 1) / kRows;
  const BlockPlace place(query_tiles, op.heads);
  const int first = (query_tiles - 1 - place.tile) * kRows;  // the last queries see most keys: they start first
  const TileRange<kColumns> range(
      keys_of(op, place.batch, first), keys_of(op, place.batch, first + kRows - 1));
  const int steps = range.count();

  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.own, 1);
    barriers.keys.init(4 * Tiles::kWarpgroups);
    barriers.values.init(4 * Tiles::kWarpgroups);
    mbarrier_fence();
  }
  __syncthreads();

  const int warpgroup = warpgroup_index() - 1;
  if (warpgroup < 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      const int key_head = place.head / op.group;
      const auto fetch = [&](auto& stages, const TensorMap& from, unsigned char* to, Mbarrier* full, int i) {
        stages.wait_empty(i);
        mbarrier_expect(full, Tiles::kTile);
        load_tile<D>(to, from, full, kColumns, (range.begin + i) * kColumns, key_head, place.batch);
      };
      prefetch_maps(q, k, v, d_o);
      mbarrier_expect(&barriers.own, 2 * Tiles::kOwn);
      load_tile<D>(queries, q, &barriers.own, kRows, first, place.head, place.batch);
      load_tile<D>(d_outputs, d_o, &barriers.own, kRows, first, place.head, place.batch);
      for (int i = 0; i <= steps; ++i) {  // in the order in which places become free
        if (i < steps) {
          fetch(barriers.keys, k, keys(i), &barriers.keys.full[i % Tiles::kKeyStages], i);
        }
        if (i > 0) {
          fetch(barriers.values, v, values(i - 1), &barriers.values.full[(i - 1) % Tiles::kValueStages], i - 1);
        }
      }
    }
  } else {
    more_registers<240>();
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, row = 64 * warpgroup;
    const int query = first + row + thread / 32 * 16 + thread % 32 / 4;  // and 8 further
    const Interval seen[2] = {keys_of(op, place.batch, query), keys_of(op, place.batch, query + 8)};
    unsigned char *const own_queries = queries + row * kPanelRow, *const own_d_outputs = d_outputs + row * kPanelRow;
    const float scale_log2 = op.scale * kLog2e;
    // log2 of the sum and delta of the thread's two rows.
    const float2* const statistics = reinterpret_cast<const float2*>(op.statistics) +
        (int64_t{place.batch} * op.heads + place.head) * op.padded_queries + query;
    const float2 of_row[2] = {statistics[0], statistics[8]};

    float dq_sums[D / 2] = {}, p[kColumns / 2], ds[kColumns / 2];
    uint32_t ds_left[kColumns / 16][4];
    const auto multiply = [&](int i) {
      const int tile = range.begin + i;
      barriers.keys.wait_full(i);
      start_scores<T, D>(p, own_queries, kRows, keys(i));
      if (i > 0) {
        warpgroup_wait<1>();
        barriers.keys.release(i - 1);
      }
      barriers.values.wait_full(i);
      start_scores<T, D>(ds, own_d_outputs, kRows, values(i));
      warpgroup_wait<1>();
      settle(p);
#pragma unroll
      for (int at = 0; at < kColumns / 2; ++at) {
        p[at] = fast_exp2(p[at] * scale_log2 - of_row[at / 2 % 2].x);
      }
      if (range.cut(tile)) {
        mask_tile(p, tile * kColumns, seen, 0.0f);
      }
      warpgroup_wait<0>();
      settle(ds);
      barriers.values.release(i);
    };
    const auto add = [&](int i) {
#pragma unroll
      for (int at = 0; at < kColumns / 2; ++at) {
        ds[at] = p[at] * (ds[at] - of_row[at / 2 % 2].y);
      }
      as_operand<T>(ds_left, ds);
      start_sums<T>(dq_sums, ds_left, keys(i));
    };
    mbarrier_wait(&barriers.own, 0);
    if (steps > 0) {
      multiply(0);
      for (int i = 0; i + 1 < steps; ++i) {
        add(i);
        multiply(i + 1);
      }
      add(steps - 1);
      warpgroup_wait<0>();
      settle(dq_sums);
    }

    const float scale[2] = {op.scale, op.scale};
    barrier_wait(1 + warpgroup, kWarpgroup);  // all of its warps have read its queries
    store_tile<T, D>(dq_sums, scale, own_queries, kRows, dq, 1 + warpgroup, first + row, place.head, place.batch);
  }
#else
  __trap();
#endif
}

}  // namespace megapre::cuda
