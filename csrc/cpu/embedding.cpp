// Driver of the embedding's gradient: checks, order and threads. The arithmetic is in embedding_rows.cpp.
//
// Tokens are sorted by id, stably; a run of equal ids is one row of the gradient, summed by one thread in order of the
// tokens. So the bits do not depend on the number of threads.

#include "embedding.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "rows.h"

namespace megapre::cpu {
namespace {

void embedding_gradient_(at::Tensor& total, const at::Tensor& dy, const at::Tensor& ids_in, bool accumulate) {
  const char* op = "embedding_gradient";
  TORCH_CHECK_VALUE(
      dy.dim() == 2 && ids_in.dim() == 1 && dy.size(0) == ids_in.size(0) && total.dim() == 2 &&
          total.size(1) == dy.size(1),
      op, ": dy is ", dy.sizes(), ", ids ", ids_in.sizes(), " and the gradient ", total.sizes(),
      "; [tokens, width], [tokens] and [rows, width] are needed");
  TORCH_CHECK_TYPE(
      is_supported(dy.scalar_type()), op, ": dy is ", dy.scalar_type(), "; supported are fp32, bf16, fp16, fp64");
  const c10::ScalarType acc = acc_dtype(dy.scalar_type());
  TORCH_CHECK_TYPE(
      total.scalar_type() == acc || total.scalar_type() == dy.scalar_type(), op, ": the gradient is ",
      total.scalar_type(), "; it can be ", acc, " or that of dy, ", dy.scalar_type());
  TORCH_CHECK_VALUE(
      (total.stride(1) == 1 || total.size(1) <= 1) && (total.size(0) < 2 || total.stride(0) >= total.size(1)), op,
      ": the gradient has strides ", total.strides(), "; the ", total.size(1),
      " elements of a row must be neighbours and rows must not overlap");
  TORCH_CHECK_TYPE(ids_in.scalar_type() == c10::kLong, op, ": ids are ", ids_in.scalar_type(), ", not int64");
  const at::Tensor ids = ids_in.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t tokens = ids.size(0), width = dy.size(1);
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK_INDEX(
        id[t] >= 0 && id[t] < total.size(0), op, ": id ", id[t], " of token ", t, " lies outside [0, ", total.size(0),
        ")");
  }
  raise_version(total);
  if (!accumulate) {
    total.zero_();
  }
  if (tokens == 0 || width == 0) {
    return;
  }
  std::vector<int64_t> order(tokens), begins;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
  for (int64_t t = 0; t < tokens; ++t) {
    if (t == 0 || id[order[t]] != id[order[t - 1]]) {
      begins.push_back(t);
    }
  }
  begins.push_back(tokens);
  const int64_t runs = static_cast<int64_t>(begins.size()) - 1;
  const Rows rows(dy);
  at::Tensor sums = at::empty({at::get_num_threads(), width}, dy.options().dtype(acc));
  const EmbeddingKernels& kernels = MEGAPRE_CHOOSE(embedding_kernels);
  at::parallel_for(0, runs, grain(width), [&](int64_t begin, int64_t end) {
    void* sum = static_cast<char*>(sums.data_ptr()) + at::get_thread_num() * width * sums.element_size();
    for (int64_t run = begin; run < end; ++run) {
      const int64_t* first = order.data() + begins[run];
      kernels.add_row({
          .dtype = dy.scalar_type(),
          .total_dtype = total.scalar_type(),
          .width = width,
          .dy = rows.data(),
          .dy_stride = rows.stride,
          .tokens = first,
          .count = begins[run + 1] - begins[run],
          .sum = sum,
          .total = static_cast<char*>(total.data_ptr()) + id[*first] * total.stride(0) * total.element_size(),
          .accumulate = accumulate,
      });
    }
  });
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("embedding_gradient_", &megapre::cpu::embedding_gradient_);
}
