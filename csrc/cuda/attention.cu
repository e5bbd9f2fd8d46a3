// Driver of attention: checks, memory, and which kernels a call gets. Masks: attention.h; kernels: attention_forward.cu
// and attention_backward.cu.
//
// Not yet run on a GPU; proven by tests/cuda/.

#include "attention.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "attention_documents.h"
#include "ops.h"

namespace megapre::cuda {
namespace {

void check_inputs(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<int64_t>& window,
    double scale) {
  check(
      q.dim() == 4 && k.dim() == 4 && sizes_of(k) == sizes_of(v), op,
      ": need q [B, Sq, N, D] and k, v [B, Sk, K, D]; they are q ", describe(q), ", k ", describe(k), ", v ",
      describe(v));
  check(
      q.size(0) == k.size(0) && q.size(3) == k.size(3), op, ": batch and head dim must agree; they are q ",
      describe(q), ", k ", describe(k));
  check(
      k.size(2) > 0 && q.size(2) % k.size(2) == 0, op, ": ", q.size(2), " query heads are no multiple of ", k.size(2),
      " key heads");
  check(
      q.size(1) <= k.size(1), op, ": ", q.size(1), " queries but only ", k.size(1), " keys; Sq <= Sk is needed");
  const ScalarType dtype = q.scalar_type();
  check(
      (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && k.scalar_type() == dtype &&
          v.scalar_type() == dtype && k.device() == q.device() && v.device() == q.device(),
      op, ": q, k and v are ", describe(q), ", ", describe(k), " and ", describe(v),
      "; the CUDA kernels take bf16 or fp16 for all three, on one device; choose `triton` or `sdpa`");
  check(
      q.size(3) >= 8 && q.size(3) <= kLargestDim && q.size(3) % 8 == 0, op, ": head dim ", q.size(3),
      "; the CUDA kernels take multiples of 8 up to ", kLargestDim, "; choose `triton`, or `sdpa`, which takes any");
  check(
      !window.has_value() || *window >= 1, op, ": window is ", window.value_or(0),
      "; a query sees at least itself, so window >= 1");
  check(scale > 0, op, ": scale is ", scale, "; the CUDA kernels need scale > 0; choose `sdpa`, which takes any");
  // Positions are ints, and so are sums of two of them; blocks are counted by an int, by tiles of at least 64 rows.
  const int64_t longest = std::numeric_limits<int>::max() / 4;
  check(
      k.size(1) < longest && q.size(0) * q.size(2) * (k.size(1) / 64 + 1) < longest, op, ": q ", describe(q), " and k ",
      describe(k), " have more tiles than one launch can count (", longest, ")");
}

void check_documents(const char* op, const OptionalTensor& cu_seqlens, const Tensor& q, const Tensor& k) {
  if (cu_seqlens.has_value()) {
    check(
        q.size(1) == k.size(1), op, ": documents (cu_seqlens) need Sq = Sk; they are ", q.size(1), " and ", k.size(1));
    const ScalarType dtype = cu_seqlens->scalar_type();
    check(
        cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && (dtype == ScalarType::Int || dtype == ScalarType::Long) &&
            cu_seqlens->device() == q.device(),
        op, ": cu_seqlens is ", describe(*cu_seqlens), "; one row of at least two int32 on the device of q is needed");
  }
}

// Rows of D neighbours that start at multiples of 16 bytes, any multiple of 8 elements up to kLargestStride apart; not one
// row for many, for the TMA unit takes no step of 0.
bool has_aligned_rows(const Tensor& t) {
  bool aligned = is_aligned(t.data_ptr()) && t.stride(3) == 1 && t.stride(1) <= kLargestStride;
  for (int64_t dim = 0; dim < 3; ++dim) {
    aligned = aligned && ((t.stride(dim) % 8 == 0 && t.stride(dim) > 0) || t.size(dim) == 1);
  }
  return aligned;
}

// Itself, or a copy where the kernels cannot read it as it lies.
Tensor with_aligned_rows(const Tensor& t) {
  if (has_aligned_rows(t)) {
    return t;
  }
  Tensor copy = empty(t, sizes_of(t), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

Heads heads_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Without documents `bounds` is empty.
Attention described(
    const Tensor& q, const Tensor& k, const Tensor& v, bool causal, const OptionalTensor& bounds,
    const std::optional<int64_t>& window, double scale) {
  const int64_t keys = k.size(1);
  Attention op{};
  op.is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  op.batch = static_cast<int>(q.size(0));
  op.queries = static_cast<int>(q.size(1));
  op.keys = static_cast<int>(keys);
  op.heads = static_cast<int>(q.size(2));
  op.key_heads = static_cast<int>(k.size(2));
  op.group = op.heads / op.key_heads;
  op.dim = static_cast<int>(q.size(3));
  op.causal = causal;
  op.window = static_cast<int>(std::min(window.value_or(keys), keys) % keys);  // all keys: no window
  op.scale = static_cast<float>(scale);
  op.first = bounds.has_value() ? static_cast<const int*>(bounds->data_ptr()) : nullptr;
  op.end = bounds.has_value() ? op.first + q.size(0) * keys : nullptr;
  op.q = heads_of(q);
  op.k = heads_of(k);
  op.v = heads_of(v);
  return op;
}

OptionalTensor bounds_of(const OptionalTensor& cu_seqlens, const Tensor& q, cudaStream_t stream) {
  return cu_seqlens.has_value() ? OptionalTensor(document_bounds(*cu_seqlens, q.size(0), q.size(1), stream))
                                : std::nullopt;
}

// The kernels of one generation of devices.
struct AttentionKernels {
  void (*forward)(const Attention& op, cudaStream_t stream);
  void (*backward)(const Attention& op, const float* dlse, cudaStream_t stream);
};

// Those that serve a call best: `capability` is 80 for sm_80.
AttentionKernels choose_attention(const char* name, int capability, const Attention& op) {
  check(capability >= 80, name, ": this device is sm_", capability, "; the CUDA kernels need sm_80 or later");
  const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / 1024;
  check(
      shared >= (op.dim <= 96 ? 98 : op.dim <= 128 ? 130 : 161), name, ": head dim ", op.dim,
      " needs more shared memory than a block of sm_", capability, " has (", shared,
      " KiB; 98 are needed up to 96, 130 up to 128, 161 above); choose `triton` or `sdpa`");
  AttentionKernels chosen{attention_forward_sm80, attention_backward_sm80};
  if (capability == 90 && op.dim > 32) {  // code for sm_90a runs nowhere else, and fills smaller heads up to 64
    chosen = {attention_forward_sm90, attention_backward_sm90};
  }
  return chosen;
}

std::tuple<Tensor, Tensor> attention(
    Tensor q_in, Tensor k_in, Tensor v_in, bool causal, OptionalTensor cu_seqlens, std::optional<int64_t> window,
    double scale) {
  const char* const name = "attention";
  check_inputs(name, q_in, k_in, v_in, window, scale);
  check_documents(name, cu_seqlens, q_in, k_in);
  const DeviceGuard guard(q_in);
  Tensor o = empty(q_in, sizes_of(q_in), q_in.scalar_type());
  Tensor lse = empty(q_in, {q_in.size(0), q_in.size(2), q_in.size(1)}, ScalarType::Float);
  if (o.numel() == 0) {
    return {o, lse};
  }
  const cudaStream_t stream = current_stream(q_in);
  const Tensor q = with_aligned_rows(q_in), k = with_aligned_rows(k_in), v = with_aligned_rows(v_in);
  const OptionalTensor bounds = bounds_of(cu_seqlens, q, stream);
  Attention op = described(q, k, v, causal, bounds, window, scale);
  op.o = heads_of(o);
  op.lse = static_cast<float*>(lse.data_ptr());
  choose_attention(name, capability(), op).forward(op, stream);
  return {o, lse};
}

// A gradient is written where it lies, or else beside and copied there.
struct Gradient {
  Tensor target, written;

  Gradient(const char* op, const Tensor& t, const Tensor& of, const char* name, const char* of_name)
      : target(t), written(t) {
    check_like(op, t, of, name, of_name);
    check_writable(op, t, name);
    if (!has_aligned_rows(t)) {
      written = empty(t, sizes_of(t), t.scalar_type());
    }
  }

  void finish() {
    if (written.data_ptr() != target.data_ptr()) {
      torch::stable::copy_(target, written);
    }
  }
};

void attention_backward_(
    Tensor dq_in, Tensor dk_in, Tensor dv_in, Tensor d_o_in, OptionalTensor dlse_in, Tensor q_in, Tensor k_in,
    Tensor v_in, Tensor o_in, Tensor lse_in, bool causal, OptionalTensor cu_seqlens, std::optional<int64_t> window,
    double scale) {
  const char* const name = "attention_backward";
  check_inputs(name, q_in, k_in, v_in, window, scale);
  check_documents(name, cu_seqlens, q_in, k_in);
  check_like(name, d_o_in, q_in, "do", "q");
  check_like(name, o_in, q_in, "o", "q");
  const std::vector<int64_t> lse_sizes{q_in.size(0), q_in.size(2), q_in.size(1)};
  check(
      sizes_of(lse_in) == lse_sizes && lse_in.scalar_type() == ScalarType::Float, name, ": lse is ", describe(lse_in),
      "; Float [", lse_sizes[0], ", ", lse_sizes[1], ", ", lse_sizes[2], "] is needed");
  if (dlse_in.has_value()) {
    check_like(name, *dlse_in, lse_in, "dlse", "lse");
  }
  const DeviceGuard guard(q_in);
  Gradient dq(name, dq_in, q_in, "dq", "q"), dk(name, dk_in, k_in, "dk", "k"), dv(name, dv_in, v_in, "dv", "v");
  raise_version(dq_in);
  raise_version(dk_in);
  raise_version(dv_in);
  if (q_in.numel() == 0) {
    torch::stable::zero_(dk_in);
    torch::stable::zero_(dv_in);
    return;
  }
  const cudaStream_t stream = current_stream(q_in);
  const Tensor q = with_aligned_rows(q_in), k = with_aligned_rows(k_in), v = with_aligned_rows(v_in);
  const Tensor d_o = with_aligned_rows(d_o_in), o = with_aligned_rows(o_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  const OptionalTensor dlse = dlse_in.has_value() ? OptionalTensor(torch::stable::contiguous(*dlse_in)) : std::nullopt;
  const OptionalTensor bounds = bounds_of(cu_seqlens, q, stream);
  Attention op = described(q, k, v, causal, bounds, window, scale);
  op.o = heads_of(o);
  op.lse = static_cast<float*>(lse.data_ptr());
  op.d_o = heads_of(d_o);
  op.dq = heads_of(dq.written);
  op.dk = heads_of(dk.written);
  op.dv = heads_of(dv.written);
  op.padded_queries = (op.queries + kQueryUnit - 1) / kQueryUnit * kQueryUnit;
  const Tensor statistics = empty(q, {q.size(0), q.size(2), op.padded_queries, 2}, ScalarType::Float);
  op.statistics = static_cast<float*>(statistics.data_ptr());
  choose_attention(name, capability(), op)
      .backward(op, dlse.has_value() ? static_cast<const float*>(dlse->data_ptr()) : nullptr, stream);
  dq.finish();
  dk.finish();
  dv.finish();
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("attention", TORCH_BOX(&megapre::cuda::attention));
  m.impl("attention_backward_", TORCH_BOX(&megapre::cuda::attention_backward_));
}
