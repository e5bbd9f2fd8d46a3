// Driver of cross_entropy: checks, memory and threads. The arithmetic is in cross_entropy_rows.cpp.

#include "cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "rows.h"

namespace megapre::cpu {
namespace {

// Everything is checked before anything is written: an in-place op must not fail half way.
void check_rows(
    const char* op, const at::Tensor& logits, const at::Tensor& labels, int64_t ignore_index, double label_smoothing,
    int64_t vocab) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0), op, ": logits ", logits.sizes(),
      " and labels ", labels.sizes(), "; shapes [tokens, columns] and [tokens] are needed");
  TORCH_CHECK_TYPE(
      is_supported(logits.scalar_type()), op, ": dtype ", logits.scalar_type(),
      "; supported are fp32, bf16, fp16, fp64");
  TORCH_CHECK_TYPE(labels.scalar_type() == c10::kLong, op, ": labels are ", labels.scalar_type(), ", not int64");
  TORCH_CHECK_VALUE(
      label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing ", label_smoothing, " lies outside [0, 1]");
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < labels.size(0); ++row) {
    TORCH_CHECK_VALUE(
        label[row] == ignore_index || (label[row] >= 0 && label[row] < vocab), op, ": label ", label[row], " of row ",
        row, " lies outside [0, ", vocab, ") and is not ignore_index ", ignore_index);
  }
}

void check(
    const char* op, const at::Tensor& logits, const at::Tensor& labels, int64_t ignore_index, double label_smoothing,
    int64_t vocab) {
  TORCH_CHECK_VALUE(
      logits.dim() != 2 || (vocab >= 1 && vocab <= logits.size(1)), op, ": vocab ", vocab, " lies outside [1, ",
      logits.dim() == 2 ? logits.size(1) : 0, "], the columns of the logits");
  check_rows(op, logits, labels, ignore_index, label_smoothing, vocab);
}

// How many columns of a shard that begins at `vocab_start` exist: of the last shards some, or none.
int64_t columns_of_shard(const char* op, const at::Tensor& logits, int64_t vocab_start, int64_t vocab) {
  TORCH_CHECK_VALUE(
      vocab_start >= 0 && vocab >= 1, op, ": a shard from column ", vocab_start, " on of ", vocab,
      " columns; vocab_start >= 0 and vocab >= 1 are needed");
  return std::clamp<int64_t>(vocab - vocab_start, 0, logits.size(1));
}

at::Tensor per_row(const at::Tensor& logits) {
  return at::empty({logits.size(0)}, logits.options().dtype(acc_dtype(logits.scalar_type())));
}

at::Tensor checked_per_row(const at::Tensor& t, const at::Tensor& logits, const char* name) {
  const c10::ScalarType acc = acc_dtype(logits.scalar_type());
  TORCH_CHECK_VALUE(
      t.dim() == 1 && t.size(0) == logits.size(0) && t.scalar_type() == acc, "cross_entropy: ", name, " is ",
      t.scalar_type(), " ", t.sizes(), "; one ", acc, " per row of logits ", logits.sizes(), " is needed");
  return t.contiguous();
}

// Whole rows of logits; what is written, and what a shard is, the caller adds.
CrossEntropyRows describe(
    const Rows& rows, const at::Tensor& logits, const at::Tensor& labels, int64_t vocab, int64_t ignore_index,
    double label_smoothing, double z_loss) {
  return {
      .dtype = logits.scalar_type(),
      .vocab = vocab,
      .first = 0,
      .columns = vocab,
      .width = rows.width,
      .logits = rows.data(),
      .stride = rows.stride,
      .labels = labels.const_data_ptr<int64_t>(),
      .ignore_index = ignore_index,
      .label_smoothing = label_smoothing,
      .z_loss = z_loss,
      .losses = nullptr,
      .lse = nullptr,
      .stats = nullptr,
      .dlosses = nullptr,
      .gradient = nullptr,
      .gradient_stride = 0,
  };
}

std::tuple<at::Tensor, at::Tensor> cross_entropy(
    const at::Tensor& logits, const at::Tensor& labels_in, int64_t ignore_index, double label_smoothing, double z_loss,
    int64_t vocab) {
  const at::Tensor labels = labels_in.contiguous();
  check("cross_entropy", logits, labels, ignore_index, label_smoothing, vocab);
  const Rows rows(logits);
  at::Tensor losses = per_row(logits), lse = per_row(logits);
  CrossEntropyRows op = describe(rows, logits, labels, vocab, ignore_index, label_smoothing, z_loss);
  op.losses = losses.data_ptr();
  op.lse = lse.data_ptr();
  const CrossEntropyKernels& kernels = MEGAPRE_CHOOSE(cross_entropy_kernels);
  at::parallel_for(0, rows.count, grain(vocab), [&](int64_t begin, int64_t end) { kernels.forward(op, begin, end); });
  return {losses, lse};
}

