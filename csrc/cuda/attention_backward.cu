// Attention backward on the tensor cores of sm_80 and up: dK and dV by tiles of keys, dQ by tiles of queries; no
// atomics, the same bits on every run.
//
//     delta_i = do_i . o_i - dlse_i;   p_ij = exp(s_ij - lse_i);   ds_ij = p_ij (do_i . v_j - delta_i)
//     dv_j = sum_i p_ij do_i;   dk_j = scale sum_i ds_ij q_i;   dq_i = scale sum_j ds_ij k_j     (Dao 2023, algorithm
//     2)
//
// Three launches, four with head dims above 128: delta and the sums of exponentials side by side, filled up to whole
// tiles; dK and dV; dQ. The tiles of the other side come in pairs (Q and dO, K and V), the next one copied while one is
// worked on.
//
// FLOPs      14 D per (query, visible key, head): 7 products where a fused kernel with atomics has 5; 16 D with head
//            dims above 128, where dK and dV do not fit in registers together and are summed by two launches.
// Bytes      q, k, v, o, do, dq, dk, dv once from DRAM, while what is read again fits in L2; statistics 8 a query and
//            head.
// Occupancy  expected from registers (200 to 255) and shared memory, blocks a multiprocessor of sm_80: dK and dV: D 32
//            two and D 64 two of 4 warps, D 96 and D 128 one of 8, D 256 one of 4. dQ: D 32, 64 and 96 two of 4, D 128
//            one of 8, D 256 one of 4.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include "attention_key_gradients.h"
#include "attention_query_gradient.h"
#include "launch.h"

namespace megapre::cuda {
namespace {

// `lanes`, a power of two, work on a row of D elements; rows in the order of o.
template <typename T>
__global__ void __launch_bounds__(256) attention_statistics_kernel(Attention op, const float* dlse, int lanes) {
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / lanes;
  const int64_t head = row % op.heads, query = row / op.heads % op.padded_queries;
  const int64_t batch = row / op.heads / op.padded_queries;
  const int at = static_cast<int>(threadIdx.x) % lanes * 8;
  const bool exists = batch < op.batch && query < op.queries;
  float delta = 0.0f;
  if (exists && at < op.dim) {
    float o[8], d_o[8];
    Vector<T, 8>::load(op.o.of<T>(batch, head) + query * op.o.row + at).to(o);
    Vector<T, 8>::load(op.d_o.of<T>(batch, head) + query * op.d_o.row + at).to(d_o);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      delta += o[i] * d_o[i];
    }
  }
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    delta += __shfl_xor_sync(0xffffffffu, delta, bits);
  }
  if (batch < op.batch && at == 0) {
    const int64_t of = (batch * op.heads + head) * op.queries + query;
    if (exists && dlse != nullptr) {
      delta -= dlse[of];
    }
    float* const to = op.statistics + ((batch * op.heads + head) * op.padded_queries + query) * 2;
    *reinterpret_cast<float2*>(to) = make_float2(exists ? op.lse[of] * kLog2e : INFINITY, delta);
  }
}

template <typename T>
void statistics(const Attention& op, const float* dlse, cudaStream_t stream) {
  int lanes = 1;
  while (8 * lanes < op.dim) {
    lanes *= 2;
  }
  const int64_t threads = int64_t{op.batch} * op.padded_queries * op.heads * lanes;
  launch(
      {.op = "attention_backward",
       .grid = dim3(static_cast<unsigned>((threads + 255) / 256)),
       .block = dim3(256),
       .stream = stream},
      attention_statistics_kernel<T>, op, dlse, lanes);
}

template <typename T, int D, bool KEYS, bool VALUES>
void key_gradients(const Attention& op, cudaStream_t stream) {
  constexpr AttentionTiles kTiles = key_tiles(D);
  launch(
      {.op = "attention_backward",
       .grid = tile_grid(op.keys, kTiles, op.key_heads, op.batch),
       .block = dim3(kTiles.threads()),
       .shared = sizeof(T) * D * 2 * (kTiles.rows() + kTiles.slots * kTiles.columns) +
           sizeof(float2) * kTiles.slots * kTiles.columns + sizeof(Interval) * kTiles.rows(),
       .stream = stream},
      attention_key_gradients_kernel<T, D, KEYS, VALUES>, op);
}

}  // namespace

void attention_statistics(const Attention& op, const float* dlse, cudaStream_t stream) {
  op.is_bf16 ? statistics<bf16>(op, dlse, stream) : statistics<fp16>(op, dlse, stream);
}

void attention_backward_sm80(const Attention& op, const float* dlse, cudaStream_t stream) {
  attention_statistics(op, dlse, stream);
  for_tiles_of(op, [&]<typename T, int D>() {
    if constexpr (D <= 128) {
      key_gradients<T, D, true, true>(op, stream);
    } else {
      key_gradients<T, D, true, false>(op, stream);
      key_gradients<T, D, false, true>(op, stream);
    }
    constexpr AttentionTiles kTiles = query_tiles(D);
    launch(
        {.op = "attention_backward",
         .grid = tile_grid(op.queries, kTiles, op.heads, op.batch),
         .block = dim3(kTiles.threads()),
         .shared = sizeof(T) * D * 2 * (kTiles.rows() + kTiles.slots * kTiles.columns) +
             sizeof(Interval) * kTiles.rows(),
         .stream = stream},
        attention_query_gradient_kernel<T, D>, op);
  });
}

}  // namespace megapre::cuda
