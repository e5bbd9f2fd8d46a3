// Attention forward on sm_90a: warpgroup products, copies by the TMA unit (FlashAttention-3: Shah et al. 2024, section 3).
//
//     s_ij = scale q_i . k_j;   o_i = sum_j softmax_j(s_ij) v_j;   lse_i = log sum_j exp(s_ij)
//
// A block owns 128 queries of one head (192 with head dims up to 64), a warpgroup 64 of them. Q stays in shared memory; tiles
// of keys and values come from the last that is seen to the first. While the exponentials of one tile are computed, the
// product of the tile before with V runs on the tensor cores; and with head dims up to 128 the warpgroups take turns, so that
// one computes exponentials while the products of the other run.
//
// Counted as in attention_sm90_backward.cu, not measured; with D 64 the exponentials take as long as the products:
//     tile                tensor cores   exponentials   shared memory   issue   bytes from L2
//     D 64    192 x 128   1536           1536            960            1350    21
//     D 128   128 x 128   2048           1024           1280            1020    32
//     D 256   128 x 64    2048           512            1536             930    32
//
// FLOPs      4 D per (query, visible key, head), on tiles of 128 by 128 (192 by 128; 128 by 64 with D 256).
// Registers  of the 240 of a computing thread (160 of the three with D 64): sums D / 2, scores 64 (32 with D 256), P half.
// Shared     Q, two stages of K and V: 90 KB with D 64, 162 KB with D 128, 194 KB with D 256. One block a multiprocessor.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <device/exp2.h>

#include "attention_sm90.h"

