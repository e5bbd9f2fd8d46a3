// Small kernels, right and wrong, that show what the emulator does and what it catches (test_emulator.py). Each is an op
// of one tensor, run by one launch.

#include <device/cluster.h>
#include <device/cp_async.h>
#include <device/mma.h>
#include <device/shared.h>
#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "reduce.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

// Thread i gets what thread n - 1 - i has written to shared memory.
template <bool BARRIER>
__global__ void reverse_kernel(float* x) {
  MEGAPRE_SHARED(float, held, [128]);
  held[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) {
    __syncthreads();
  }
  x[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

// The same within a warp.
template <bool BARRIER>
__global__ void reverse_warp_kernel(float* x) {
  MEGAPRE_SHARED(float, held, [32]);
  held[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) {
    __syncwarp();
  }
  x[threadIdx.x] = held[31 - threadIdx.x];
}

__global__ void store_past_the_end_kernel(float* x, int64_t count) {
  x[count + threadIdx.x] = 1.0f;
}

__global__ void load_past_the_end_kernel(float* x, int64_t count) {
  x[0] = x[count];
}

__global__ void store_before_the_start_kernel(float* x) {
  x[-1] = 1.0f;
}

__global__ void misaligned_kernel(float* x) {
  Vector<float, 4>::load(x + 1).store(x);
}

__global__ void past_a_shared_array_kernel(float* x) {
  MEGAPRE_SHARED(float, held, [8]);
  float* end = held + 8;
  *end = x[0];
}

__global__ void past_dynamic_shared_kernel(float* x) {
  dynamic_shared<float>()[4] = x[0];
}

__global__ void divergent_kernel(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
  __syncwarp();
  if (threadIdx.x >= 32) {
    x[threadIdx.x] = __shfl_sync(0xffffffffu, x[threadIdx.x], 0);
    if (threadIdx.x == 40) {
      __syncwarp();
    }
  }
}

// Each block writes the sum of the numbers that the blocks of its cluster hold.
template <bool FINISH>
__global__ void cluster_kernel(float* x) {
  MEGAPRE_SHARED(float, held, [1]);
  if (threadIdx.x == 0) {
    held[0] = x[blockIdx.x];
  }
  cluster_arrive();
  cluster_wait();
  float sum = 0.0f;
  for (unsigned block = 0; block < cluster_blocks(); ++block) {
    sum += load_from_block(&held[0], block);
    __syncthreads();
  }
  if (FINISH) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x == 0) {
    x[blockIdx.x] = sum;
  }
}

// By the lanes of one warp: a sum, a maximum of integers, a shift, how many are positive.
__global__ void warp_kernel(float* x) {
  const float own = x[threadIdx.x];
  const float sum = warp_sum(own);
  const int most = __reduce_max_sync(0xffffffffu, static_cast<int>(own));
  const float before = __shfl_up_sync(0xffffffffu, own, 1);
  const unsigned positive = __ballot_sync(0xffffffffu, own > 0.0f);
  x[threadIdx.x] = threadIdx.x == 0 ? sum
      : threadIdx.x == 1            ? static_cast<float>(most)
      : threadIdx.x == 2            ? static_cast<float>(__popc(positive))
                                    : before;
}

// x holds A [16][16] and B [16][8] as fp32, small integers; D = A B overwrites the first 128 of them.
template <typename T>
__global__ void product_kernel(float* x) {
  MEGAPRE_SHARED(uint4, held, [48]);  // 16 rows of A of 32 bytes, 16 rows of B of 16 bytes
  T* const a = reinterpret_cast<T*>(held);
  T* const b = a + 256;
  for (int i = static_cast<int>(threadIdx.x); i < 384; i += 32) {
    a[i] = from_float<T>(x[i]);
  }
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t in_a[4], in_b[4];
  load_matrices(in_a, a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<true>(in_b, b + lane % 16 * 8);  // the upper lanes' matrices are not used
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const uint32_t two[2] = {in_b[0], in_b[1]};
  multiply_add<T>(d, in_a, two);
  for (int i = 0; i < 4; ++i) {
    x[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

// x reversed, 4 floats at a time, by way of shared memory; the last thread's are zeros.
template <bool WAIT>
__global__ void copy_async_kernel(float* x) {
  MEGAPRE_SHARED(float4, held, [32]);
  copy_async(&held[threadIdx.x], x + 4 * threadIdx.x, threadIdx.x != 31);
  copy_async_commit();
  if (WAIT) {
    copy_async_wait<0>();
  }
  __syncthreads();
  reinterpret_cast<float4*>(x)[threadIdx.x] = held[31 - threadIdx.x];
}

Tensor run(Tensor t, std::string which) {
  Tensor out = empty(t, sizes_of(t), t.scalar_type());
  std::memcpy(out.data_ptr(), t.data_ptr(), static_cast<size_t>(t.numel()) * 4);
  auto* const x = static_cast<float*>(out.data_ptr());
  const int64_t count = t.numel();
  const auto with = [&](unsigned blocks, unsigned threads) {
    return Launch{.op = "case", .grid = dim3(blocks), .block = dim3(threads), .shared = 16};
  };
  Launch clusters = with(static_cast<unsigned>(count), 64);
  clusters.cluster = 4;
  Launch too_much = with(1, 32);
  too_much.shared = 228 * 1024;
  which == "reverse"                     ? launch(with(1, 128), reverse_kernel<true>, x)
      : which == "reverse, no barrier"   ? launch(with(1, 128), reverse_kernel<false>, x)
      : which == "warp reverse"          ? launch(with(1, 32), reverse_warp_kernel<true>, x)
      : which == "warp, no barrier"      ? launch(with(1, 32), reverse_warp_kernel<false>, x)
      : which == "store past the end"    ? launch(with(1, 32), store_past_the_end_kernel, x, count)
      : which == "load past the end"     ? launch(with(1, 32), load_past_the_end_kernel, x, count)
      : which == "store before"          ? launch(with(1, 32), store_before_the_start_kernel, x)
      : which == "misaligned"            ? launch(with(1, 32), misaligned_kernel, x)
      : which == "past a shared array"   ? launch(with(1, 32), past_a_shared_array_kernel, x)
      : which == "past dynamic shared"   ? launch(with(1, 32), past_dynamic_shared_kernel, x)
      : which == "divergent"             ? launch(with(1, 64), divergent_kernel, x)
      : which == "cluster"               ? launch(clusters, cluster_kernel<true>, x)
      : which == "cluster, no finish"    ? launch(clusters, cluster_kernel<false>, x)
      : which == "warp"                  ? launch(with(1, 32), warp_kernel, x)
      : which == "bf16 product"          ? launch(with(1, 32), product_kernel<bf16>, x)
      : which == "fp16 product"          ? launch(with(1, 32), product_kernel<fp16>, x)
      : which == "copy async"            ? launch(with(1, 32), copy_async_kernel<true>, x)
      : which == "copy async, no wait"   ? launch(with(1, 32), copy_async_kernel<false>, x)
      : which == "no blocks"             ? launch(with(0, 32), warp_kernel, x)
      : which == "too many threads"      ? launch(with(1, 1056), warp_kernel, x)
      : which == "too much shared"       ? launch(too_much, warp_kernel, x)
                                         : check(false, "there is no case ", which);
  return out;
}

}  // namespace
}  // namespace megapre::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MEGAPRE_OPS_NAMESPACE, m) {
  m.def("run(Tensor t, str which) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEGAPRE_OPS_NAMESPACE, MEGAPRE_OPS_KEY, m) {
  m.impl("run", TORCH_BOX(&megapre::cuda::run));
}
