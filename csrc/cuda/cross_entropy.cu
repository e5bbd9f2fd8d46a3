// Driver of cross_entropy and of its halves for shards of the vocabulary: checks, memory, policy. The kernels are in
// cross_entropy_rows.h.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "cross_entropy_rows.h"
#include "launch.h"
#include "ops.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

// What an op is told beside its tensors. A shard's columns begin at `first`; `columns` of them exist.
struct Terms {
  const char* op;
  int64_t ignore_index;
  double smoothing, z_loss;
  int64_t vocab, first, columns;
};

// Labels are not looked at: that would stop the host.
void check_rows(const Terms& terms, const Tensor& logits, const Tensor& labels) {
  check(
      logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0), terms.op, ": logits ",
      describe(logits), " and labels ", describe(labels), "; shapes [tokens, columns] and [tokens] are needed");
  check(
      labels.scalar_type() == ScalarType::Long && labels.device() == logits.device(), terms.op, ": labels are ",
      describe(labels), "; int64 on the device of the logits is needed");
  check(
      terms.smoothing >= 0 && terms.smoothing <= 1, terms.op, ": label_smoothing ", terms.smoothing,
      " lies outside [0, 1]");
  check(
      logits.size(1) <= std::numeric_limits<int>::max() / 2, terms.op, ": logits ", describe(logits),
      "; rows of up to 2^30 columns are taken");
}

Terms whole_rows(
    const char* op, const Tensor& logits, const Tensor& labels, int64_t ignore_index, double smoothing, double z_loss,
    int64_t vocab) {
  const Terms terms{op, ignore_index, smoothing, z_loss, vocab, 0, vocab};
  check_rows(terms, logits, labels);
  check(
      vocab >= 1 && vocab <= logits.size(1), op, ": vocab ", vocab, " lies outside [1, ", logits.size(1),
      "], the columns of the logits");
  return terms;
}

Terms shard(
    const char* op, const Tensor& logits, const Tensor& labels, int64_t first, int64_t vocab, int64_t ignore_index,
    double smoothing, double z_loss) {
  Terms terms{op, ignore_index, smoothing, z_loss, vocab, first, 0};
  check_rows(terms, logits, labels);
  check(
      first >= 0 && vocab >= 1, op, ": a shard from column ", first, " on of ", vocab,
      " columns; vocab_start >= 0 and vocab >= 1 are needed");
  terms.columns = std::clamp<int64_t>(vocab - first, 0, logits.size(1));
  return terms;
}

Tensor per_row(const Tensor& logits) {
  return empty(logits, {logits.size(0)}, ScalarType::Float);
}

Tensor checked_per_row(const Terms& terms, const Tensor& t, const Tensor& logits, const char* name) {
  check(
      t.dim() == 1 && t.size(0) == logits.size(0) && t.scalar_type() == ScalarType::Float &&
          t.device() == logits.device(),
      terms.op, ": ", name, " is ", describe(t), "; one Float per row of logits ", describe(logits), " is needed");
  return torch::stable::contiguous(t);
}

OptionalTensor checked_per_row(const Terms& terms, const OptionalTensor& t, const Tensor& logits, const char* name) {
  return t.has_value() ? OptionalTensor(checked_per_row(terms, *t, logits, name)) : std::nullopt;
}

