// What the kernels of attention for sm_90a share: warpgroups that fetch or compute, tiles in panels, their products.
//
// A block has one warpgroup that fetches (one thread of it starts copies of the TMA unit) and two or three that compute, 64
// rows of the block's tile each, on registers that the first has given up. Tiles go around in rings of stages; a stage has
// one mbarrier that says it is full and one that says it is free. A head dim that is none of 64, 128 and 256 has the
// next of them: what is past its end is read as zero and not written.
//
// Compiled for sm_90a alone, and called by attention.cu for it alone: elsewhere these kernels end at once with an error, and
// so does a library on an sm_90 that was built without code for sm_90a.
#pragma once

#include <device/mbarrier.h>
#include <device/mma.h>
#include <device/shared.h>
#include <device/tma.h>
#include <device/warpgroup.h>
#include <device/wgmma.h>

#include "attention.h"
#include "launch.h"
#include "panel.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEGAPRE_SM90A
#else
#pragma nv_diag_suppress 177  // nothing is used where kernels are empty
#endif

namespace megapre::cuda {

inline constexpr int kWarpgroup = 128;

// Bytes of a tile of `rows` rows, which is D / 64 panels one behind the other.
template <int D>
constexpr int tile_bytes(int rows) {
  return rows * D * 2;
}

template <int STAGES>
struct StageBarriers {
  Mbarrier full[STAGES], empty[STAGES];

  __device__ __forceinline__ void init(int consumer_warps) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], consumer_warps);
    }
  }

  // For tile i of the walk: until it is there; that this warp has read it; until its place is free.
  __device__ __forceinline__ void wait_full(int i) { mbarrier_wait(&full[i % STAGES], i / STAGES & 1); }
  __device__ __forceinline__ void wait_empty(int i) { mbarrier_wait(&empty[i % STAGES], (i / STAGES & 1) ^ 1); }
  __device__ __forceinline__ void release(int i) {
    if (threadIdx.x % 32 == 0) {
      mbarrier_arrive(&empty[i % STAGES]);
    }
  }
};

// Which of the block's warpgroups this is, the same register for all threads of a warp.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

template <typename... Maps>
__device__ __forceinline__ void prefetch_maps(const Maps&... maps) {
  (tma_prefetch(&maps), ...);
}

// Rows `first` to `first + rows - 1` of a head into the panels at `to`; `map` has boxes of as many rows.
template <int D>
__device__ __forceinline__ void load_tile(
    unsigned char* to, const TensorMap& map, Mbarrier* full, int rows, int first, int head, int batch) {
#pragma unroll
  for (int at = 0; at < D / 64; ++at) {
    tma_load(to + at * rows * kPanelRow, &map, full, 64 * at, first, head, batch);
  }
}

// s = A B^T over D, starting at row a of panels of `a_rows` rows and all N rows of B.
template <typename T, int D, int COUNT>
__device__ __forceinline__ void multiply_rows(
    float (&s)[COUNT], const unsigned char* a, int a_rows, const unsigned char* b) {
  constexpr int kRowsOfB = 2 * COUNT;
  Panel of_a = k_panel(a), of_b = k_panel(b);
  if constexpr (D > 128) {  // 32 places are too many for the registers
    of_a = not_kept(of_a), of_b = not_kept(of_b);
  }
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    wgmma<T, false>(
        s, of_a + (k / 64 * a_rows * kPanelRow + k % 64 * 2), of_b + (k / 64 * kRowsOfB * kPanelRow + k % 64 * 2), k > 0);
  }
}

// A warpgroup's 64 rows of panels of `rows` rows as operands A, 16 columns each.
template <int STEPS>
__device__ __forceinline__ void load_operands(uint32_t (&a)[STEPS][4], const unsigned char* from, int rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    const int chunk = i % 4 * 2 + lane / 16;
    load_matrices(a[i], from + i / 4 * rows * kPanelRow + row * kPanelRow + (chunk ^ row % 8) * 16);
  }
}

// o += P B with P in registers, 16 columns a step, and as many rows of B.
template <typename T, int COUNT, int STEPS>
__device__ __forceinline__ void add_product(float (&o)[COUNT], const uint32_t (&p)[STEPS][4], const unsigned char* b) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    wgmma<T, true>(o, p[i], mn_panel(b, 16 * STEPS * kPanelRow) + i * 2 * kPanelGroup, true);
  }
}

