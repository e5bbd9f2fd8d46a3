// Driver of the embedding's gradient: checks, the order of the tokens, launches. The kernels are in embedding_runs.h.
// The embedding itself is torch's.
//
// The table may be a shard: rows vocab_start, vocab_start + 1, ... of a vocabulary whose other rows lie elsewhere. Ids of
// other rows, and those outside of the vocabulary, at which the host does not look, give nothing.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "embedding_runs.h"
#include "launch.h"
#include "ops.h"
#include "sort.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

constexpr const char* kOp = "embedding_gradient";

void check_shard(const Tensor& total, int64_t vocab_start, std::optional<int64_t> vocab_in) {
  const int64_t rows = total.size(0), vocab = vocab_in.value_or(vocab_start + rows);
  check(
      vocab_start >= 0 && vocab >= 0, kOp, ": a shard of ", rows, " rows from row ", vocab_start, " on of ", vocab,
      "; neither can be negative");
  check(
      rows < std::numeric_limits<int>::max() && total.size(1) <= std::numeric_limits<int>::max() / 2, kOp,
      ": the gradient is ", describe(total), "; fewer than 2^31 rows of up to 2^30 columns are taken");
}

void check_tensors(const Tensor& total, const Tensor& dy, const Tensor& ids) {
  check(
      dy.dim() == 2 && ids.dim() == 1 && dy.size(0) == ids.size(0) && total.dim() == 2 && total.size(1) == dy.size(1),
      kOp, ": dy is ", describe(dy), ", ids ", describe(ids), " and the gradient ", describe(total),
      "; [tokens, width], [tokens] and [rows, width] are needed");
  check(
      total.scalar_type() == ScalarType::Float || total.scalar_type() == dy.scalar_type(), kOp, ": the gradient is ",
      describe(total), "; it can be Float or have the dtype of dy ", describe(dy));
  check(ids.scalar_type() == ScalarType::Long, kOp, ": ids are ", describe(ids), "; int64 is needed");
  check(
      total.device() == dy.device() && ids.device() == dy.device(), kOp,
      ": dy, ids and the gradient must be on one device");
}

// The sorted keys of the tokens and their order.
std::pair<Tensor, Tensor> sorted(const Tensor& ids, int64_t vocab_start, int64_t rows, cudaStream_t stream) {
  const int64_t tokens = ids.size(0);
  Tensor keys = empty(ids, {tokens}, ScalarType::Int);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((tokens + 255) / 256, 4096));
  launch(
      {.op = kOp, .grid = dim3(blocks), .block = dim3(256), .stream = stream}, embedding_keys_kernel,
      static_cast<const int64_t*>(ids.data_ptr()), tokens, vocab_start, static_cast<int>(rows),
      static_cast<int*>(keys.data_ptr()));
  return stable_sort(keys);
}

template <typename T, typename S, int N>
void launch_level_as(const Runs<T, S>& op, int64_t pieces, cudaStream_t stream) {
  const int64_t panels = (op.width + kPanelVectors * N - 1) / (kPanelVectors * N);
  const int64_t blocks = (pieces * panels + kRunWarps - 1) / kRunWarps;
  launch(
      {.op = kOp, .grid = grid_of(kOp, blocks), .block = dim3(32 * kRunWarps), .stream = stream},
      embedding_runs_kernel<T, S, N>, op, static_cast<int>(panels));
}

template <typename T, typename S>
void launch_level(const Runs<T, S>& op, int64_t pieces, cudaStream_t stream) {
  constexpr int N = 4;
  const auto whole = [&](const auto* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % (N * sizeof(*p)) == 0 && stride % N == 0;
  };
  if (op.width % N == 0 && whole(op.dy, op.dy_stride) && whole(op.total, op.total_stride)) {
    launch_level_as<T, S, N>(op, pieces, stream);
  } else {
    launch_level_as<T, S, 1>(op, pieces, stream);
  }
}

// Sums a list of runs, and then the list of what crosses the borders of its pieces.
template <typename T, typename S>
void sum_runs(Runs<T, S> op, const Tensor& like, cudaStream_t stream) {
  const int64_t pieces = (op.count + kPiece - 1) / kPiece;
  if (pieces == 1) {
    launch_level(op, pieces, stream);
    return;
  }
  Tensor keys = empty(like, {2 * pieces}, ScalarType::Int), order = empty(like, {2 * pieces}, ScalarType::Long);
  Tensor rows = empty(like, {2 * pieces, op.width}, ScalarType::Float);
  op.next_keys = static_cast<int*>(keys.data_ptr());
  op.next_order = static_cast<int64_t*>(order.data_ptr());
  op.next_dy = static_cast<float*>(rows.data_ptr());
  launch_level(op, pieces, stream);
  const Runs<float, S> next{
      .keys = op.next_keys,
      .order = op.next_order,
      .count = 2 * pieces,
      .rows = op.rows,
      .width = op.width,
      .dy = op.next_dy,
      .dy_stride = op.width,
      .total = op.total,
      .total_stride = op.total_stride,
      .accumulate = op.accumulate,
  };
  sum_runs(next, like, stream);
}

void embedding_gradient(
    Tensor total, Tensor dy, Tensor ids_in, bool accumulate, int64_t vocab_start, std::optional<int64_t> vocab) {
  check_tensors(total, dy, ids_in);
  check_shard(total, vocab_start, vocab);
  check_writable(kOp, total, "the gradient");
  const DeviceGuard guard(dy);
  dispatch(kOp, dy.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    raise_version(total);
    if (!accumulate) {
      torch::stable::zero_(total);
    }
    if (dy.numel() == 0 || total.numel() == 0) {
      return;
    }
    const cudaStream_t stream = current_stream(dy);
    const Tensor ids = torch::stable::contiguous(ids_in);
    const auto [keys, order] = sorted(ids, vocab_start, total.size(0), stream);
    const Rows rows(dy);
    const auto run = [&](auto of_total) {
      using S = typename decltype(of_total)::type;
      const Runs<T, S> op{
          .keys = static_cast<const int*>(keys.data_ptr()),
          .order = static_cast<const int64_t*>(order.data_ptr()),
          .count = ids.size(0),
          .rows = static_cast<int>(total.size(0)),
          .width = static_cast<int>(rows.width),
          .dy = static_cast<const T*>(rows.holder.data_ptr()),
          .dy_stride = rows.stride,
          .total = static_cast<S*>(total.data_ptr()),
          .total_stride = total.stride(0),
          .accumulate = accumulate,
      };
      sum_runs(op, dy, stream);
    };
    if (total.scalar_type() == ScalarType::Float) {
      run(Type<float>{});
    } else {
      run(Type<T>{});
    }
  });
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("embedding_gradient_", TORCH_BOX(&megapre::cuda::embedding_gradient));
}
