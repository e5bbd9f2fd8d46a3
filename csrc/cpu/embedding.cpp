// The embedding, which copies rows, and the driver of its gradient: checks, order and threads. The arithmetic of the
// gradient is in embedding_rows.cpp.
//
// The table may be a shard: rows vocab_start, vocab_start + 1, ... of a vocabulary whose other rows lie elsewhere.
// Tokens of other rows get zeros and have no gradient here.
//
// For the gradient the tokens are sorted by id, stably; a run of equal ids is one row, summed by one thread in order of
// the tokens. So the bits do not depend on the number of threads.

#include "embedding.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "rows.h"

namespace megapre::cpu {
namespace {

// Checks every id against the whole vocabulary; the `rows` of the shard are the last there are where vocab is null.
void check_ids(
    const char* op, const at::Tensor& ids, int64_t vocab_start, int64_t rows, std::optional<int64_t> vocab_in) {
  const int64_t vocab = vocab_in.value_or(vocab_start + rows);
  TORCH_CHECK_VALUE(
      vocab_start >= 0 && vocab >= 0, op, ": a shard of ", rows, " rows from row ", vocab_start, " on of ", vocab,
      "; neither can be negative");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < ids.numel(); ++t) {
    TORCH_CHECK_INDEX(
        id[t] >= 0 && id[t] < vocab, op, ": id ", id[t], " of token ", t, " lies outside [0, ", vocab, ")");
  }
}

at::Tensor embedding(
    const at::Tensor& ids_in, const at::Tensor& weight, int64_t vocab_start, std::optional<int64_t> vocab) {
  const char* op = "embedding";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": the table is ", weight.sizes(), "; [rows, width] is needed");
  TORCH_CHECK_TYPE(ids_in.scalar_type() == c10::kLong, op, ": ids are ", ids_in.scalar_type(), ", not int64");
  const at::Tensor ids = ids_in.contiguous();
  check_ids(op, ids, vocab_start, weight.size(0), vocab);
  c10::DimVector sizes(ids.sizes());
  sizes.push_back(weight.size(1));
  at::Tensor out = at::empty(sizes, weight.options());
  if (out.numel() == 0) {
    return out;
  }
  const Rows rows(weight);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t row_bytes = rows.width * weight.element_size(), stride = rows.stride * weight.element_size();
  const char* from = static_cast<const char*>(rows.data());
  char* to = static_cast<char*>(out.data_ptr());
  at::parallel_for(0, ids.numel(), grain(rows.width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = id[t] - vocab_start;
      if (row >= 0 && row < rows.count) {
        std::memcpy(to + t * row_bytes, from + row * stride, row_bytes);
      } else {
        std::memset(to + t * row_bytes, 0, row_bytes);
      }
    }
  });
  return out;
}

void embedding_gradient_(
    at::Tensor& total,
    const at::Tensor& dy,
    const at::Tensor& ids_in,
    bool accumulate,
    int64_t vocab_start,
    std::optional<int64_t> vocab) {
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
  check_writable(op, total, "the gradient");
  TORCH_CHECK_TYPE(ids_in.scalar_type() == c10::kLong, op, ": ids are ", ids_in.scalar_type(), ", not int64");
  const at::Tensor ids = ids_in.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t tokens = ids.size(0), width = dy.size(1);
  check_ids(op, ids, vocab_start, total.size(0), vocab);
  raise_version(total);
  if (!accumulate) {
    total.zero_();
  }
  std::vector<int64_t> order, begins;
  order.reserve(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (id[t] >= vocab_start && id[t] < vocab_start + total.size(0)) {
      order.push_back(t);
    }
  }
  const int64_t here = static_cast<int64_t>(order.size());
  if (here == 0 || width == 0) {
    return;
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
  for (int64_t t = 0; t < here; ++t) {
    if (t == 0 || id[order[t]] != id[order[t - 1]]) {
      begins.push_back(t);
    }
  }
  begins.push_back(here);
  const int64_t runs = static_cast<int64_t>(begins.size()) - 1;
  const Rows rows(dy);
  const int64_t row_bytes = total.stride(0) * total.element_size();
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
          .total = static_cast<char*>(total.data_ptr()) + (id[*first] - vocab_start) * row_bytes,
          .accumulate = accumulate,
      });
    }
  });
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("embedding", &megapre::cpu::embedding);
  m.impl("embedding_gradient_", &megapre::cpu::embedding_gradient_);
}
