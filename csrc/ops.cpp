// The one list of native ops. A schema is declared here; its CPU form is registered in csrc/cpu/<op>.cpp.
// Fake (meta) and autograd rules live in Python, beside the reference of the same op in kernels/<op>.py.

#include <ATen/core/Tensor.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/level.h"
#include "cpu/products.h"

// setup.py passes torch.__version__ up to the "+": the header knows no 2.11.0a0 or 2.14.0.dev20260101.
#ifndef MEGAPRE_TORCH_VERSION
#define MEGAPRE_TORCH_VERSION TORCH_VERSION
#endif

// Found in the file's bytes by kernels/native.py before the library is loaded: torch's C++ interface is not stable from
// one version to the next, and loading a library built for another one fails in unreadable ways.
extern "C" __attribute__((visibility("default"), used)) const char megapre_built_for_torch[] =
    "megapre-built-for-torch=" MEGAPRE_TORCH_VERSION ";";

TORCH_LIBRARY(megapre, m) {
  // y = (h - mean) * rstd * weight + bias, rstd = 1/sqrt(var(h) + eps), h = x + residual. `h` is empty without a residual.
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual)"
      " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)");
  // dbias is empty without a bias.
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");

  // y = h * rstd * weight with rstd = 1/sqrt(mean(h^2) + eps), h = x + residual. `h` is empty without a residual.
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor y, Tensor h, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");

  // gelu(x + bias), with Phi in its tanh form or exact; dbias is empty without a bias.
  m.def("gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor");
  m.def("gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)");

  // act(gate) * up of x = [gate, up] along the last dim, act = silu or gelu in its tanh form.
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor x) -> Tensor");
  m.def("geglu(Tensor x) -> Tensor");
  m.def("geglu_backward(Tensor dy, Tensor x) -> Tensor");

  // Losses and log-sum-exp are fp32 (fp64 for fp64 logits). Columns from `vocab` on are padding: never read.
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, int vocab)"
      " -> (Tensor losses, Tensor lse)");
  m.def(
      "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse, int ignore_index,"
      " float label_smoothing, float z_loss, int vocab) -> Tensor");
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? dlosses, int ignore_index, float label_smoothing,"
      " float z_loss, int vocab) -> Tensor");
  // The same in halves for logits whose columns lie in shards, column 0 of each being vocab_start of the whole row.
  m.def(
      "cross_entropy_local(Tensor logits, Tensor labels, int vocab_start, int vocab, int ignore_index,"
      " bool label_smoothing) -> Tensor stats");
  m.def(
      "cross_entropy_local_backward_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor? dlosses, int vocab_start,"
      " int vocab, int ignore_index, float label_smoothing, float z_loss) -> ()");

  // q, o [B, Sq, N, D]; k, v [B, Sk, K, D]; lse [B, N, Sq] fp32.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? cu_seqlens, int? window, float scale)"
      " -> (Tensor o, Tensor lse)");
  m.def(
      "attention_backward_(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor do, Tensor? dlse, Tensor q, Tensor k,"
      " Tensor v, Tensor o, Tensor lse, bool causal, Tensor? cu_seqlens, int? window, float scale) -> ()");

  // The three products of a linear layer on matrices. dweight and dbias may be fp32 beside 16-bit operands; they are added
  // to where `accumulate`, and overwritten where not.
  m.def("linear_(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias) -> ()");
  m.def("linear_input_gradient_(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()");
  m.def(
      "linear_weight_gradient_(Tensor(a!) dweight, Tensor(b!)? dbias, Tensor dy, Tensor x, bool accumulate) -> ()");

  // Rows of weight by id, counted from vocab_start on; zeros for the ids of rows that are not in it. `vocab` counts the
  // whole vocabulary, and is null where weight holds the last of it.
  m.def("embedding(Tensor ids, Tensor weight, int vocab_start=0, int? vocab=None) -> Tensor");

  // total [rows, width] gets, or where `accumulate` has added to it, the sums of the rows of dy of equal ids.
  m.def(
      "embedding_gradient_(Tensor(a!) total, Tensor dy, Tensor ids, bool accumulate, int vocab_start=0,"
      " int? vocab=None) -> ()");

  // Whether this CPU multiplies `dtype` by instructions of its own (bf16: AVX-512 bf16 or AMX).
  m.def("has_products_of(ScalarType dtype) -> bool", [](c10::ScalarType dtype) {
    return megapre::cpu::has_products_of(dtype);
  });

  // Pairs (i, i + D/2) of each head, or (2i, 2i + 1) when interleaved, turned by the angle of the token's position: given
  // [B, S], counted within the documents of cu_seqlens, or else 0 .. S-1. `inverse` turns back: the gradient.
  m.def(
      "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens, bool interleaved,"
      " bool inverse) -> (Tensor q_out, Tensor k_out)");
  m.def(
      "rope_(Tensor(a!) qkv, int heads, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens,"
      " bool interleaved) -> ()");
  m.def(
      "rope_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? positions,"
      " Tensor? cu_seqlens, bool interleaved) -> Tensor dqkv");

  // One update of flat state in place. `param` is null where the master is the parameter; scalars are 0-dim tensors.
  m.def(
      "adamw_(Tensor(a!)? param, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grad, Tensor lr,"
      " Tensor step, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay)"
      " -> ()");
  // The same for a bf16 parameter without a master: rounded at random, by (seed, step, offset + index).
  m.def(
      "adamw_stochastic_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor lr,"
      " Tensor step, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay,"
      " int seed, int offset) -> ()");
  // sqrt(sum of squares) over all tensors, fp32.
  m.def("grad_norm(Tensor[] grads) -> Tensor");

  // "default", "avx2" or "avx512": the code path the ops run on this machine.
  m.def("cpu_level() -> str", []() -> std::string { return megapre::cpu::name(megapre::cpu::level()); });
}
