// dK and dV of attention on sm_90a (attention_sm90_backward.cu).
//
// A block owns a tile of keys of one key head and walks the queries of all heads of its group. Scores are transposed, keys by
// queries, so that P and dS are operands as they lie in registers.
//
// With head dims up to 128 each of two warpgroups owns 64 keys. Above, dK and dV of 64 keys fill the registers of two: both
// own the same keys, one makes P and sums dV, the other makes dS of it and sums dK; P passes through shared memory, in fp32.
#pragma once

#include <device/exp2.h>

#include "attention_sm90.h"

namespace megapre::cuda {

// The block's own keys and values; stages of queries, d_o and statistics of queries; P on its way between warpgroups.
template <int D>
struct KeyTiles {
  static constexpr bool kApart = D > 128;  // one warpgroup for dV, one for dK
  static constexpr bool kHeld = D == 64;   // keys and values as operands in registers, which shared memory need not serve
  static constexpr int kRows = kApart ? 64 : 128, kColumns = 64, kStages = kApart ? 2 : 4;
  static constexpr int kWarpgroups = 2, kThreads = kWarpgroup * (kWarpgroups + 1);
  static constexpr int kOwn = tile_bytes<D>(kRows), kTile = tile_bytes<D>(kColumns), kStart = 2 * kOwn;
  static constexpr int kStatistics = kColumns * static_cast<int>(sizeof(float2));
  static constexpr int kStatisticsStart = kStart + kStages * 2 * kTile;
  static constexpr int kPassed = kStatisticsStart + kStages * kStatistics;
  static constexpr int kBarriers = kPassed + (kApart ? kRows * kColumns * static_cast<int>(sizeof(float)) : 0);
  static constexpr int kShared = kBarriers + 1024;
  static_assert(kShared <= 227 * 1024);
};

template <int STAGES>
struct KeyBarriers {
  Mbarrier own;
  StageBarriers<STAGES> stages;
};

// Of the columns' statistics `pairs` has those of two neighbours: log2 of the sum, delta, and the same of the next. `s` are
// scores and become probabilities.
template <int COUNT>
__device__ __forceinline__ void to_probabilities(float (&s)[COUNT], const float4* pairs, float scale_log2) {
#pragma unroll
  for (int at = 0; at < COUNT; at += 4) {
    const float4 pair = pairs[at];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[at + j] = fast_exp2(s[at + j] * scale_log2 - (j % 2 == 0 ? pair.x : pair.z));
    }
  }
}

// `ds` are products of values and d_o and become gradients of scores.
template <int COUNT>
__device__ __forceinline__ void to_score_gradients(float (&ds)[COUNT], const float (&p)[COUNT], const float4* pairs) {
#pragma unroll
  for (int at = 0; at < COUNT; at += 4) {
    const float4 pair = pairs[at];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ds[at + j] = p[at + j] * (ds[at + j] - (j % 2 == 0 ? pair.y : pair.w));
    }
  }
}

