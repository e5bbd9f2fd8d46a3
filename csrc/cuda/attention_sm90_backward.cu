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

#include "attention_sm90_key_gradients.h"
#include "attention_sm90_query_gradient.h"

namespace megapre::cuda {

void attention_backward_sm90(const Attention& op, const float* dlse, cudaStream_t stream) {
  attention_statistics(op, dlse, stream);
  for_panels_of(op, [&]<typename T, int D>() {
    using Keys = KeyTiles<D>;
    using Queries = QueryTiles<D>;
    const auto start = [&]<typename Tiles>(int length, int heads, auto kernel, const auto&... maps) {
      const int64_t tiles = (length + Tiles::kRows - 1) / Tiles::kRows;
      launch(
          {.op = "attention_backward",
           .grid = dim3(static_cast<unsigned>(tiles * heads * op.batch)),
           .block = dim3(Tiles::kThreads),
           .shared = Tiles::kShared,
           .stream = stream},
          kernel, op, maps...);
    };
    const auto of_queries = [&](const Heads& t, int rows) { return heads_map(op, t, op.queries, op.heads, rows); };
    const auto of_keys = [&](const Heads& t, int rows) { return heads_map(op, t, op.keys, op.key_heads, rows); };
    start.template operator()<Keys>(
        op.keys, op.key_heads, attention_key_gradients_sm90_kernel<T, D>, of_queries(op.q, Keys::kColumns),
        of_keys(op.k, Keys::kRows), of_keys(op.v, Keys::kRows), of_queries(op.d_o, Keys::kColumns), of_keys(op.dk, 64),
        of_keys(op.dv, 64));
    start.template operator()<Queries>(
        op.queries, op.heads, attention_query_gradient_sm90_kernel<T, D>, of_queries(op.q, Queries::kRows),
        of_keys(op.k, Queries::kColumns), of_keys(op.v, Queries::kColumns), of_queries(op.d_o, Queries::kRows),
        of_queries(op.dq, 64));
  });
}

}  // namespace megapre::cuda
