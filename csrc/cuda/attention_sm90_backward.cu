// Attention backward on sm_90a: dK and dV by tiles of keys, dQ by tiles of queries, by products of warpgroups and copies of
// the TMA unit; no atomics, the same bits on every run. The arithmetic is that of attention_backward.cu, which also makes
// the statistics of queries that both kernels read.
//
// A block owns a tile of keys of one key head, or of queries of one head, and walks what sees them or what they see, in
// steps. Scores lie in registers with the block's own rows as rows, so that P and dS are operands as they are. A step is
//     scores and dO V^T started;  P while the second runs;  P^T dO started;  dS while it runs;  dS^T Q, or dS K, started
// and the next step's scores are started before that last product is waited for.
//
// Cycles of a multiprocessor for a step, at 2048 multiply-adds, 16 exponentials and 128 bytes of shared memory a cycle; slots
// in which one of its four schedulers issues (machine code of nvcc 13.0, tiles that need no mask); and what a step fetches,
// by cycle of the tensor cores. Counted, not measured:
//     dK, dV      tile        tensor cores   exponentials   shared memory   issue   bytes from L2
//     D 64        128 x 64    1024           512             768            660     16
//     D 128       128 x 64    2048           512            1792            700     16
//     D 256        64 x 64    2048           256            1920            600     32
//     dQ, D 64    128 x 128   1536           1024           1024            760     21
//     D 128       128 x 128   3072           1024           2048            850     21
//     D 256       128 x 64    3072           512            2560            780     21
// So the tensor cores are what takes longest, and two warpgroups that do not wait for each other should keep them busy: one
// has products under way whenever the other computes. The forward's turns would only add waits, since exponentials are an
// eighth to two thirds of the products here, not half to all. (L2 gives some 25 to 30 bytes a cycle if all read at once.)
//
// FLOPs      14 D per (query, visible key, head): 7 products where a kernel with atomics has 5, so at best 5/7 of its speed.
//            The two more are what it costs that dQ is summed in one place, in one order, without 4 bytes of traffic to L2
//            for each of its elements and tile of keys.
// Registers  of the 240 of a computing thread: sums D for dK and dV, D / 2 above 128 and for dQ; scores and dP 32 each, 64
//            for dQ up to 128; P and dS half of that; keys and values 16 each with D 64, for dK and dV.
// Shared     dK and dV 99, 195 and 210 KB with D 64, 128 and 256; dQ 97, 193 and 225 KB. One block a multiprocessor.
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