// A step brings a tile of queries of one of the group's heads.
template <typename T, int D>
__global__ void __launch_bounds__(KeyTiles<D>::kThreads, 1) attention_key_gradients_sm90_kernel(
    Attention op, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap dk,
    const __grid_constant__ TensorMap dv) {
#ifdef MEGAPRE_SM90A
  using Tiles = KeyTiles<D>;
  constexpr int kRows = Tiles::kRows, kColumns = Tiles::kColumns, kStages = Tiles::kStages;
  unsigned char *const keys = dynamic_shared(), *const values = keys + Tiles::kOwn;
  auto& barriers = *reinterpret_cast<KeyBarriers<kStages>*>(keys + Tiles::kBarriers);
  const auto queries = [&](int i) { return keys + Tiles::kStart + i % kStages * 2 * Tiles::kTile; };
  const auto d_outputs = [&](int i) { return queries(i) + Tiles::kTile; };
  const auto statistics = [&](int i) {
    return reinterpret_cast<float4*>(keys + Tiles::kStatisticsStart + i % kStages * Tiles::kStatistics);
  };

  const BlockPlace place((op.keys + kRows - 1) / kRows, op.key_heads);
  const int first = place.tile * kRows;  // the first keys are seen by most queries: they start first
  const TileRange<kColumns> range(
      queries_of(op, place.batch, first), queries_of(op, place.batch, first + kRows - 1));
  const int tiles = range.count(), steps = tiles * op.group;

  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.own, 1);
    barriers.stages.init(4 * Tiles::kWarpgroups);
    mbarrier_fence();
  }
  __syncthreads();

  const int warpgroup = warpgroup_index() - 1;
  if (warpgroup < 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      prefetch_maps(q, k, v, d_o);
      mbarrier_expect(&barriers.own, 2 * Tiles::kOwn);
      load_tile<D>(keys, k, &barriers.own, kRows, first, place.head, place.batch);
      load_tile<D>(values, v, &barriers.own, kRows, first, place.head, place.batch);
      for (int i = 0; i < steps; ++i) {
        const int head = place.head * op.group + i / tiles, query = (range.begin + i % tiles) * kColumns;
        Mbarrier* const full = &barriers.stages.full[i % kStages];
        barriers.stages.wait_empty(i);
        mbarrier_expect(full, 2 * Tiles::kTile + Tiles::kStatistics);
        load_tile<D>(queries(i), q, full, kColumns, query, head, place.batch);
        load_tile<D>(d_outputs(i), d_o, full, kColumns, query, head, place.batch);
        const int64_t at = (int64_t{place.batch} * op.heads + head) * op.padded_queries + query;
        tma_load_row(statistics(i), op.statistics + 2 * at, Tiles::kStatistics, full);
      }
    }
  } else {
    more_registers<240>();
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, row = Tiles::kApart ? 0 : 64 * warpgroup;
    const int key = first + row + thread / 32 * 16 + thread % 32 / 4;  // and 8 further
    const Interval seen[2] = {queries_of(op, place.batch, key), queries_of(op, place.batch, key + 8)};
    unsigned char *const own_keys = keys + row * kPanelRow, *const own_values = values + row * kPanelRow;
    const float scale_log2 = op.scale * kLog2e;
    const auto pairs = [&](int i) { return statistics(i) + threadIdx.x % 4; };
    const auto probabilities = [&](float (&p)[kColumns / 2], int i) {
      const int tile = range.begin + i % tiles;
      to_probabilities(p, pairs(i), scale_log2);
      if (range.cut(tile)) {
        mask_tile(p, tile * kColumns, seen, 0.0f);
      }
    };
    mbarrier_wait(&barriers.own, 0);

    if constexpr (!Tiles::kApart) {
      float dk_sums[D / 2] = {}, dv_sums[D / 2] = {}, p[kColumns / 2], ds[kColumns / 2];
      uint32_t p_left[kColumns / 16][4], ds_left[kColumns / 16][4];
      uint32_t held_keys[D / 16][4], held_values[D / 16][4];
      if constexpr (Tiles::kHeld) {
        load_operands(held_keys, own_keys, kRows);
        load_operands(held_values, own_values, kRows);
      }
      const auto start = [&](float (&s)[kColumns / 2], const uint32_t (&held)[D / 16][4], const unsigned char* own,
                             const unsigned char* tile) {
        if constexpr (Tiles::kHeld) {
          start_scores<T>(s, held, tile);
        } else {
          start_scores<T, D>(s, own, kRows, tile);
        }
      };
      const auto multiply = [&](int i) {
        barriers.stages.wait_full(i);
        start(p, held_keys, own_keys, queries(i));
        if (i > 0) {
          warpgroup_wait<1>();
          barriers.stages.release(i - 1);
        }
        start(ds, held_values, own_values, d_outputs(i));
        warpgroup_wait<1>();
        settle(p);
        probabilities(p, i);
        as_operand<T>(p_left, p);
        warpgroup_wait<0>();
        settle(ds);
      };
      const auto add = [&](int i) {
        start_sums<T>(dv_sums, p_left, d_outputs(i));
        to_score_gradients(ds, p, pairs(i));
        as_operand<T>(ds_left, ds);
        start_sums<T>(dk_sums, ds_left, queries(i));
      };
      if (steps > 0) {
        multiply(0);
        for (int i = 0; i + 1 < steps; ++i) {
          add(i);
          multiply(i + 1);
        }
        add(steps - 1);
        warpgroup_wait<0>();
        settle(dk_sums);
        settle(dv_sums);
      }
      const float scale[2] = {op.scale, op.scale}, one[2] = {1.0f, 1.0f};
      barrier_wait(1 + warpgroup, kWarpgroup);  // all of its warps have read its keys and values
      store_tile<T, D>(dk_sums, scale, own_keys, kRows, dk, 1 + warpgroup, first + row, place.head, place.batch);
      store_tile<T, D>(dv_sums, one, own_values, kRows, dv, 1 + warpgroup, first + row, place.head, place.batch);
    } else {
      constexpr int kIsPassed = 3, kIsTaken = 4;  // barriers of both warpgroups
      const bool sums_dv = warpgroup == 0;
      unsigned char* const own = sums_dv ? keys : values;
      float4* const passed = reinterpret_cast<float4*>(keys + Tiles::kPassed) + thread;
      float sums[D / 2] = {}, s[kColumns / 2];
      uint32_t left[kColumns / 16][4];
      const auto multiply = [&](int i) {
        barriers.stages.wait_full(i);
        start_scores<T, D>(s, own, kRows, sums_dv ? queries(i) : d_outputs(i));
        if (i > 0) {
          warpgroup_wait<1>();
          barriers.stages.release(i - 1);
        }
        warpgroup_wait<0>();
        settle(s);
        if (sums_dv) {
          probabilities(s, i);
          if (i > 0) {
            barrier_wait(kIsTaken, 2 * kWarpgroup);
          }
#pragma unroll
          for (int at = 0; at < kColumns / 2; at += 4) {
            passed[at / 4 * kWarpgroup] = make_float4(s[at], s[at + 1], s[at + 2], s[at + 3]);
          }
          barrier_arrive(kIsPassed, 2 * kWarpgroup);
        } else {
          float p[kColumns / 2];
          barrier_wait(kIsPassed, 2 * kWarpgroup);
#pragma unroll
          for (int at = 0; at < kColumns / 2; at += 4) {
            const float4 four = passed[at / 4 * kWarpgroup];
            p[at] = four.x, p[at + 1] = four.y, p[at + 2] = four.z, p[at + 3] = four.w;
          }
          barrier_arrive(kIsTaken, 2 * kWarpgroup);
          to_score_gradients(s, p, pairs(i));
        }
        as_operand<T>(left, s);
      };
      const auto add = [&](int i) { start_sums<T>(sums, left, sums_dv ? d_outputs(i) : queries(i)); };
      if (steps > 0) {
        multiply(0);
        for (int i = 0; i + 1 < steps; ++i) {
          add(i);
          multiply(i + 1);
        }
        add(steps - 1);
        warpgroup_wait<0>();
        settle(sums);
      }
      const float once = sums_dv ? 1.0f : op.scale, factor[2] = {once, once};
      barrier_wait(1 + warpgroup, kWarpgroup);  // all of its warps have read its keys or values
      store_tile<T, D>(
          sums, factor, own, kRows, sums_dv ? dv : dk, 1 + warpgroup, first, place.head, place.batch);
    }
  }
#else
  __trap();
#endif
}

}  // namespace megapre::cuda
