// Attention backward on sm_90a: dK and dV by tiles of keys, dQ by tiles of queries, by products of warpgroups and copies of
// the TMA unit; no atomics, the same bits on every run. The arithmetic is that of attention_backward.cu, which also makes
// the statistics of queries that both kernels read.
//
// A block owns 128 keys of one key head, or 128 queries of one head, and walks what sees them or what they see. Scores lie
// in registers with the block's own rows as rows, so that P and dS are operands as they are and never pass through shared
// memory. The next tile's scores are started before the last products of this one are waited for.
//
// FLOPs      14 D per (query, visible key, head): 7 products where a kernel with atomics has 5.
// Registers  of the 240 of a computing thread: D sums for dK and dV or D / 2 for dQ; scores and dP 32 each for dK and dV, 64
//            for dQ; P and dS half of that. Head dims above 128 have no room for both dK and dV: attention_backward.cu.
// Shared     130 KB for dK and dV with D 128 (66 KB with D 64), 195 KB for dQ (99 KB). One block a multiprocessor.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <device/exp2.h>

#include "attention_sm90.h"

namespace megapre::cuda {
namespace {

constexpr int kWarpgroups = 2, kRows = 64 * kWarpgroups, kThreads = kWarpgroup * (kWarpgroups + 1);

// Two tiles are the block's own. COLUMNS rows of two tensors come a step, and their statistics.
template <int D, int COLUMNS>
struct BackwardTiles {
  static constexpr int kColumns = COLUMNS, kOwn = tile_bytes<D>(kRows), kTile = tile_bytes<D>(COLUMNS);
  static constexpr int kStatistics = COLUMNS * static_cast<int>(sizeof(float2));
  static constexpr int kStageStart = 2 * kOwn, kStatisticsStart = kStageStart + kStages * 2 * kTile;
  static constexpr int kBarriers = kStatisticsStart + kStages * kStatistics;
  static constexpr int kShared = (kBarriers + 1024 + 1023) / 1024 * 1024;
  static_assert(kShared <= 227 * 1024);
};

template <int D>
using KeyTiles = BackwardTiles<D, 64>;  // for tiles of keys
template <int D>
using QueryTiles = BackwardTiles<D, 128>;  // for tiles of queries

struct BackwardBarriers {
  Mbarrier own;
  StageBarriers stages;

  __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      mbarrier_init(&own, 1);
      stages.init(4 * kWarpgroups);
      mbarrier_fence();
    }
    __syncthreads();
  }
};