float* floats(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

const float* floats(const OptionalTensor& t) {
  return t.has_value() ? floats(*t) : nullptr;
}

// What is read; what is written the caller adds.
template <typename T>
CrossEntropy<T> arguments(const Terms& terms, const Rows& rows, const Tensor& labels) {
  CrossEntropy<T> op{};
  op.vocab = terms.vocab;
  op.first = terms.first;
  op.columns = static_cast<int>(terms.columns);
  op.width = static_cast<int>(rows.width);
  op.logits = static_cast<const T*>(rows.holder.data_ptr());
  op.stride = rows.width > 0 ? rows.stride : 0;
  op.labels = static_cast<const int64_t*>(labels.data_ptr());
  op.ignore_index = terms.ignore_index;
  op.smoothing = static_cast<float>(terms.smoothing);
  op.z_loss = static_cast<float>(terms.z_loss);
  return op;
}

// Threads for `columns`, when each is to have up to `vectors` of 16 bytes.
template <typename T>
unsigned threads_for(int64_t columns, int vectors) {
  const int64_t per_thread = int64_t{vectors} * kWide<T>;
  return static_cast<unsigned>(std::clamp<int64_t>((columns + per_thread - 1) / per_thread, 1, 512) + 31) / 32 * 32;
}

// Blocks that share a row, a cluster, where there are fewer rows than two a multiprocessor: as many as keep them all busy,
// as long as every thread has more than one batch of four vectors to divide.
template <typename T>
unsigned blocks_a_row(int64_t columns, int64_t rows) {
  constexpr int64_t kBatch = 512 * 4 * kWide<T>;  // columns of a block
  unsigned blocks = 1;
  if (capability() >= 90) {
    while (blocks < 8 && columns > kBatch * blocks && rows * blocks < 2 * multiprocessors()) {
      blocks *= 2;
    }
  }
  return blocks;
}

template <typename T>
void launch_statistics(const Terms& terms, const CrossEntropy<T>& op, int64_t rows, cudaStream_t stream) {
  const unsigned blocks = blocks_a_row<T>(op.columns, rows);
  const Launch how{
      .op = terms.op,
      .grid = grid_of(terms.op, rows * blocks),
      .block = dim3(threads_for<T>((op.columns + blocks - 1) / blocks, 4)),
      .cluster = blocks,
      .stream = stream};
  launch(how, cross_entropy_statistics_kernel<T>, op);
}

template <typename T>
void launch_in_place(const Terms& terms, const CrossEntropy<T>& op, int64_t rows, cudaStream_t stream) {
  constexpr int64_t kHeld = 512 * 8 * kWide<T>;  // columns of a block
  unsigned blocks = 1;
  while (blocks <= 8 && op.columns > kHeld * blocks) {
    blocks *= 2;
  }
  const bool held = blocks == 1 || (blocks <= 8 && capability() >= 90);
  blocks = std::max(blocks, blocks_a_row<T>(op.columns, rows));
  const Launch how{
      .op = terms.op,
      .grid = grid_of(terms.op, held ? rows * blocks : rows),
      .block = dim3(held ? threads_for<T>((op.columns + blocks - 1) / blocks, 8) : 512),
      .cluster = held ? blocks : 1,
      .stream = stream};
  launch(how, held ? cross_entropy_held_kernel<T> : cross_entropy_twice_kernel<T>, op);
}

template <typename T, int N>
void launch_gradient_as(const Terms& terms, const CrossEntropy<T>& op, int64_t rows, cudaStream_t stream) {
  const unsigned threads = threads_for<T>(op.width, 4);
  const int64_t per_block = int64_t{threads} * N * kGradientVectors<N>;
  const int64_t blocks = (op.width + per_block - 1) / per_block;
  const Launch how{
      .op = terms.op, .grid = grid_of(terms.op, rows * blocks), .block = dim3(threads), .stream = stream};
  launch(how, cross_entropy_gradient_kernel<T, N>, op, static_cast<int>(blocks));
}

// A row and its gradient lie alike if each begins as far behind a multiple of 16 bytes as the other.
template <typename T>
void launch_gradient(const Terms& terms, const CrossEntropy<T>& op, int64_t rows, cudaStream_t stream) {
  const auto behind = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const bool alike =
      behind(op.logits) == behind(op.gradient) && (op.stride - op.gradient_stride) % kWide<T> == 0;
  if (alike) {
    launch_gradient_as<T, kWide<T>>(terms, op, rows, stream);
  } else {
    launch_gradient_as<T, 1>(terms, op, rows, stream);
  }
}

std::tuple<Tensor, Tensor> cross_entropy(
    Tensor logits, Tensor labels_in, int64_t ignore_index, double smoothing, double z_loss, int64_t vocab) {
  const Terms terms = whole_rows("cross_entropy", logits, labels_in, ignore_index, smoothing, z_loss, vocab);
  const DeviceGuard guard(logits);
  const Rows rows(logits);
  const Tensor labels = torch::stable::contiguous(labels_in);
  Tensor losses = per_row(logits), lse = per_row(logits);
  dispatch(terms.op, logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (rows.count > 0) {
      CrossEntropy<T> op = arguments<T>(terms, rows, labels);
      op.losses = floats(losses);
      op.lse = floats(lse);
      launch_statistics(terms, op, rows.count, current_stream(logits));
    }
  });
  return {losses, lse};
}

