// Driver of attention: checks, masks, memory and threads. The tile loops are in attention_rows.cpp and
// attention_backward_rows.cpp.

#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "rows.h"

namespace megapre::cpu {
namespace {

void check_like(const char* op, const at::Tensor& t, const at::Tensor& like, const char* name, const char* like_name) {
  TORCH_CHECK_VALUE(
      t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), op, ": ", name, " is ", t.scalar_type(), " ",
      t.sizes(), " but ", like_name, " is ", like.scalar_type(), " ", like.sizes(),
      "; they must have the same shape and dtype");
}

void check_gradient(
    const char* op, const at::Tensor& t, const at::Tensor& of, const char* name, const char* of_name) {
  check_like(op, t, of, name, of_name);
  check_writable(op, t, name);
}

void check(
    const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<int64_t>& window) {
  TORCH_CHECK_VALUE(
      q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes(), op,
      ": need q [B, Sq, N, D] and k, v [B, Sk, K, D]; they are q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  TORCH_CHECK_VALUE(
      q.size(0) == k.size(0) && q.size(3) == k.size(3), op, ": batch and head dim must agree; they are q ", q.sizes(),
      ", k ", k.sizes());
  TORCH_CHECK_VALUE(
      k.size(2) > 0 && q.size(2) % k.size(2) == 0, op, ": ", q.size(2), " query heads are no multiple of ", k.size(2),
      " key heads");
  TORCH_CHECK_VALUE(
      q.size(1) <= k.size(1), op, ": ", q.size(1), " queries but only ", k.size(1), " keys; Sq <= Sk is needed");
  const c10::ScalarType dtype = q.scalar_type();
  TORCH_CHECK_VALUE(
      (dtype == c10::kFloat || dtype == c10::kBFloat16 || dtype == c10::kHalf) && k.scalar_type() == dtype &&
          v.scalar_type() == dtype,
      op, ": q, k and v are ", dtype, ", ", k.scalar_type(), " and ", v.scalar_type(),
      "; native attention takes one of fp32, bf16 and fp16 for all three, reference takes fp64 too");
  TORCH_CHECK_VALUE(
      q.size(3) >= 1 && q.size(3) <= kLargestDim, op, ": head dim ", q.size(3), "; native attention takes 1 to ",
      kLargestDim, ", sdpa and reference take any");
  TORCH_CHECK_VALUE(
      !window.has_value() || *window >= 1, op, ": window is ", window.value_or(0),
      "; a query sees at least itself, so window >= 1");
}

// Ends of the documents over all tokens.
std::vector<int64_t> document_ends(const char* op, const at::Tensor& cu_seqlens, const at::Tensor& q, int64_t keys) {
  const int64_t tokens = q.size(0) * q.size(1);
  TORCH_CHECK_VALUE(
      q.size(1) == keys, op, ": documents (cu_seqlens) need Sq = Sk; they are ", q.size(1), " and ", keys);
  TORCH_CHECK_VALUE(
      cu_seqlens.dim() == 1 && (cu_seqlens.scalar_type() == c10::kInt || cu_seqlens.scalar_type() == c10::kLong), op,
      ": cu_seqlens is ", cu_seqlens.scalar_type(), " ", cu_seqlens.sizes(), "; one row of int32 is needed");
  const at::Tensor wide = cu_seqlens.to(c10::kLong).contiguous();
  const int64_t* bound = wide.const_data_ptr<int64_t>();
  bool rises = wide.numel() >= 2 && bound[0] == 0 && bound[wide.numel() - 1] == tokens;
  for (int64_t i = 1; rises && i < wide.numel(); ++i) {
    rises = bound[i - 1] <= bound[i];
  }
  TORCH_CHECK_VALUE(
      rises, op, ": cu_seqlens must rise from 0 to B*S = ", tokens, "; it has ", wide.numel(), " numbers");
  return {bound + 1, bound + wide.numel()};
}

// The interval of keys that each query sees (attention.h).
struct Spans {
  std::vector<int64_t> first, end;
  int64_t stride;

  Spans(
      const char* op, const at::Tensor& q, int64_t keys, bool causal, const std::optional<at::Tensor>& cu_seqlens,
      const std::optional<int64_t>& window) {
    const int64_t queries = q.size(1), batch = cu_seqlens.has_value() ? q.size(0) : 1;
    const std::vector<int64_t> ends =
        cu_seqlens.has_value() ? document_ends(op, *cu_seqlens, q, keys) : std::vector<int64_t>{keys};
    stride = cu_seqlens.has_value() ? queries : 0;
    first.resize(batch * queries);
    end.resize(batch * queries);
    const int64_t reach = std::min(window.value_or(keys), keys);
    size_t document = 0;
    int64_t begin = 0;  // of the document, over all tokens
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = b * stride;  // with documents, queries and keys are the same tokens
      for (int64_t i = 0; i < queries; ++i) {
        while (cu_seqlens.has_value() && ends[document] <= row + i) {
          begin = ends[document++];
        }
        const int64_t at = i + keys - queries;
        const int64_t past = causal ? at + 1 : std::min(at + reach, keys);
        first[row + i] = std::max({at + 1 - reach, begin - row, int64_t{0}});
        end[row + i] = std::min(past, ends[document] - row);
      }
    }
  }

