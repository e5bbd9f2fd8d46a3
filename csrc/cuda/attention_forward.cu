// Attention forward on the tensor cores of sm_80 and up: FlashAttention-2 (Dao 2023, algorithm 1).
//
//     s_ij = scale q_i . k_j;   o_i = sum_j softmax_j(s_ij) v_j;   lse_i = log sum_j exp(s_ij)
//
// A block owns a tile of queries of one head, a warp 16 M rows of it. Q stays in shared memory; the tiles of keys and
// values come one after another, K V K V, through a ring of slots, each copied while the products of the slots before
// are computed. Scores and probabilities never leave a warp's registers: accumulators of one product are the operand of
// the next.
//
// FLOPs      4 D per (query, visible key, head), on whole tiles: those that a mask cuts are
//            computed whole and masked, those that it hides are not touched.
// Bytes      q, k, v and o once from DRAM, while the keys of the heads at work fit in L2; a tile of queries reads all
//            keys that it sees from L2: 128 FLOPs a byte with 128 queries.
// Shared     ldmatrix: with M = 2 each operand B serves two products, 0.5 to 0.75 of the cycles that the tensor cores
//            need.
// Occupancy  expected from registers (172, 211, 237, 255, 245 for D 32, 64, 96, 128, 256) and shared memory (21, 41,
//            61, 81, 161 KiB): two blocks of 4 warps a multiprocessor of sm_80 and of sm_90, D 256 one of 8.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <device/exp2.h>
#include <device/shared.h>

#include "attention_tiles.h"
#include "launch.h"

namespace megapre::cuda {
namespace {

constexpr AttentionTiles forward_tiles(int dim) {
  return dim <= 128 ? AttentionTiles{4, 2, 64, 3} : AttentionTiles{8, 1, 64, 3};
}

// The maximum and the sum of exponentials of a warp's rows, and what they owe to the sums of values so far. The sums
// are a thread's own until the end.
template <int M>
struct OnlineSoftmax {
  float top[M][2], total[M][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      top[m][0] = top[m][1] = -INFINITY;
      total[m][0] = total[m][1] = 0.0f;
    }
  }

  // Makes of scores their exponentials, and scales the rows of o to the new maximum.
  template <int N, int WIDTH>
  __device__ __forceinline__ void add(float (&s)[M][N][4], float (&o)[M][WIDTH][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float higher = top[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          higher = fmaxf(higher, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 1));
        higher = fmaxf(higher, __shfl_xor_sync(0xffffffffu, higher, 2));
        // A row that has seen no key yet: exp2(-inf - 0) = 0, not exp2(-inf + inf).
        const float base = higher == -INFINITY ? 0.0f : higher * scale_log2;
        const float shrink = fast_exp2(top[m][half] * scale_log2 - base);
        top[m][half] = higher;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = fast_exp2(s[m][n][i] * scale_log2 - base);
            sum += s[m][n][i];
          }
        }
        total[m][half] = total[m][half] * shrink + sum;
#pragma unroll
        for (int d = 0; d < WIDTH; ++d) {
          o[m][d][2 * half] *= shrink;
          o[m][d][2 * half + 1] *= shrink;
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[m][half] += __shfl_xor_sync(0xffffffffu, total[m][half], 1);
        total[m][half] += __shfl_xor_sync(0xffffffffu, total[m][half], 2);
      }
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(forward_tiles(D).threads()) attention_forward_kernel(Attention op) {
  constexpr AttentionTiles kTiles = forward_tiles(D);
  constexpr int kRows = kTiles.rows(), kColumns = kTiles.columns, kThreads = kTiles.threads();
  constexpr int M = kTiles.parts, N = kColumns / 8, kSlots = kTiles.slots;
  const int query_tiles = (op.queries + kRows - 1) / kRows;
  const BlockPlace place(query_tiles, op.heads);
  const int first = (query_tiles - 1 - place.tile) * kRows;  // the last queries see most keys: they start first
  const int key_head = place.head / op.group, row = static_cast<int>(threadIdx.x) / 32 * 16 * M;
  using Source = typename Tile<T, D>::template Source<kThreads>;
  const Source keys(op.k.of<T>(place.batch, key_head), op.k.row, op.keys, op.dim);
  const Source values(op.v.of<T>(place.batch, key_head), op.v.row, op.keys, op.dim);
  const TileRange<kColumns> range(
      keys_of(op, place.batch, first), keys_of(op, place.batch, first + kRows - 1));
  const int steps = 2 * range.count();

  const Tile<T, D> queries{dynamic_shared<T>()};
  const auto slot = [&](int i) { return Tile<T, D>{queries.data + (kRows + i % kSlots * kColumns) * D}; };
  Interval* const seen = reinterpret_cast<Interval*>(queries.data + (kRows + kSlots * kColumns) * D);
  for (int i = static_cast<int>(threadIdx.x); i < kRows; i += kThreads) {
    seen[i] = keys_of(op, place.batch, first + i);
  }
  // Step 2 i needs tile i of the keys, step 2 i + 1 that of the values.
  const auto fetch = [&](int step) {
    if (step < steps) {
      slot(step).template copy<kColumns>(step % 2 == 0 ? keys : values, (range.begin + step / 2) * kColumns);
    }
    copy_async_commit();
  };
  // Until the tile of a step is there for all, and the slot of the step before is free.
  const auto arrive = [&](int step) {
    copy_async_wait<kSlots - 2>();
    __syncthreads();
    fetch(step + kSlots - 1);
    return slot(step);
  };

  queries.template copy<kRows>(Source(op.q.of<T>(place.batch, place.head), op.q.row, op.queries, op.dim), first);
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) {
    fetch(step);
  }
  float o[M][D / 8][4] = {};
  OnlineSoftmax<M> softmax;
  const float scale_log2 = op.scale * kLog2e;
  for (int step = 0; step < steps; step += 2) {
    const int tile = range.begin + step / 2;
    float s[M][N][4];
    multiply_rows<T, D>(s, queries, row, arrive(step));
    if (range.cut(tile)) {
      mask(s, tile * kColumns, -INFINITY, seen + row);
    }
    softmax.add(s, o, scale_log2);
    uint32_t p[M][N / 2][4];
    as_operand<T>(p, s);
    add_product<T, D>(o, p, arrive(step + 1));
  }

  softmax.finish();
  float factor[M][2];
  float* const lse = op.lse + (int64_t{place.batch} * op.heads + place.head) * op.queries;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
      factor[m][half] = 1.0f / softmax.total[m][half];
      if (threadIdx.x % 4 == 0 && query < op.queries) {
        lse[query] = softmax.top[m][half] * op.scale + logf(softmax.total[m][half]);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  store_rows<T, D>(
      o, factor, queries, row, op.o.of<T>(place.batch, place.head), op.o.row, first + row, op.queries, op.dim);
}

}  // namespace

void attention_forward_sm80(const Attention& op, cudaStream_t stream) {
  for_tiles_of(op, [&]<typename T, int D>() {
    constexpr AttentionTiles kTiles = forward_tiles(D);
    launch(
        {.op = "attention",
         .grid = tile_grid(op.queries, kTiles, op.heads, op.batch),
         .block = dim3(kTiles.threads()),
         .shared = sizeof(T) * D * (kTiles.rows() + kTiles.slots * kTiles.columns) + sizeof(Interval) * kTiles.rows(),
         .stream = stream},
        attention_forward_kernel<T, D>, op);
  });
}

}  // namespace megapre::cuda