namespace megapre::cuda {
namespace {

template <int D>
struct ForwardTiles {
  static constexpr int kWarpgroups = D == 64 ? 3 : 2, kRows = 64 * kWarpgroups, kColumns = D == 256 ? 64 : 128;
  static constexpr int kThreads = kWarpgroup * (kWarpgroups + 1), kRegisters = kWarpgroups == 3 ? 160 : 240;
  static constexpr int kStages = 2;
  static constexpr bool kTurns = D <= 128;
  static constexpr int kTile = tile_bytes<D>(kColumns), kKeys = tile_bytes<D>(kRows), kValues = kKeys + kStages * kTile;
  static constexpr int kBarriers = kValues + kStages * kTile, kShared = kBarriers + 1024;
};

template <int STAGES>
struct ForwardBarriers {
  Mbarrier queries;
  StageBarriers<STAGES> keys, values;
};

// The maximum and the sum of exponentials of the thread's two rows, the sum over its own columns alone until the end.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  // Makes of scores their exponentials; `shrink` is what sums so far are to be multiplied by.
  template <int COUNT>
  __device__ __forceinline__ void add(float (&s)[COUNT], float (&shrink)[2], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float higher = top[half];
#pragma unroll
      for (int i = 2 * half; i < COUNT; i += 4) {
        higher = fmaxf(higher, fmaxf(s[i], s[i + 1]));
      }
      higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 1));
      higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 2));
      // A row that has seen no key yet: exp2(-inf - 0) = 0, not exp2(-inf + inf).
      const float base = higher == -INFINITY ? 0.0f : higher * scale_log2;
      shrink[half] = fast_exp2(top[half] * scale_log2 - base);
      top[half] = higher;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < COUNT; i += 4) {
        s[i] = fast_exp2(s[i] * scale_log2 - base);
        s[i + 1] = fast_exp2(s[i + 1] * scale_log2 - base);
        sum += s[i] + s[i + 1];
      }
      total[half] = total[half] * shrink[half] + sum;
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(ForwardTiles<D>::kThreads, 1) attention_forward_sm90_kernel(
    Attention op, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap o) {
#ifdef MEGAPRE_SM90A
  using Tiles = ForwardTiles<D>;
  constexpr int kRows = Tiles::kRows, kColumns = Tiles::kColumns, kWarpgroups = Tiles::kWarpgroups;
  constexpr int kStages = Tiles::kStages;
  unsigned char* const queries = dynamic_shared();
  auto& barriers = *reinterpret_cast<ForwardBarriers<kStages>*>(queries + Tiles::kBarriers);
  const auto keys = [&](int i) { return queries + Tiles::kKeys + i % kStages * Tiles::kTile; };
  const auto values = [&](int i) { return queries + Tiles::kValues + i % kStages * Tiles::kTile; };

  const int query_tiles = (op.queries + kRows - 1) / kRows;
  const BlockPlace place(query_tiles, op.heads);
  const int first = (query_tiles - 1 - place.tile) * kRows;  // the last queries see most keys: they start first
  const TileRange<kColumns> range(
      keys_of(op, place.batch, first), keys_of(op, place.batch, first + kRows - 1));
  const int count = range.count();

  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.queries, 1);
    barriers.keys.init(4 * kWarpgroups);
    barriers.values.init(4 * kWarpgroups);
    mbarrier_fence();
  }
  __syncthreads();

  const int warpgroup = warpgroup_index() - 1;
  if (warpgroup < 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      const int key_head = place.head / op.group;
      const auto fetch = [&](StageBarriers<kStages>& stages, const TensorMap& from, unsigned char* to, int i) {
        Mbarrier* const full = &stages.full[i % kStages];
        stages.wait_empty(i);
        mbarrier_expect(full, Tiles::kTile);
        load_tile<D>(to, from, full, kColumns, (range.end - 1 - i) * kColumns, key_head, place.batch);
      };
      prefetch_maps(q, k, v);
      mbarrier_expect(&barriers.queries, tile_bytes<D>(kRows));
      load_tile<D>(queries, q, &barriers.queries, kRows, first, place.head, place.batch);
      for (int i = 0; i <= count; ++i) {  // in the order of use
        if (i < count) {
          fetch(barriers.keys, k, keys(i), i);
        }
        if (i > 0) {
          fetch(barriers.values, v, values(i - 1), i - 1);
        }
      }
    }
  } else {
    more_registers<Tiles::kRegisters>();
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, row = 64 * warpgroup;
    const int query = first + row + thread / 32 * 16 + thread % 32 / 4;  // and 8 further
    const Interval seen[2] = {keys_of(op, place.batch, query), keys_of(op, place.batch, query + 8)};
    unsigned char* const own = queries + row * kPanelRow;
    const float scale_log2 = op.scale * kLog2e;
    const int turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % kWarpgroups;

    OnlineSoftmax softmax;
    float o_sums[D / 2] = {}, shrink[2];
    uint32_t p[kColumns / 16][4];
    const auto probabilities = [&](float (&s)[kColumns / 2], int i) {
      const int tile = range.end - 1 - i;
      if (range.cut(tile)) {
        mask_tile(s, tile * kColumns, seen, -INFINITY);
      }
      softmax.add(s, shrink, scale_log2);
    };
    const auto multiply_keys = [&](float (&s)[kColumns / 2], int i) {
      barriers.keys.wait_full(i);
      start_scores<T, D>(s, own, kRows, keys(i));
    };
    const auto add_values = [&](int i) {
      barriers.values.wait_full(i);
      start_sums<T>(o_sums, p, values(i));
    };

    if (Tiles::kTurns && warpgroup == kWarpgroups - 1) {
      barrier_arrive(1, 2 * kWarpgroup);  // the first turn is the first warpgroup's
    }
    mbarrier_wait(&barriers.queries, 0);
    if (count > 0) {  // 0 where documents are not as promised (attention_documents.h)
      float s[kColumns / 2];
      multiply_keys(s, 0);
      warpgroup_wait<0>();
      settle(s);
      barriers.keys.release(0);
      probabilities(s, 0);
      as_operand<T>(p, s);
    }
    for (int i = 1; i < count; ++i) {
      float s[kColumns / 2];
      if constexpr (Tiles::kTurns) {
        barrier_wait(turn, 2 * kWarpgroup);
      }
      multiply_keys(s, i);
      add_values(i - 1);
      if constexpr (Tiles::kTurns) {
        barrier_arrive(next_turn, 2 * kWarpgroup);
      }
      warpgroup_wait<1>();
      settle(s);
      barriers.keys.release(i);
      probabilities(s, i);
      computed(softmax.total[0] + softmax.total[1]);
      warpgroup_wait<0>();
      settle(o_sums);
      barriers.values.release(i - 1);
#pragma unroll
      for (int at = 0; at < D / 2; ++at) {
        o_sums[at] *= shrink[at / 2 % 2];
      }
      as_operand<T>(p, s);
    }
    if (count > 0) {
      add_values(count - 1);
      warpgroup_wait<0>();
      settle(o_sums);
    }

    softmax.finish();
    float factor[2];
    float* const lse = op.lse + (int64_t{place.batch} * op.heads + place.head) * op.queries;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] = 1.0f / softmax.total[half];
      if (threadIdx.x % 4 == 0 && query + 8 * half < op.queries) {
        lse[query + 8 * half] = softmax.top[half] * op.scale + logf(softmax.total[half]);
      }
    }
    const int barrier = 1 + kWarpgroups + warpgroup;
    barrier_wait(barrier, kWarpgroup);  // all of its warps have read Q
    store_tile<T, D>(o_sums, factor, own, kRows, o, barrier, first + row, place.head, place.batch);
  }
#else
  __trap();
#endif
}

}  // namespace

void attention_forward_sm90(const Attention& op, cudaStream_t stream) {
  for_panels_of(op, [&]<typename T, int D>() {
    using Tiles = ForwardTiles<D>;
    static_assert(Tiles::kShared <= 227 * 1024);
    const int64_t tiles = (op.queries + Tiles::kRows - 1) / Tiles::kRows;
    launch(
        {.op = "attention",
         .grid = dim3(static_cast<unsigned>(tiles * op.heads * op.batch)),
         .block = dim3(Tiles::kThreads),
         .shared = Tiles::kShared,
         .stream = stream},
        attention_forward_sm90_kernel<T, D>, op, heads_map(op, op.q, op.queries, op.heads, Tiles::kRows),
        heads_map(op, op.k, op.keys, op.key_heads, Tiles::kColumns),
        heads_map(op, op.v, op.keys, op.key_heads, Tiles::kColumns), heads_map(op, op.o, op.queries, op.heads, 64));
  });
}

}  // namespace megapre::cuda