  // Keys that the queries of tile i see, queries counted one by one.
  int64_t work(int64_t batch, int64_t tile, int64_t queries) const {
    int64_t total = 0;
    for (int64_t i = tile * kQueryTile; i < std::min(queries, (tile + 1) * kQueryTile); ++i) {
      total += end[batch * stride + i] - first[batch * stride + i];
    }
    return total;
  }
};

Heads heads_of(const at::Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Attention describe(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, const Spans& spans) {
  const bool own = q.scalar_type() == c10::kBFloat16 && has_products_of(c10::kBFloat16);
  const int64_t padded_dim = at::divup(q.size(3), kDimUnit) * kDimUnit;
  const c10::ScalarType tile_dtype = own ? c10::kBFloat16 : c10::kFloat;
  return {
      .dtype = q.scalar_type(),
      .tile_dtype = tile_dtype,
      .products = &products(tile_dtype, kDimUnit),
      .queries = q.size(1),
      .keys = k.size(1),
      .heads = q.size(2),
      .key_heads = k.size(2),
      .dim = q.size(3),
      .group = q.size(2) / k.size(2),
      .query_tiles = at::divup(q.size(1), kQueryTile),
      .padded_dim = padded_dim,
      .sums_size = 2 * at::divup(k.size(1), kKeyTile) * kKeyTile * padded_dim,
      .scale = scale,
      .first = spans.first.data(),
      .end = spans.end.data(),
      .span_stride = spans.stride,
      .q = heads_of(q),
      .k = heads_of(k),
      .v = heads_of(v),
      .o = {},
      .lse = nullptr,
      .d_o = {},
      .dq = {},
      .dk = {},
      .dv = {},
      .dlse = nullptr,
  };
}

// Bytes that the sums of all parts may take together for the sake of balance alone; more only to give each thread a part.
constexpr int64_t kSumsBytes = 64 << 20;

// Parts that the queries of a key head are cut into, each of which keeps `bytes` until all are there: one while the key
// heads of the batch keep the threads busy. All parts together hold less than twice as much as one for each thread.
int64_t parts_of(const Attention& op, int64_t batch, int64_t bytes) {
  const int64_t whole = batch * op.key_heads, threads = at::get_num_threads();
  if (whole % threads == 0 || whole >= 4 * threads) {
    return 1;
  }
  const int64_t held = std::max(at::divup(threads, whole), kSumsBytes / std::max<int64_t>(whole * bytes, 1));
  return std::min({at::divup(4 * threads, whole), held, op.group * op.query_tiles});
}

// Units in the order of batch rows, key heads and parts; the parts of a key head have about equal work.
std::vector<AttentionUnit> units_of(const Attention& op, const Spans& spans, int64_t batch, int64_t parts) {
  std::vector<AttentionUnit> units;
  const int64_t tiles = op.query_tiles;
  std::vector<int64_t> until(op.group * tiles);  // work up to and with each tile
  std::vector<int64_t> cuts(parts + 1);
  for (int64_t b = 0; b < batch; ++b) {
    if (b == 0 || spans.stride != 0) {
      int64_t total = 0;
      for (size_t t = 0; t < until.size(); ++t) {
        total += spans.work(b, static_cast<int64_t>(t) % tiles, op.queries);
        until[t] = total;
      }
      for (int64_t part = 1; part < parts; ++part) {
        cuts[part] = std::upper_bound(until.begin(), until.end(), total / parts * part) - until.begin();
      }
      cuts[parts] = static_cast<int64_t>(until.size());
    }
    for (int64_t head = 0; head < op.key_heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        units.push_back({b, head, cuts[part], cuts[part + 1]});
      }
    }
  }
  return units;
}

// f(unit's index, thread's index) for all units, each on the thread that is free first. What a unit computes depends on
// no other, so neither does the result on who computes it.
template <typename F>
void for_units(const Attention& op, int64_t units, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t unit = next++; unit < units; unit = next++) {
      f(unit, begin);
    }
    op.products->release();
  });
}

struct Workspace {
  at::Tensor memory;
  int64_t bytes;

  Workspace(int64_t threads, int64_t bytes, const at::Tensor& like)
      : memory(at::empty({threads, (bytes + 63) / 64 * 64}, like.options().dtype(c10::kByte))),
        bytes(memory.size(1)) {}

  char* of(int64_t index) const {
    return static_cast<char*>(memory.data_ptr()) + index * bytes;
  }
};

