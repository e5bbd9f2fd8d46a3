// Driver of rope, rope_ and rope_qkv_backward: checks, memory, policy. The kernel is in rope_rotate.h.
//
// Floor: bytes / copy rate; 8192 tokens of 32 + 8 heads of 128 in bf16 move 168 MB, 39 us on an H200.
// Not yet run on a GPU; proven by tests/cuda/.

#include <initializer_list>
#include <limits>
#include <tuple>

#include "launch.h"
#include "ops.h"
#include "rope_rotate.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

void check_heads(const Tensor& x, const Tensor& like, const char* name) {
  check(x.dim() == 4, "rope: ", name, " is ", describe(x), "; [batch, sequence, heads, head_dim] is needed");
  check(
      x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.size(3) == like.size(3) &&
          x.scalar_type() == like.scalar_type() && x.device() == like.device(),
      "rope: ", name, " is ", describe(x), " beside ", describe(like), "; they differ only in heads");
}

// Neighbours from an address that is a multiple of 16 bytes.
Tensor ready_table(const Tensor& table) {
  Tensor ready = torch::stable::contiguous(torch::stable::to(table, ScalarType::Float));
  return is_aligned(ready.data_ptr()) ? ready : torch::stable::clone(ready);
}

// Where the tokens of a batch stand: what can be checked without a look at the values, in the form that the kernel reads.
struct Places {
  Tensor cos, sin;
  OptionalTensor positions, cu_seqlens;

  Places(
      const Tensor& x, const Tensor& cos_in, const Tensor& sin_in, const OptionalTensor& positions_in,
      const OptionalTensor& cu_seqlens_in) {
    check(
        cos_in.dim() == 2 && sizes_of(cos_in) == sizes_of(sin_in) && 2 * cos_in.size(1) == x.size(3) &&
            cos_in.device() == x.device() && sin_in.device() == x.device(),
        "rope: cos is ", describe(cos_in), " and sin ", describe(sin_in),
        "; both must be [positions, head_dim / 2] with head_dim ", x.size(3), ", on the device of the heads");
    check(
        !(positions_in.has_value() && cu_seqlens_in.has_value()),
        "rope: positions and cu_seqlens are both given; either says where the tokens stand");
    if (positions_in.has_value()) {
      check(
          positions_in->scalar_type() == ScalarType::Long && positions_in->dim() == 2 &&
              positions_in->size(0) == x.size(0) && positions_in->size(1) == x.size(1) &&
              positions_in->device() == x.device(),
          "rope: positions are ", describe(*positions_in), "; one int64 for each token [", x.size(0), ", ", x.size(1),
          "] is needed, on the device of the heads");
      positions = torch::stable::contiguous(*positions_in);
    } else if (cu_seqlens_in.has_value()) {
      check(
          cu_seqlens_in->scalar_type() == ScalarType::Int && cu_seqlens_in->dim() == 1 &&
              cu_seqlens_in->size(0) >= 2 && cu_seqlens_in->device() == x.device(),
          "rope: cu_seqlens is ", describe(*cu_seqlens_in),
          "; [documents + 1] int32 is needed, on the device of the heads");
      cu_seqlens = torch::stable::contiguous(*cu_seqlens_in);
    } else {
      check(
          x.size(0) == 0 || x.size(1) <= cos_in.size(0), "rope: ", x.size(1),
          " positions are asked for, the tables hold ", cos_in.size(0));
    }
    cos = ready_table(cos_in);
    sin = ready_table(sin_in);
  }
};

