// Driver of rope: checks, memory and threads. The arithmetic is in rope_rows.cpp.

#include "rope.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "rows.h"

namespace megapre::cpu {
namespace {

using Optional = std::optional<at::Tensor>;

void check_heads(const at::Tensor& x, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 4, "rope: ", name, " is ", x.sizes(), "; [batch, sequence, heads, head_dim] is needed");
  TORCH_CHECK_VALUE(
      x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.size(3) == like.size(3) &&
          x.scalar_type() == like.scalar_type(),
      "rope: ", name, " is ", x.scalar_type(), " ", x.sizes(), " beside ", like.scalar_type(), " ", like.sizes(),
      "; they differ only in heads");
}

// Where the tokens of a batch stand, checked, in the form that the row loops read.
struct Places {
  at::Tensor cos;
  at::Tensor sin;
  at::Tensor positions;  // undefined: 0 .. sequence - 1 in every row

  Places(
      const at::Tensor& x, const at::Tensor& cos_in, const at::Tensor& sin_in, const Optional& positions_in,
      const Optional& cu_seqlens) {
    TORCH_CHECK_TYPE(
        is_supported(x.scalar_type()), "rope: dtype ", x.scalar_type(), "; supported are fp32, bf16, fp16, fp64");
    TORCH_CHECK_VALUE(
        cos_in.dim() == 2 && cos_in.sizes() == sin_in.sizes() && 2 * cos_in.size(1) == x.size(3), "rope: cos is ",
        cos_in.sizes(), " and sin ", sin_in.sizes(), "; both must be [positions, head_dim / 2] with head_dim ",
        x.size(3));
    TORCH_CHECK_VALUE(
        !(positions_in.has_value() && cu_seqlens.has_value()),
        "rope: positions and cu_seqlens are both given; either says where the tokens stand");
    cos = cos_in.to(acc_dtype(x.scalar_type())).contiguous();
    sin = sin_in.to(acc_dtype(x.scalar_type())).contiguous();
    if (positions_in.has_value()) {
      given(*positions_in, x);
    } else if (cu_seqlens.has_value()) {
      within_documents(*cu_seqlens, x);
    } else {
      TORCH_CHECK_VALUE(
          x.size(0) == 0 || x.size(1) <= cos.size(0), "rope: ", x.size(1), " positions are asked for, the tables hold ",
          cos.size(0));
    }
  }

  const int64_t* data() const {
    return positions.defined() ? positions.const_data_ptr<int64_t>() : nullptr;
  }

 private:
  void given(const at::Tensor& t, const at::Tensor& x) {
    TORCH_CHECK_TYPE(t.scalar_type() == c10::kLong, "rope: positions are ", t.scalar_type(), ", not int64");
    TORCH_CHECK_VALUE(
        t.sizes() == x.sizes().slice(0, 2), "rope: positions are ", t.sizes(), "; one for each token ",
        x.sizes().slice(0, 2), " is needed");
    positions = t.contiguous();
    const int64_t* position = data();
    for (int64_t token = 0; token < positions.numel(); ++token) {
      TORCH_CHECK_VALUE(
          position[token] >= 0 && position[token] < cos.size(0), "rope: position ", position[token], " at [",
          token / x.size(1), ", ", token % x.size(1), "] lies outside [0, ", cos.size(0), "), the rows of the tables");
    }
  }