// dk and dv of 128 keys; a step brings a tile of queries of one of the group's heads.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_key_gradients_sm90_kernel(
    Attention op, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap dk,
    const __grid_constant__ TensorMap dv) {
#ifdef MEGAPRE_SM90A
  using Tiles = KeyTiles<D>;
  constexpr int kColumns = Tiles::kColumns;
  unsigned char *const keys = dynamic_shared(), *const values = keys + Tiles::kOwn;
  auto& barriers = *reinterpret_cast<BackwardBarriers*>(keys + Tiles::kBarriers);
  const auto queries = [&](int i) { return keys + Tiles::kStageStart + i % kStages * 2 * Tiles::kTile; };
  const auto d_outputs = [&](int i) { return queries(i) + Tiles::kTile; };
  const auto statistics = [&](int i) {
    return reinterpret_cast<float4*>(keys + Tiles::kStatisticsStart + i % kStages * Tiles::kStatistics);
  };

  const BlockPlace place((op.keys + kRows - 1) / kRows, op.key_heads);
  const int first = place.tile * kRows;  // the first keys are seen by most queries: they start first
  const TileRange<kColumns> range(
      queries_of(op, place.batch, first), queries_of(op, place.batch, first + kRows - 1));
  const int tiles = range.count(), steps = tiles * op.group;
  barriers.init();

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
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, row = 64 * warpgroup;
    const int key = first + row + thread / 32 * 16 + thread % 32 / 4;  // and 8 further
    const Interval seen[2] = {queries_of(op, place.batch, key), queries_of(op, place.batch, key + 8)};
    unsigned char *const own_keys = keys + row * kPanelRow, *const own_values = values + row * kPanelRow;
    const float scale_log2 = op.scale * kLog2e;

    float dk_sums[D / 2] = {}, dv_sums[D / 2] = {};
    uint32_t p_left[kColumns / 16][4], ds_left[kColumns / 16][4];
    mbarrier_wait(&barriers.own, 0);
    for (int i = 0; i < steps; ++i) {
      const int tile = range.begin + i % tiles;
      // log2 of the sum, delta, and the same of the next query: of the two columns that the thread has of every eight.
      const float4* const pairs = statistics(i) + threadIdx.x % 4;
      float p[kColumns / 2], ds[kColumns / 2];
      barriers.stages.wait_full(i);
      warpgroup_arrive();
      multiply_rows<T, D>(p, own_keys, kRows, queries(i));
      warpgroup_commit();
      multiply_rows<T, D>(ds, own_values, kRows, d_outputs(i));
      warpgroup_commit();
      warpgroup_wait<1>();
      settle(p);
#pragma unroll
      for (int at = 0; at < kColumns / 2; at += 4) {
        const float4 pair = pairs[at];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          p[at + j] = fast_exp2(p[at + j] * scale_log2 - (j % 2 == 0 ? pair.x : pair.z));
        }
      }
      if (range.cut(tile)) {
        mask_tile(p, tile * kColumns, seen, 0.0f);
      }
      as_operand<T>(p_left, p);
      warpgroup_arrive();
      add_product<T>(dv_sums, p_left, d_outputs(i));
      warpgroup_commit();
      warpgroup_wait<1>();
      settle(ds);
#pragma unroll
      for (int at = 0; at < kColumns / 2; at += 4) {
        const float4 pair = pairs[at];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ds[at + j] = p[at + j] * (ds[at + j] - (j % 2 == 0 ? pair.y : pair.w));
        }
      }
      as_operand<T>(ds_left, ds);
      warpgroup_arrive();
      add_product<T>(dk_sums, ds_left, queries(i));
      warpgroup_commit();
      warpgroup_wait<0>();
      settle(dv_sums);
      settle(dk_sums);
      barriers.stages.release(i);
    }

    const float scale[2] = {op.scale, op.scale}, one[2] = {1.0f, 1.0f};
    barrier_wait(1 + warpgroup, kWarpgroup);  // all of its warps have read its keys and values
    store_tile<T, D>(dk_sums, scale, own_keys, kRows, dk, 1 + warpgroup, first + row, place.head, place.batch);
    store_tile<T, D>(dv_sums, one, own_values, kRows, dv, 1 + warpgroup, first + row, place.head, place.batch);
  }
#else
  __trap();
#endif
}

