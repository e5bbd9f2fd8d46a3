// The kernels for sm_90a alone, as ops of their own, for what test_cuda_attention_sm90.py breaks in them.

#include <torch/csrc/stable/library.h>

#include "attention_sm90.h"
#include "tensor.h"

namespace megapre::cuda {

// One of them is built; the other is not called.
[[gnu::weak]] void attention_forward_sm90(const Attention&, cudaStream_t);
[[gnu::weak]] void attention_backward_sm90(const Attention&, const float*, cudaStream_t);

// They are given.
void attention_statistics(const Attention&, const float*, cudaStream_t) {}

namespace {

Heads heads_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Causal attention of whole bf16 tensors, by one key head for each head.
Attention described(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
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
  return op;
}

Tensor attend(Tensor q, Tensor k, Tensor v, double scale) {
  Tensor o = empty(q, sizes_of(q), q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  Attention op = described(q, k, v, scale);
  op.o = heads_of(o);
  op.lse = static_cast<float*>(lse.data_ptr());
  attention_forward_sm90(op, nullptr);
  return o;
}

// dq, dk and dv; `statistics` as in attention.h.
std::tuple<Tensor, Tensor, Tensor> gradients(
    Tensor q, Tensor k, Tensor v, Tensor d_o, Tensor statistics, double scale) {
  Attention op = described(q, k, v, scale);
  Tensor dq = empty(q, sizes_of(q), q.scalar_type()), dk = empty(k, sizes_of(k), k.scalar_type());
  Tensor dv = empty(v, sizes_of(v), v.scalar_type());
  op.d_o = heads_of(d_o);
  op.dq = heads_of(dq);
  op.dk = heads_of(dk);
  op.dv = heads_of(dv);
  op.statistics = static_cast<float*>(statistics.data_ptr());
  op.padded_queries = static_cast<int>(statistics.size(2));
  attention_backward_sm90(op, nullptr, nullptr);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace megapre::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MEGAPRE_OPS_NAMESPACE, m) {
  m.def("attend(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  m.def(
      "gradients(Tensor q, Tensor k, Tensor v, Tensor d_o, Tensor statistics, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEGAPRE_OPS_NAMESPACE, MEGAPRE_OPS_KEY, m) {
  m.impl("attend", TORCH_BOX(&megapre::cuda::attend));
  m.impl("gradients", TORCH_BOX(&megapre::cuda::gradients));
}