  // Each document counts from 0, and so does what a row of the batch cuts off from its beginning.
  void within_documents(const at::Tensor& cu_seqlens, const at::Tensor& x) {
    const int64_t sequence = x.size(1), tokens = x.size(0) * sequence;
    TORCH_CHECK_TYPE(
        cu_seqlens.scalar_type() == c10::kInt, "rope: cu_seqlens are ", cu_seqlens.scalar_type(), ", not int32");
    TORCH_CHECK_VALUE(
        cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 2, "rope: cu_seqlens is ", cu_seqlens.sizes(),
        "; [documents + 1] is needed");
    const at::Tensor bounds = cu_seqlens.contiguous();
    const int32_t* bound = bounds.const_data_ptr<int32_t>();
    const int32_t* last = bound + bounds.numel() - 1;
    TORCH_CHECK_VALUE(
        *bound == 0 && *last == tokens && std::is_sorted(bound, last + 1), "rope: cu_seqlens must rise from 0 to B*S = ",
        tokens, "; it goes from ", *bound, " to ", *last);
    positions = at::empty({x.size(0), sequence}, cos.options().dtype(c10::kLong));
    int64_t* position = positions.data_ptr<int64_t>();
    int64_t longest = 0;
    for (int64_t token = 0, start = 0; token < tokens; ++token) {
      while (bound[1] <= token) {
        ++bound;
      }
      start = std::max<int64_t>(*bound, token - token % sequence);
      position[token] = token - start;
      longest = std::max(longest, position[token] + 1);
    }
    TORCH_CHECK_VALUE(
        longest <= cos.size(0), "rope: the longest document has ", longest, " positions, the tables hold ",
        cos.size(0));
  }
};

RopePart part(const at::Tensor& in, const at::Tensor& out, bool rotate) {
  return {
      in.const_data_ptr(), in.stride(0), in.stride(1), in.stride(2), out.data_ptr(), out.stride(0),
      out.stride(1), out.stride(2), in.size(2), rotate};
}

void run(
    const at::Tensor& x, const Places& places, bool interleaved, bool inverse,
    std::initializer_list<RopePart> parts) {
  RopeRows op{
      .dtype = x.scalar_type(),
      .sequence = x.size(1),
      .half = x.size(3) / 2,
      .positions = places.data(),
      .cos = places.cos.const_data_ptr(),
      .sin = places.sin.const_data_ptr(),
      .interleaved = interleaved,
      .inverse = inverse,
      .parts = {},
      .count = static_cast<int>(parts.size()),
  };
  std::copy(parts.begin(), parts.end(), op.parts);
  int64_t heads = 0;
  for (const RopePart& p : parts) {
    heads += p.heads;
  }
  if (heads * x.size(3) == 0) {  // a tensor without elements has no address, not even to copy nothing from
    return;
  }
  const RopeKernels& kernels = MEGAPRE_CHOOSE(rope_kernels);
  at::parallel_for(0, x.size(0) * x.size(1), grain(heads * x.size(3)), [&](int64_t begin, int64_t end) {
    kernels.rotate(op, begin, end);
  });
}

std::tuple<at::Tensor, at::Tensor> rope(
    const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& cos, const at::Tensor& sin,
    const Optional& positions, const Optional& cu_seqlens, bool interleaved, bool inverse) {
  check_heads(q_in, q_in, "q");
  check_heads(k_in, q_in, "k");
  const Places places(q_in, cos, sin, positions, cu_seqlens);
  const at::Tensor q = with_neighbours(q_in), k = with_neighbours(k_in);
  at::Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  run(q, places, interleaved, inverse, {part(q, q_out, true), part(k, k_out, true)});
  return {q_out, k_out};
}

void rope_(
    at::Tensor& qkv, int64_t heads, const at::Tensor& cos, const at::Tensor& sin, const Optional& positions,
    const Optional& cu_seqlens, bool interleaved) {
  check_heads(qkv, qkv, "qkv");
  TORCH_CHECK_VALUE(
      heads >= 0 && heads <= qkv.size(2), "rope_: ", heads, " heads are to be rotated of ", qkv.size(2), " in qkv ",
      qkv.sizes());
  check_writable("rope_", qkv, "qkv");
  const Places places(qkv, cos, sin, positions, cu_seqlens);
  raise_version(qkv);
  const at::Tensor rotated = qkv.narrow(2, 0, heads);
  run(qkv, places, interleaved, /*inverse=*/false, {part(rotated, rotated, true)});
}

// The gradient of the joined heads: what split, rotation and a concatenation would do in three passes.
at::Tensor rope_qkv_backward(
    const at::Tensor& dq_in, const at::Tensor& dk_in, const at::Tensor& dv_in, const at::Tensor& cos,
    const at::Tensor& sin, const Optional& positions, const Optional& cu_seqlens, bool interleaved) {
  check_heads(dq_in, dq_in, "dq");
  check_heads(dk_in, dq_in, "dk");
  check_heads(dv_in, dq_in, "dv");
  const Places places(dq_in, cos, sin, positions, cu_seqlens);
  const at::Tensor dq = with_neighbours(dq_in), dk = with_neighbours(dk_in), dv = with_neighbours(dv_in);
  const int64_t heads = dq.size(2), key_heads = dk.size(2), value_heads = dv.size(2);
  at::Tensor dqkv =
      at::empty({dq.size(0), dq.size(1), heads + key_heads + value_heads, dq.size(3)}, dq.options());
  run(dq, places, interleaved, /*inverse=*/true,
      {part(dq, dqkv.narrow(2, 0, heads), true), part(dk, dqkv.narrow(2, heads, key_heads), true),
       part(dv, dqkv.narrow(2, heads + key_heads, value_heads), false)});
  return dqkv;
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("rope", &megapre::cpu::rope);
  m.impl("rope_", &megapre::cpu::rope_);
  m.impl("rope_qkv_backward", &megapre::cpu::rope_qkv_backward);
}