at::Tensor cross_entropy_backward(
    const at::Tensor& dlosses_in, const at::Tensor& logits, const at::Tensor& labels_in, const at::Tensor& lse_in,
    int64_t ignore_index, double label_smoothing, double z_loss, int64_t vocab) {
  const at::Tensor labels = labels_in.contiguous();
  check("cross_entropy_backward", logits, labels, ignore_index, label_smoothing, vocab);
  const at::Tensor dlosses = checked_per_row(dlosses_in, logits, "dlosses");
  const at::Tensor lse = checked_per_row(lse_in, logits, "lse");
  const Rows rows(logits);
  at::Tensor gradient = at::empty(logits.sizes(), logits.options());
  CrossEntropyRows op = describe(rows, logits, labels, vocab, ignore_index, label_smoothing, z_loss);
  op.lse = lse.data_ptr();
  op.dlosses = dlosses.data_ptr();
  op.gradient = gradient.data_ptr();
  op.gradient_stride = rows.width;
  const CrossEntropyKernels& kernels = MEGAPRE_CHOOSE(cross_entropy_kernels);
  at::parallel_for(0, rows.count, grain(vocab), [&](int64_t begin, int64_t end) { kernels.backward(op, begin, end); });
  return gradient;
}

at::Tensor cross_entropy_(
    at::Tensor& logits, const at::Tensor& labels_in, const std::optional<at::Tensor>& dlosses_in, int64_t ignore_index,
    double label_smoothing, double z_loss, int64_t vocab) {
  const at::Tensor labels = labels_in.contiguous();
  check("cross_entropy_", logits, labels, ignore_index, label_smoothing, vocab);
  check_writable("cross_entropy_", logits, "logits");
  at::Tensor dlosses;
  if (dlosses_in.has_value()) {
    dlosses = checked_per_row(*dlosses_in, logits, "dlosses");
  }
  raise_version(logits);
  const int64_t rows = logits.size(0);
  at::Tensor losses = per_row(logits);
  CrossEntropyRows op = describe(Rows(logits), logits, labels, vocab, ignore_index, label_smoothing, z_loss);
  op.losses = losses.data_ptr();
  op.dlosses = dlosses.defined() ? dlosses.data_ptr() : nullptr;
  op.gradient = logits.data_ptr();
  op.gradient_stride = op.stride;
  at::Tensor scratch = at::empty({at::get_num_threads(), scratch_size(vocab)}, losses.options());
  const CrossEntropyKernels& kernels = MEGAPRE_CHOOSE(cross_entropy_kernels);
  at::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    const int64_t offset = at::get_thread_num() * scratch_size(vocab) * scratch.element_size();
    kernels.both(op, begin, end, static_cast<char*>(scratch.data_ptr()) + offset);
  });
  return losses;
}

at::Tensor cross_entropy_local(
    const at::Tensor& logits, const at::Tensor& labels_in, int64_t vocab_start, int64_t vocab, int64_t ignore_index,
    bool label_smoothing) {
  const char* name = "cross_entropy_local";
  const at::Tensor labels = labels_in.contiguous();
  check_rows(name, logits, labels, ignore_index, /*label_smoothing=*/0, vocab);
  const int64_t columns = columns_of_shard(name, logits, vocab_start, vocab);
  const Rows rows(logits);
  at::Tensor stats = at::empty(
      {rows.count, label_smoothing ? 4 : 3}, logits.options().dtype(acc_dtype(logits.scalar_type())));
  CrossEntropyRows op =
      describe(rows, logits, labels, vocab, ignore_index, label_smoothing ? 1.0 : 0.0, /*z_loss=*/0);
  op.first = vocab_start;
  op.columns = columns;
  op.stats = stats.data_ptr();
  const CrossEntropyKernels& kernels = MEGAPRE_CHOOSE(cross_entropy_kernels);
  at::parallel_for(0, rows.count, grain(columns), [&](int64_t begin, int64_t end) { kernels.local(op, begin, end); });
  return stats;
}

void cross_entropy_local_backward_(
    at::Tensor& logits, const at::Tensor& labels_in, const at::Tensor& lse_in, const std::optional<at::Tensor>& dlosses_in,
    int64_t vocab_start, int64_t vocab, int64_t ignore_index, double label_smoothing, double z_loss) {
  const char* name = "cross_entropy_local_backward_";
  const at::Tensor labels = labels_in.contiguous();
  check_rows(name, logits, labels, ignore_index, label_smoothing, vocab);
  const int64_t columns = columns_of_shard(name, logits, vocab_start, vocab);
  check_writable(name, logits, "logits");
  const at::Tensor lse = checked_per_row(lse_in, logits, "lse");
  at::Tensor dlosses;
  if (dlosses_in.has_value()) {
    dlosses = checked_per_row(*dlosses_in, logits, "dlosses");
  }
  raise_version(logits);
  CrossEntropyRows op = describe(Rows(logits), logits, labels, vocab, ignore_index, label_smoothing, z_loss);
  op.first = vocab_start;
  op.columns = columns;
  op.lse = lse.data_ptr();
  op.dlosses = dlosses.defined() ? dlosses.data_ptr() : nullptr;
  op.gradient = logits.data_ptr();
  op.gradient_stride = op.stride;
  const CrossEntropyKernels& kernels = MEGAPRE_CHOOSE(cross_entropy_kernels);
  at::parallel_for(0, logits.size(0), grain(op.width), [&](int64_t begin, int64_t end) {
    kernels.backward(op, begin, end);
  });
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("cross_entropy", &megapre::cpu::cross_entropy);
  m.impl("cross_entropy_backward", &megapre::cpu::cross_entropy_backward);
  m.impl("cross_entropy_", &megapre::cpu::cross_entropy_);
  m.impl("cross_entropy_local", &megapre::cpu::cross_entropy_local);
  m.impl("cross_entropy_local_backward_", &megapre::cpu::cross_entropy_local_backward_);
}
