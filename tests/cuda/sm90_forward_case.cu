// The forward kernel for sm_90a alone, as an op of its own, for what test_cuda_attention_sm90.py breaks in it.

#include <torch/csrc/stable/library.h>

#include "attention_sm90.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

// Causal attention of whole bf16 tensors, by one key head for each head.
Tensor attend(Tensor q, Tensor k, Tensor v, double scale) {
  const auto heads_of = [](const Tensor& t) { return Heads{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; };
  Tensor o = empty(q, sizes_of(q), q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  Attention op{};
  op.is_bf16 = true;
  op.batch = static_cast<int>(q.size(0));
  op.queries = op.keys = static_cast<int>(q.size(1));
  op.heads = op.key_heads = static_cast<int>(q.size(2));
  op.group = 1;
  op.dim = static_cast<int>(q.size(3));
  op.causal = true;
  op.scale = static_cast<float>(scale);
  op.q = heads_of(q);
  op.k = heads_of(k);
  op.v = heads_of(v);
  op.o = heads_of(o);
  op.lse = static_cast<float*>(lse.data_ptr());
  attention_forward_sm90(op, nullptr);
  return o;
}

}  // namespace
}  // namespace megapre::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MEGAPRE_OPS_NAMESPACE, m) {
  m.def("attend(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEGAPRE_OPS_NAMESPACE, MEGAPRE_OPS_KEY, m) {
  m.impl("attend", TORCH_BOX(&megapre::cuda::attend));
}
