// Small kernels, right and wrong, on the units of sm_90: the TMA unit, mbarriers, products of warpgroups
// (test_emulator_units.py). A case is one block of one warpgroup.

#include <device/mbarrier.h>
#include <device/shared.h>
#include <device/tma.h>
#include <device/warpgroup.h>
#include <device/wgmma.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "launch.h"
#include "panel.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

enum class Mistake {
  kNone, kNoWait, kWrongPhase, kNoFence, kNoArrive, kTouchedSums, kReadSums, kMixedPanels, kTooEarlyWrite, kNotInitialised,
  kTooManyBytes, kNoSwizzle, kUnfinishedStore,
};

// The box at (column, row) of a [rows, columns] matrix, as it lies in shared memory: 128 bytes a thread.
__global__ void box_kernel(const __grid_constant__ TensorMap map, int column, int row, unsigned char* out) {
  unsigned char* const shared = dynamic_shared();
  auto* const barrier = reinterpret_cast<Mbarrier*>(shared + 16384);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_expect(barrier, 16384);
    tma_load(shared, &map, barrier, column, row, 0, 0);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = 0; i < 128; ++i) {
    out[threadIdx.x * 128 + i] = shared[threadIdx.x * 128 + i];
  }
}

// Thread t writes row t of a box, all t, and the box is stored at (column, row).
__global__ void store_kernel(const __grid_constant__ TensorMap map, int column, int row, Mistake mistake) {
  auto* const shared = dynamic_shared<bf16>();
  for (int i = 0; i < 64; ++i) {
    const int chunk = i / 8 ^ static_cast<int>(threadIdx.x) % 8;
    shared[threadIdx.x * 64 + chunk * 8 + i % 8] = from_float<bf16>(static_cast<float>(threadIdx.x));
  }
  if (mistake != Mistake::kNoFence) {
    async_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&map, shared, column, row, 0, 0);
    if (mistake != Mistake::kUnfinishedStore) {
      tma_store_wait();
    }
  }
}

// out[t] = the sums of thread t of A [64, 64] B; A from shared memory, or from a_registers [4 steps][128][4].
template <typename T, int N, bool TRANSPOSED>
__global__ void product_kernel(
    const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const uint32_t* a_registers, float* out,
    Mistake mistake) {
  unsigned char *const left = dynamic_shared(), *const right = left + 8192;
  constexpr int kRows = TRANSPOSED ? 64 : N, kPanels = TRANSPOSED ? N / 64 : 1;
  auto* const barrier = reinterpret_cast<Mbarrier*>(right + 128 * N);
  if (threadIdx.x == 0) {
    if (mistake != Mistake::kNotInitialised) {
      mbarrier_init(barrier, 1);
    }
    mbarrier_fence();
    mbarrier_expect(barrier, 8192 + 128 * N + (mistake == Mistake::kTooManyBytes ? 16 : 0));
    tma_load(left, &a, barrier, 0, 0, 0, 0);
    for (int i = 0; i < kPanels; ++i) {
      tma_load(right + i * kRows * kPanelRow, &b, barrier, 64 * i, 0, 0, 0);
    }
  }
  __syncthreads();
  if (mistake != Mistake::kNoWait) {
    mbarrier_wait(barrier, mistake == Mistake::kWrongPhase);
  }
  float d[N / 2];
  if (mistake != Mistake::kNoArrive) {
    warpgroup_arrive();
  }
  for (int i = 0; i < 4; ++i) {
    Panel of_b = TRANSPOSED ? mn_panel(right, kRows * kPanelRow) + i * 2 * kPanelGroup : k_panel(right) + i * 32;
    if (mistake == Mistake::kMixedPanels && threadIdx.x == 77) {
      of_b = of_b + 16;
    }
    if (mistake == Mistake::kNoSwizzle) {
      of_b.bits &= ~(uint64_t{3} << 62);
    }
    if (a_registers != nullptr) {
      uint32_t own[4];
      for (int l = 0; l < 4; ++l) {
        own[l] = a_registers[(i * 128 + threadIdx.x) * 4 + l];
      }
      wgmma<T, TRANSPOSED>(d, own, of_b, i > 0);
    } else {
      wgmma<T, TRANSPOSED>(d, k_panel(left) + i * 32, of_b, i > 0);
    }
  }
  warpgroup_commit();
  if (mistake == Mistake::kTouchedSums) {
    d[3] = 1.0f;
  }
  if (mistake == Mistake::kTooEarlyWrite) {
    reinterpret_cast<uint16_t*>(right)[threadIdx.x] = 0xFFFF;
    async_fence();
  }
  if (mistake == Mistake::kReadSums) {
    out[threadIdx.x * (N / 2)] = d[0];
  }
  warpgroup_wait<0>();
  settle(d);
  for (int i = mistake == Mistake::kReadSums; i < N / 2; ++i) {
    out[threadIdx.x * (N / 2) + i] = d[i];
  }
}