// dq of 128 queries; a step brings a tile of keys and values.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_query_gradient_sm90_kernel(
    Attention op, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const __grid_constant__ TensorMap dq) {
#ifdef MEGAPRE_SM90A
  using Tiles = QueryTiles<D>;
  constexpr int kColumns = Tiles::kColumns;
  unsigned char *const queries = dynamic_shared(), *const d_outputs = queries + Tiles::kOwn;
  auto& barriers = *reinterpret_cast<BackwardBarriers*>(queries + Tiles::kBarriers);
  const auto keys = [&](int i) { return queries + Tiles::kStageStart + i % kStages * 2 * Tiles::kTile; };
  const auto values = [&](int i) { return keys(i) + Tiles::kTile; };

  const int query_tiles = (op.queries + kRows - 1) / kRows;
  const BlockPlace place(query_tiles, op.heads);
  const int first = (query_tiles - 1 - place.tile) * kRows;  // the last queries see most keys: they start first
  const TileRange<kColumns> range(
      keys_of(op, place.batch, first), keys_of(op, place.batch, first + kRows - 1));
  const int steps = range.count();
  barriers.init();

  const int warpgroup = warpgroup_index() - 1;
  if (warpgroup < 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      const int key_head = place.head / op.group;
      prefetch_maps(q, k, v, d_o);
      mbarrier_expect(&barriers.own, 2 * Tiles::kOwn);
      load_tile<D>(queries, q, &barriers.own, kRows, first, place.head, place.batch);
      load_tile<D>(d_outputs, d_o, &barriers.own, kRows, first, place.head, place.batch);
      for (int i = 0; i < steps; ++i) {
        const int key = (range.begin + i) * kColumns;
        Mbarrier* const full = &barriers.stages.full[i % kStages];
        barriers.stages.wait_empty(i);
        mbarrier_expect(full, 2 * Tiles::kTile);
        load_tile<D>(keys(i), k, full, kColumns, key, key_head, place.batch);
        load_tile<D>(values(i), v, full, kColumns, key, key_head, place.batch);
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

    float dq_sums[D / 2] = {};
    uint32_t ds_left[kColumns / 16][4];
    mbarrier_wait(&barriers.own, 0);
    for (int i = 0; i < steps; ++i) {
      const int tile = range.begin + i;
      float p[kColumns / 2], ds[kColumns / 2];
      barriers.stages.wait_full(i);
      warpgroup_arrive();
      multiply_rows<T, D>(p, own_queries, kRows, keys(i));
      warpgroup_commit();
      multiply_rows<T, D>(ds, own_d_outputs, kRows, values(i));
      warpgroup_commit();
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
#pragma unroll
      for (int at = 0; at < kColumns / 2; ++at) {
        ds[at] = p[at] * (ds[at] - of_row[at / 2 % 2].y);
      }
      as_operand<T>(ds_left, ds);
      warpgroup_arrive();
      add_product<T>(dq_sums, ds_left, keys(i));
      warpgroup_commit();
      warpgroup_wait<0>();
      settle(dq_sums);
      barriers.stages.release(i);
    }

    const float scale[2] = {op.scale, op.scale};
    barrier_wait(1 + warpgroup, kWarpgroup);  // all of its warps have read its queries
    store_tile<T, D>(dq_sums, scale, own_queries, kRows, dq, 1 + warpgroup, first + row, place.head, place.batch);
  }
#else
  __trap();
#endif
}

}  // namespace

void attention_backward_sm90(const Attention& op, const float* dlse, cudaStream_t stream) {
  attention_statistics(op, dlse, stream);
  const auto blocks = [&](int length, int heads) {
    return dim3(static_cast<unsigned>(int64_t{(length + kRows - 1) / kRows} * heads * op.batch));
  };
  for_panels_of(op, [&]<typename T, int D>() {
    if constexpr (D <= 128) {
      launch(
          {.op = "attention_backward",
           .grid = blocks(op.keys, op.key_heads),
           .block = dim3(kThreads),
           .shared = KeyTiles<D>::kShared,
           .stream = stream},
          attention_key_gradients_sm90_kernel<T, D>, op,
          heads_map(op, op.q, op.queries, op.heads, KeyTiles<D>::kColumns),
          heads_map(op, op.k, op.keys, op.key_heads, kRows), heads_map(op, op.v, op.keys, op.key_heads, kRows),
          heads_map(op, op.d_o, op.queries, op.heads, KeyTiles<D>::kColumns),
          heads_map(op, op.dk, op.keys, op.key_heads, 64), heads_map(op, op.dv, op.keys, op.key_heads, 64));
      launch(
          {.op = "attention_backward",
           .grid = blocks(op.queries, op.heads),
           .block = dim3(kThreads),
           .shared = QueryTiles<D>::kShared,
           .stream = stream},
          attention_query_gradient_sm90_kernel<T, D>, op, heads_map(op, op.q, op.queries, op.heads, kRows),
          heads_map(op, op.k, op.keys, op.key_heads, QueryTiles<D>::kColumns),
          heads_map(op, op.v, op.keys, op.key_heads, QueryTiles<D>::kColumns),
          heads_map(op, op.d_o, op.queries, op.heads, kRows), heads_map(op, op.dq, op.queries, op.heads, 64));
    }
  });
}

}  // namespace megapre::cuda
