// Documents as the kernels of attention see them: of each token where its document begins and ends within its row of
// the batch, worked out on the device from cu_seqlens by bisection, so that nothing waits for the host.
#pragma once

#include "launch.h"
#include "tensor.h"

namespace megapre::cuda {

// cu_seqlens [documents + 1] rises from 0 to `tokens`, as the caller promises; if it does not, what comes out is wrong
// but lies within the row. steps: halvings of `documents`.
template <typename Index>
__global__ void __launch_bounds__(256) document_bounds_kernel(
    const Index* cu_seqlens, int64_t documents, int steps, int64_t tokens, int row_length, int* first, int* end) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= tokens) {
    return;
  }
  int64_t low = 0, high = documents;  // cu_seqlens[low] <= token < cu_seqlens[high]
  for (int i = 0; i < steps; ++i) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] <= token ? low : high) = middle;
  }
  const int64_t row = token / row_length * row_length, length = row_length;
  first[token] = static_cast<int>(min(max(static_cast<int64_t>(cu_seqlens[low]) - row, int64_t{0}), length));
  end[token] = static_cast<int>(min(max(static_cast<int64_t>(cu_seqlens[low + 1]) - row, int64_t{0}), length));
}

// [2, batch, length] int32: first and end of each token.
inline Tensor document_bounds(const Tensor& cu_seqlens, int64_t batch, int64_t length, cudaStream_t stream) {
  const Tensor bounds = empty(cu_seqlens, {2, batch, length}, ScalarType::Int);
  const Tensor neighbours = torch::stable::contiguous(cu_seqlens);
  const int64_t tokens = batch * length, documents = cu_seqlens.numel() - 1;
  int steps = 0;
  while (documents >> steps != 0) {
    ++steps;
  }
  const Launch how{
      .op = "attention",
      .grid = dim3(static_cast<unsigned>((tokens + 255) / 256)),
      .block = dim3(256),
      .stream = stream};
  int* const first = static_cast<int*>(bounds.data_ptr());
  const auto with = [&](auto type) {
    using Index = typename decltype(type)::type;
    launch(
        how, document_bounds_kernel<Index>, static_cast<const Index*>(neighbours.data_ptr()), documents, steps, tokens,
        static_cast<int>(length), first, first + tokens);
  };
  cu_seqlens.scalar_type() == ScalarType::Int ? with(Type<int>{}) : with(Type<int64_t>{});
  return bounds;
}

}  // namespace megapre::cuda