// One warpgroup gives up registers and two ask for more, 72 each: all that are free, or more.
template <int LEFT>
__global__ void registers_kernel(float* out) {
  if (threadIdx.x < 128) {
    fewer_registers<LEFT>();
  } else {
    more_registers<240>();
  }
  out[threadIdx.x] = 1.0f;
}

// Of a matrix [rows, columns] of 16-bit elements.
TensorMap matrix_map(const Tensor& t, int box_rows) {
  return tensor_map_16bit(
      t.scalar_type() == ScalarType::BFloat16, t.data_ptr(), {t.size(1), t.size(0), 1, 1}, {2 * t.stride(0), 16, 16},
      box_rows);
}

Mistake mistake_of(const std::string& name) {
  const std::map<std::string, Mistake> all{
      {"", Mistake::kNone},
      {"no wait", Mistake::kNoWait},
      {"wrong phase", Mistake::kWrongPhase},
      {"no fence", Mistake::kNoFence},
      {"no arrive", Mistake::kNoArrive},
      {"touched sums", Mistake::kTouchedSums},
      {"read sums", Mistake::kReadSums},
      {"mixed panels", Mistake::kMixedPanels},
      {"too early write", Mistake::kTooEarlyWrite},
      {"not initialised", Mistake::kNotInitialised},
      {"too many bytes", Mistake::kTooManyBytes},
      {"no swizzle", Mistake::kNoSwizzle},
      {"unfinished store", Mistake::kUnfinishedStore}};
  const auto at = all.find(name);
  check(at != all.end(), "there is no mistake ", name);
  return at->second;
}

Launch one_block(size_t shared) {
  return {.op = "case", .grid = dim3(1), .block = dim3(128), .shared = shared};
}

// Shared memory [128, 64] after the box of 128 rows at (row, column) of t was loaded.
Tensor box(Tensor t, int64_t row, int64_t column) {
  Tensor out = empty(t, {128, 64}, t.scalar_type());
  launch(
      one_block(16384 + 1024), box_kernel, matrix_map(t, 128), static_cast<int>(column), static_cast<int>(row),
      static_cast<unsigned char*>(out.data_ptr()));
  return out;
}

// Writes rows of 0, 1, 2 .. 127 to t from (row, column) on, 64 columns of them.
void store_box(Tensor t, int64_t row, int64_t column, std::string mistake) {
  launch(
      one_block(16384), store_kernel, matrix_map(t, 128), static_cast<int>(column), static_cast<int>(row),
      mistake_of(mistake));
}

// Registers [128, N / 2] of A [64, 64] B, B [N, 64] or where transposed [64, N].
Tensor product(Tensor a, Tensor b, OptionalTensor a_registers, bool transposed, std::string mistake) {
  const int64_t n = b.size(transposed ? 1 : 0);
  Tensor out = empty(a, {128, n / 2}, ScalarType::Float);
  const auto run = [&](auto kernel) {
    launch(
        one_block(8192 + 128 * n + 1024), kernel, matrix_map(a, 64), matrix_map(b, static_cast<int>(transposed ? 64 : n)),
        a_registers.has_value() ? static_cast<const uint32_t*>(a_registers->data_ptr()) : nullptr,
        static_cast<float*>(out.data_ptr()), mistake_of(mistake));
  };
  const auto of_width = [&]<typename T, bool TRANSPOSED>() {
    n == 64 ? run(product_kernel<T, 64, TRANSPOSED>)
        : n == 128 ? run(product_kernel<T, 128, TRANSPOSED>)
                   : run(product_kernel<T, 256, TRANSPOSED>);
  };
  const auto of_type = [&]<typename T>() {
    transposed ? of_width.template operator()<T, true>() : of_width.template operator()<T, false>();
  };
  a.scalar_type() == ScalarType::BFloat16 ? of_type.template operator()<bf16>() : of_type.template operator()<fp16>();
  return out;
}

Tensor registers(Tensor like, int64_t left) {
  Tensor out = empty(like, {384}, ScalarType::Float);
  const Launch how{.op = "case", .grid = dim3(1), .block = dim3(384), .shared = 1024};
  launch(how, left == 24 ? registers_kernel<24> : registers_kernel<32>, static_cast<float*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace megapre::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MEGAPRE_OPS_NAMESPACE, m) {
  m.def("box(Tensor t, int row, int column) -> Tensor");
  m.def("store_box(Tensor(a!) t, int row, int column, str mistake) -> ()");
  m.def("registers(Tensor like, int left) -> Tensor");
  m.def("product(Tensor a, Tensor b, Tensor? a_registers, bool transposed, str mistake) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEGAPRE_OPS_NAMESPACE, MEGAPRE_OPS_KEY, m) {
  m.impl("box", TORCH_BOX(&megapre::cuda::box));
  m.impl("store_box", TORCH_BOX(&megapre::cuda::store_box));
  m.impl("registers", TORCH_BOX(&megapre::cuda::registers));
  m.impl("product", TORCH_BOX(&megapre::cuda::product));
}