Tensor cross_entropy_backward(
    Tensor dlosses_in, Tensor logits, Tensor labels_in, Tensor lse_in, int64_t ignore_index, double smoothing,
    double z_loss, int64_t vocab) {
  const Terms terms = whole_rows("cross_entropy_backward", logits, labels_in, ignore_index, smoothing, z_loss, vocab);
  const DeviceGuard guard(logits);
  const Rows rows(logits);
  const Tensor labels = torch::stable::contiguous(labels_in);
  const Tensor dlosses = checked_per_row(terms, dlosses_in, logits, "dlosses");
  const Tensor lse = checked_per_row(terms, lse_in, logits, "lse");
  Tensor gradient = empty(logits, sizes_of(logits), logits.scalar_type());
  dispatch(terms.op, logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (rows.count > 0) {
      CrossEntropy<T> op = arguments<T>(terms, rows, labels);
      op.lse = floats(lse);
      op.dlosses = floats(dlosses);
      op.gradient = static_cast<T*>(gradient.data_ptr());
      op.gradient_stride = rows.width;
      launch_gradient(terms, op, rows.count, current_stream(logits));
    }
  });
  return gradient;
}

Tensor cross_entropy_in_place(
    Tensor logits, Tensor labels_in, OptionalTensor dlosses_in, int64_t ignore_index, double smoothing, double z_loss,
    int64_t vocab) {
  const Terms terms = whole_rows("cross_entropy_", logits, labels_in, ignore_index, smoothing, z_loss, vocab);
  check_writable(terms.op, logits, "logits");
  const DeviceGuard guard(logits);
  const Tensor labels = torch::stable::contiguous(labels_in);
  const OptionalTensor dlosses = checked_per_row(terms, dlosses_in, logits, "dlosses");
  Tensor losses = per_row(logits);
  dispatch(terms.op, logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    raise_version(logits);
    const Rows rows(logits);
    if (rows.count > 0) {
      CrossEntropy<T> op = arguments<T>(terms, rows, labels);
      op.losses = floats(losses);
      op.dlosses = floats(dlosses);
      op.gradient = static_cast<T*>(logits.data_ptr());
      op.gradient_stride = rows.stride;
      launch_in_place(terms, op, rows.count, current_stream(logits));
    }
  });
  return losses;
}

Tensor cross_entropy_local(
    Tensor logits, Tensor labels_in, int64_t vocab_start, int64_t vocab, int64_t ignore_index, bool label_smoothing) {
  const Terms terms = shard(
      "cross_entropy_local", logits, labels_in, vocab_start, vocab, ignore_index, label_smoothing ? 1 : 0, /*z_loss=*/0);
  const DeviceGuard guard(logits);
  const Rows rows(logits);
  const Tensor labels = torch::stable::contiguous(labels_in);
  Tensor stats = empty(logits, {rows.count, label_smoothing ? 4 : 3}, ScalarType::Float);
  dispatch(terms.op, logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (rows.count > 0) {
      CrossEntropy<T> op = arguments<T>(terms, rows, labels);
      op.stats = floats(stats);
      launch_statistics(terms, op, rows.count, current_stream(logits));
    }
  });
  return stats;
}

void cross_entropy_local_backward(
    Tensor logits, Tensor labels_in, Tensor lse_in, OptionalTensor dlosses_in, int64_t vocab_start, int64_t vocab,
    int64_t ignore_index, double smoothing, double z_loss) {
  const Terms terms = shard(
      "cross_entropy_local_backward_", logits, labels_in, vocab_start, vocab, ignore_index, smoothing, z_loss);
  check_writable(terms.op, logits, "logits");
  const DeviceGuard guard(logits);
  const Tensor labels = torch::stable::contiguous(labels_in);
  const Tensor lse = checked_per_row(terms, lse_in, logits, "lse");
  const OptionalTensor dlosses = checked_per_row(terms, dlosses_in, logits, "dlosses");
  dispatch(terms.op, logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    raise_version(logits);
    const Rows rows(logits);
    if (rows.count > 0 && rows.width > 0) {
      CrossEntropy<T> op = arguments<T>(terms, rows, labels);
      op.lse = floats(lse);
      op.dlosses = floats(dlosses);
      op.gradient = static_cast<T*>(logits.data_ptr());
      op.gradient_stride = rows.stride;
      launch_gradient(terms, op, rows.count, current_stream(logits));
    }
  });
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("cross_entropy", TORCH_BOX(&megapre::cuda::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&megapre::cuda::cross_entropy_backward));
  m.impl("cross_entropy_", TORCH_BOX(&megapre::cuda::cross_entropy_in_place));
  m.impl("cross_entropy_local", TORCH_BOX(&megapre::cuda::cross_entropy_local));
  m.impl("cross_entropy_local_backward_", TORCH_BOX(&megapre::cuda::cross_entropy_local_backward));
}