std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, bool causal,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<int64_t> window, double scale) {
  check("attention", q_in, k_in, v_in, window);
  const Spans spans("attention", q_in, k_in.size(1), causal, cu_seqlens, window);
  const at::Tensor q = with_neighbours(q_in), k = with_neighbours(k_in), v = with_neighbours(v_in);
  at::Tensor o = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(c10::kFloat));
  if (o.numel() == 0) {
    return {o, lse};
  }
  Attention op = describe(q, k, v, scale, spans);
  op.o = heads_of(o);
  op.lse = lse.data_ptr<float>();
  const AttentionForward& kernels = MEGAPRE_CHOOSE(attention_forward);
  const std::vector<AttentionUnit> units = units_of(op, spans, q.size(0), parts_of(op, q.size(0), 0));
  const int64_t count = static_cast<int64_t>(units.size()), threads = std::min<int64_t>(at::get_num_threads(), count);
  const Workspace space(threads, kernels.space(op), q);
  for_units(op, count, threads, [&](int64_t unit, int64_t thread) { kernels.run(op, units[unit], space.of(thread)); });
  return {o, lse};
}

void attention_backward_(
    at::Tensor& dq, at::Tensor& dk, at::Tensor& dv, const at::Tensor& d_o_in, const std::optional<at::Tensor>& dlse_in, const at::Tensor& q_in, const at::Tensor& k_in,
    const at::Tensor& v_in, const at::Tensor& o_in, const at::Tensor& lse_in, bool causal,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<int64_t> window, double scale) {
  const char* const name = "attention_backward";
  check(name, q_in, k_in, v_in, window);
  check_like(name, d_o_in, q_in, "do", "q");
  check_like(name, o_in, q_in, "o", "q");
  check_gradient(name, dq, q_in, "dq", "q");
  check_gradient(name, dk, k_in, "dk", "k");
  check_gradient(name, dv, v_in, "dv", "v");
  const std::vector<int64_t> lse_sizes{q_in.size(0), q_in.size(2), q_in.size(1)};
  TORCH_CHECK_VALUE(
      lse_in.sizes() == at::IntArrayRef(lse_sizes) && lse_in.scalar_type() == c10::kFloat, name, ": lse is ",
      lse_in.scalar_type(), " ", lse_in.sizes(), "; fp32 ", at::IntArrayRef(lse_sizes), " is needed");
  if (dlse_in.has_value()) {
    check_like(name, *dlse_in, lse_in, "dlse", "lse");
  }
  const Spans spans(name, q_in, k_in.size(1), causal, cu_seqlens, window);
  const at::Tensor q = with_neighbours(q_in), k = with_neighbours(k_in), v = with_neighbours(v_in);
  const at::Tensor d_o = with_neighbours(d_o_in), o = with_neighbours(o_in), lse = lse_in.contiguous();
  const at::Tensor dlse = dlse_in.has_value() ? dlse_in->contiguous() : at::Tensor();
  raise_version(dq);
  raise_version(dk);
  raise_version(dv);
  if (q.numel() == 0) {
    dk.zero_();
    dv.zero_();
    return;
  }
  Attention op = describe(q, k, v, scale, spans);
  op.o = heads_of(o);
  op.lse = lse.data_ptr<float>();
  op.d_o = heads_of(d_o);
  op.dlse = dlse.defined() ? dlse.const_data_ptr<float>() : nullptr;
  op.dq = heads_of(dq);
  op.dk = heads_of(dk);
  op.dv = heads_of(dv);
  const AttentionBackward& kernels = MEGAPRE_CHOOSE(attention_backward);
  const int64_t bytes = op.sums_size * static_cast<int64_t>(sizeof(float)), parts = parts_of(op, q.size(0), bytes);
  const std::vector<AttentionUnit> units = units_of(op, spans, q.size(0), parts);
  const int64_t count = static_cast<int64_t>(units.size()), threads = std::min<int64_t>(at::get_num_threads(), count);
  const Workspace space(threads, kernels.space(op), q);
  // With several parts to a key head their sums are kept until all are there; then they are added in their order.
  const Workspace sums(parts == 1 ? threads : count, bytes, q);
  for_units(op, count, threads, [&](int64_t unit, int64_t thread) {
    float* own = reinterpret_cast<float*>(sums.of(parts == 1 ? thread : unit));
    kernels.run(op, units[unit], space.of(thread), own);
    if (parts == 1) {
      kernels.store(op, units[unit].batch, units[unit].key_head, own, 1);
    }
  });
  if (parts > 1) {
    at::parallel_for(0, count / parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const AttentionUnit& unit = units[i * parts];
        kernels.store(op, unit.batch, unit.key_head, reinterpret_cast<const float*>(sums.of(i * parts)), parts);
      }
    });
  }
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("attention", &megapre::cpu::attention);
  m.impl("attention_backward_", &megapre::cpu::attention_backward_);
}