// Each as a group of products of its own.
template <typename T, int D, int COUNT>
__device__ __forceinline__ void start_scores(
    float (&s)[COUNT], const unsigned char* a, int a_rows, const unsigned char* b) {
  renew(s);
  warpgroup_arrive();
  multiply_rows<T, D>(s, a, a_rows, b);
  warpgroup_commit();
}

// With A in registers.
template <typename T, int COUNT, int STEPS>
__device__ __forceinline__ void start_scores(
    float (&s)[COUNT], const uint32_t (&a)[STEPS][4], const unsigned char* b) {
  renew(s);
  warpgroup_arrive();
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    wgmma<T, false>(s, a[i], k_panel(b + i / 4 * 2 * COUNT * kPanelRow) + i % 4 * 32, i > 0);
  }
  warpgroup_commit();
}

template <typename T, int COUNT, int STEPS>
__device__ __forceinline__ void start_sums(
    float (&o)[COUNT], const uint32_t (&p)[STEPS][4], const unsigned char* b) {
  warpgroup_arrive();
  add_product<T>(o, p, b);
  warpgroup_commit();
}

// Sums, rounded, as the operand of the next product.
template <typename T, int STEPS>
__device__ __forceinline__ void as_operand(uint32_t (&p)[STEPS][4], const float (&s)[8 * STEPS]) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      const float pair[2] = {s[8 * i + 2 * l], s[8 * i + 2 * l + 1]};
      p[i][l] = Vector<T, 2>::from(pair).bits;
    }
  }
}

// `value` for what a row's interval does not hold; `seen` are the intervals of the thread's two rows.
template <int COUNT>
__device__ __forceinline__ void mask_tile(float (&s)[COUNT], int first, const Interval (&seen)[2], float value) {
  const int column = first + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (!seen[i / 2 % 2].holds(column + i / 4 * 8 + i % 2)) {
      s[i] = value;
    }
  }
}

// The warpgroup's 64 rows of sums, each times its factor, into panels of `rows` rows at `to` from its first row on, and from
// there to the head. `map` has boxes of 64 rows; `barrier` is this warpgroup's own. Nobody may read the panels any more.
template <typename T, int D>
__device__ __forceinline__ void store_tile(
    const float (&o)[D / 2], const float (&factor)[2], unsigned char* to, int rows, const TensorMap& map, int barrier,
    int first, int head, int batch) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < D / 2; i += 2) {
    const int at = row + i / 2 % 2 * 8, chunk = i / 4 % 8, half = i / 2 % 2;
    const float pair[2] = {o[i] * factor[half], o[i + 1] * factor[half]};
    unsigned char* const place =
        to + i / 32 * rows * kPanelRow + at * kPanelRow + (chunk ^ at % 8) * 16 + thread % 4 * 4;
    *reinterpret_cast<uint32_t*>(place) = Vector<T, 2>::from(pair).bits;
  }
  async_fence();
  barrier_wait(barrier, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int at = 0; at < D / 64; ++at) {
      tma_store(&map, to + at * rows * kPanelRow, 64 * at, first, head, batch);
    }
    tma_store_wait();
  }
}

// The map of a tensor [batch, length, heads, dim] whose boxes have `rows` rows of one head.
inline TensorMap heads_map(const Attention& op, const Heads& t, int length, int heads, int rows) {
  const auto step = [](int64_t elements, int64_t count) { return count > 1 ? 2 * elements : 16; };  // of one: unused
  return tensor_map_16bit(
      op.is_bf16, t.data, {op.dim, length, heads, op.batch},
      {step(t.row, length), step(t.head, heads), step(t.batch, op.batch)}, rows);
}

// body.operator()<T, D>() for the element and the head dim that the kernels have.
template <typename Body>
void for_panels_of(const Attention& op, Body body) {
  const auto with = [&]<typename T>() {
    op.dim <= 64 ? body.template operator()<T, 64>()
        : op.dim <= 128 ? body.template operator()<T, 128>()
                        : body.template operator()<T, 256>();
  };
  op.is_bf16 ? with.template operator()<bf16>() : with.template operator()<fp16>();
}

}  // namespace megapre::cuda