// Elements of a head must be neighbours to be read.
Tensor with_neighbours(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

// `heads` heads from `in` to those of `out` from number `first` on.
RopePart part(const Tensor& in, const Tensor& out, int64_t first, int64_t heads, bool rotate) {
  return {
      .in = in.data_ptr(),
      .in_batch = in.stride(0),
      .in_token = in.stride(1),
      .in_head = in.stride(2),
      .out = static_cast<char*>(out.data_ptr()) + first * out.stride(2) * static_cast<int64_t>(out.element_size()),
      .out_batch = out.stride(0),
      .out_token = out.stride(1),
      .out_head = out.stride(2),
      .heads = static_cast<int>(heads),
      .rotate = rotate};
}

// Whether heads of `half` pairs lie at multiples of 16 bytes, `wide` elements.
bool aligned(const RopePart& p, int64_t half, int64_t wide) {
  bool all = is_aligned(p.in) && is_aligned(p.out) && half % wide == 0;
  for (const int64_t stride : {p.in_batch, p.in_token, p.in_head, p.out_batch, p.out_token, p.out_head}) {
    all = all && stride % wide == 0;
  }
  return all || p.heads == 0;
}

void run(
    const char* name, const Tensor& x, const Places& places, bool interleaved, bool inverse,
    std::initializer_list<RopePart> parts) {
  const int64_t tokens = x.size(0) * x.size(1), half = x.size(3) / 2;
  int64_t heads = 0;
  for (const RopePart& p : parts) {
    heads += p.heads;
  }
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  check(
      tokens <= kMost && heads * half <= kMost / 128, name, ": ", tokens, " tokens of ", heads, " heads of ", 2 * half,
      "; the CUDA kernel takes up to ", kMost, " tokens of up to ", kMost / 64, " elements");
  Rope op{
      .parts = {},
      .tokens = static_cast<unsigned>(tokens),
      .sequence = static_cast<unsigned>(x.size(1)),
      .heads = static_cast<int>(heads),
      .half = static_cast<int>(half),
      .cos = static_cast<const float*>(places.cos.data_ptr()),
      .sin = static_cast<const float*>(places.sin.data_ptr()),
      .rows = places.cos.size(0),
      .positions = places.positions ? static_cast<const int64_t*>(places.positions->data_ptr()) : nullptr,
      .cu_seqlens = places.cu_seqlens ? static_cast<const int32_t*>(places.cu_seqlens->data_ptr()) : nullptr,
      .documents = places.cu_seqlens ? static_cast<int>(places.cu_seqlens->size(0) - 1) : 0,
      .inverse = inverse,
      .block_tokens = 1};
  std::copy(parts.begin(), parts.end(), op.parts);
  dispatch(name, x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if (tokens == 0 || heads == 0 || half == 0) {
      return;
    }
    bool wide = true;
    for (const RopePart& p : parts) {
      wide = wide && aligned(p, half, kWide<T>);
    }
    if (wide) {
      rotate_as<T, kWide<T>>(name, op, interleaved, current_stream(x));
    } else {
      rotate_as<T, 1>(name, op, interleaved, current_stream(x));
    }
  });
}

std::tuple<Tensor, Tensor> rope(
    Tensor q_in, Tensor k_in, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens,
    bool interleaved, bool inverse) {
  check_heads(q_in, q_in, "q");
  check_heads(k_in, q_in, "k");
  const DeviceGuard guard(q_in);
  const Places places(q_in, cos, sin, positions, cu_seqlens);
  const Tensor q = with_neighbours(q_in), k = with_neighbours(k_in);
  Tensor q_out = empty(q, sizes_of(q), q.scalar_type()), k_out = empty(k, sizes_of(k), k.scalar_type());
  run("rope", q, places, interleaved, inverse,
      {part(q, q_out, 0, q.size(2), true), part(k, k_out, 0, k.size(2), true)});
  return {q_out, k_out};
}

void rope_(
    Tensor qkv, int64_t heads, Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor cu_seqlens,
    bool interleaved) {
  check_heads(qkv, qkv, "qkv");
  check(
      heads >= 0 && heads <= qkv.size(2), "rope_: ", heads, " heads are to be rotated of ", qkv.size(2), " in qkv ",
      describe(qkv));
  check_writable("rope_", qkv, "qkv");
  const DeviceGuard guard(qkv);
  const Places places(qkv, cos, sin, positions, cu_seqlens);
  raise_version(qkv);
  run("rope_", qkv, places, interleaved, /*inverse=*/false, {part(qkv, qkv, 0, heads, true)});
}

// The gradient of the joined heads: what split, rotation and a concatenation would do in three passes.
Tensor rope_qkv_backward(
    Tensor dq_in, Tensor dk_in, Tensor dv_in, Tensor cos, Tensor sin, OptionalTensor positions,
    OptionalTensor cu_seqlens, bool interleaved) {
  check_heads(dq_in, dq_in, "dq");
  check_heads(dk_in, dq_in, "dk");
  check_heads(dv_in, dq_in, "dv");
  const DeviceGuard guard(dq_in);
  const Places places(dq_in, cos, sin, positions, cu_seqlens);
  const Tensor dq = with_neighbours(dq_in), dk = with_neighbours(dk_in), dv = with_neighbours(dv_in);
  const int64_t heads = dq.size(2), key_heads = dk.size(2), value_heads = dv.size(2);
  Tensor dqkv =
      empty(dq, {dq.size(0), dq.size(1), heads + key_heads + value_heads, dq.size(3)}, dq.scalar_type());
  run("rope_qkv_backward", dq, places, interleaved, /*inverse=*/true,
      {part(dq, dqkv, 0, heads, true), part(dk, dqkv, heads, key_heads, true),
       part(dv, dqkv, heads + key_heads, value_heads, false)});
  return dqkv;
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("rope", TORCH_BOX(&megapre::cuda::rope));
  m.impl("rope_", TORCH_BOX(&megapre::cuda::rope_));
  m.impl("rope_qkv_backward", TORCH_BOX(&megapre::cuda::rope_qkv_backward));
}
