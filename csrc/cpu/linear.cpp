// Driver of the linear layer's three products: checks, tiles, memory and threads. The arithmetic is in products.h, and in
// linear_rows.cpp what is done to a tile before it goes to memory. fp32 and fp64 go to torch's own products.
//
//   y  [m, o] = x [m, i] W [o, i]^T + bias        dx [m, i] = dy [m, o] W [o, i]
//   dW [o, i] (+)= dy [m, o]^T x [m, i]           dbias [o] (+)= sum over rows of dy
//
// Sums are fp32. dW goes straight into the buffer that it is given, in fp32 or rounded to a 16-bit one, and is added there
// where that is asked, so that accumulating over micro-batches costs no pass of its own.

#include "linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "products.h"
#include "rows.h"

namespace megapre::cpu {
namespace {

// Tiles. A panel of B stays in the second-level cache while all rows of A pass by it; so does a tile of A and of C.
constexpr int64_t kPanel = 64;      // columns of B
constexpr int64_t kDepth = 1024;    // of the sum, at a time
constexpr int64_t kTileRows = 128;  // rows of A and C
constexpr int64_t kChunkRows = 2048;  // rows of A that one panel is packed for
constexpr int64_t kOuterRows = 64;    // rows of dW at a time
constexpr int64_t kOuterDepth = 2048;  // rows of dy and x that a tile of dW sums at a time

bool is_half_width(c10::ScalarType dtype) {
  return dtype == c10::kBFloat16 || dtype == c10::kHalf;
}

void check_rows(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2, op, ": ", name, " has shape ", t.sizes(), "; a matrix is needed");
  TORCH_CHECK_TYPE(
      is_supported(t.scalar_type()), op, ": ", name, " is ", t.scalar_type(),
      "; supported are fp32, bf16, fp16, fp64");
}

// The elements of a row must be neighbours.
at::Tensor by_rows(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) == 1 ? t : t.contiguous();
}

void check_out(const char* op, const at::Tensor& out, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(
      out.dim() == 2 && out.size(0) == rows && out.size(1) == columns && (out.stride(1) == 1 || columns == 1) &&
          (rows < 2 || out.stride(0) >= columns),
      op, ": ", name, " has shape ", out.sizes(), " and strides ", out.strides(), "; rows of shape [", rows, ", ",
      columns, "] whose elements are neighbours are needed");
}

// out [m, n] = a [m, k] B [k, n] + bias, B given as `b` or, `transposed`, as its transpose.
void multiply(
    const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool transposed, const at::Tensor& bias) {
  raise_version(out);
  const int64_t m = out.size(0), n = out.size(1), k = a.size(1);
  if (k == 0) {  // an empty sum, which no product writes
    out.zero_();
    if (bias.defined()) {
      out.copy_(bias);
    }
    return;
  }
  const c10::ScalarType dtype = a.scalar_type();
  const int64_t size = a.element_size();
  const Products& form = products(dtype, k);
  const LinearKernels& kernels = MEGAPRE_CHOOSE(linear_kernels);
  const int64_t panels = at::divup(n, kPanel);
  // As few chunks of rows as give every thread something to do: each packs its panels again.
  const int64_t wanted = at::divup(4 * at::get_num_threads(), std::max<int64_t>(panels, 1));
  const int64_t chunk_rows =
      std::min(kChunkRows, at::divup(std::max(at::divup(m, wanted), kTileRows), kTileRows) * kTileRows);
  const int64_t chunks = at::divup(m, chunk_rows);
  const int64_t depths = std::max<int64_t>(at::divup(k, kDepth), 1);
  const int64_t block_bytes = form.packed_bytes(std::min(k, kDepth), kPanel);
  // With one block of depth a tile of C is finished at once; else C of the whole chunk waits for the next block.
  const int64_t packed_bytes = at::divup(block_bytes, 64) * 64;
  const int64_t c_rows = depths == 1 ? std::min(kTileRows, chunk_rows) : chunk_rows;
  const int64_t workspace_bytes = packed_bytes + c_rows * kPanel * static_cast<int64_t>(sizeof(float));
  at::Tensor workspace = at::empty({at::get_num_threads(), workspace_bytes}, out.options().dtype(c10::kByte));
  at::parallel_for(0, panels * chunks, 1, [&](int64_t begin, int64_t end) {
    char* packed = static_cast<char*>(workspace.data_ptr()) + at::get_thread_num() * workspace_bytes;
    float* c = reinterpret_cast<float*>(packed + packed_bytes);
    int64_t held = -1;  // the panel that is packed, where one block holds all of it
    for (const auto unit : c10::irange(begin, end)) {
      const int64_t panel = unit / chunks, first = panel * kPanel, columns = std::min(kPanel, n - first);
      const int64_t row_begin = unit % chunks * chunk_rows, row_end = std::min(m, row_begin + chunk_rows);
      for (int64_t depth = 0; depth < depths; ++depth) {
        const int64_t from = depth * kDepth, count = std::min(kDepth, k - from);
        if (depths > 1 || held != panel) {
          const char* b_data = static_cast<const char*>(b.const_data_ptr());
          if (transposed) {
            form.pack_transposed(count, columns, b_data + (first * b.stride(0) + from) * size, b.stride(0), packed);
          } else {
            form.pack(count, columns, b_data + (from * b.stride(0) + first) * size, b.stride(0), packed);
          }
          held = panel;
        }
        for (int64_t row = row_begin; row < row_end; row += kTileRows) {
          const int64_t rows = std::min(kTileRows, row_end - row);
          float* tile = depths == 1 ? c : c + (row - row_begin) * kPanel;
          form.multiply(
              rows, columns, count, static_cast<const char*>(a.const_data_ptr()) + (row * a.stride(0) + from) * size,
              a.stride(0), packed, tile, kPanel, depth > 0);
          if (depth == depths - 1) {
            kernels.finish(
                dtype, rows, columns, tile, kPanel, bias.defined() ? bias.const_data_ptr<float>() + first : nullptr,
                static_cast<char*>(out.data_ptr()) + (row * out.stride(0) + first) * size, out.stride(0),
                /*accumulate=*/false);
          }
        }
      }
    }
    form.release();
  });
}

void linear_(
    at::Tensor& y, const at::Tensor& x_in, const at::Tensor& weight_in, const std::optional<at::Tensor>& bias_in) {
  check_rows("linear", x_in, "x");
  check_rows("linear", weight_in, "weight");
  TORCH_CHECK_VALUE(
      x_in.size(1) == weight_in.size(1) && x_in.scalar_type() == weight_in.scalar_type() &&
          y.scalar_type() == x_in.scalar_type(),
      "linear: x is ", x_in.scalar_type(), " ", x_in.sizes(), ", weight ", weight_in.scalar_type(), " ",
      weight_in.sizes(), " and y ", y.scalar_type(), "; x [rows, in] and weight [out, in] of one dtype are needed");
  check_out("linear", y, "y", x_in.size(0), weight_in.size(0));
  if (bias_in.has_value()) {
    TORCH_CHECK_VALUE(
        bias_in->dim() == 1 && bias_in->size(0) == weight_in.size(0), "linear: bias has shape ", bias_in->sizes(),
        "; weight ", weight_in.sizes(), " needs [", weight_in.size(0), "]");
  }
  if (!is_half_width(x_in.scalar_type())) {
    bias_in.has_value() ? at::addmm_out(y, bias_in->to(y.scalar_type()), x_in, weight_in.t())
                        : at::mm_out(y, x_in, weight_in.t());
    return;
  }
  const at::Tensor bias = bias_in.has_value() ? bias_in->to(c10::kFloat).contiguous() : at::Tensor();
  const at::Tensor x = by_rows(x_in), weight = by_rows(weight_in);
  multiply(y, x, weight, /*transposed=*/true, bias);
}

void linear_input_gradient_(at::Tensor& dx, const at::Tensor& dy_in, const at::Tensor& weight_in) {
  check_rows("linear_input_gradient", dy_in, "dy");
  check_rows("linear_input_gradient", weight_in, "weight");
  TORCH_CHECK_VALUE(
      dy_in.size(1) == weight_in.size(0) && dy_in.scalar_type() == weight_in.scalar_type() &&
          dx.scalar_type() == dy_in.scalar_type(),
      "linear_input_gradient: dy is ", dy_in.scalar_type(), " ", dy_in.sizes(), ", weight ", weight_in.scalar_type(),
      " ", weight_in.sizes(), " and dx ", dx.scalar_type(),
      "; dy [rows, out] and weight [out, in] of one dtype are needed");
  check_out("linear_input_gradient", dx, "dx", dy_in.size(0), weight_in.size(1));
  if (!is_half_width(dy_in.scalar_type())) {
    at::mm_out(dx, dy_in, weight_in);
    return;
  }
  multiply(dx, by_rows(dy_in), by_rows(weight_in), /*transposed=*/false, /*bias=*/at::Tensor());
}

void linear_weight_gradient_(
    at::Tensor& dweight, const std::optional<at::Tensor>& dbias, const at::Tensor& dy_in, const at::Tensor& x_in,
    bool accumulate) {
  const char* op = "linear_weight_gradient";
  check_rows(op, dy_in, "dy");
  check_rows(op, x_in, "x");
  TORCH_CHECK_VALUE(
      dy_in.size(0) == x_in.size(0) && dy_in.scalar_type() == x_in.scalar_type(), op, ": dy is ", dy_in.scalar_type(),
      " ", dy_in.sizes(), " and x ", x_in.scalar_type(), " ", x_in.sizes(), "; as many rows of one dtype are needed");
  const int64_t rows = x_in.size(0), outs = dy_in.size(1), ins = x_in.size(1);
  check_out(op, dweight, "dweight", outs, ins);
  const c10::ScalarType acc = acc_dtype(x_in.scalar_type());
  TORCH_CHECK_TYPE(
      dweight.scalar_type() == acc || dweight.scalar_type() == x_in.scalar_type(), op, ": dweight is ",
      dweight.scalar_type(), "; it can be ", acc, " or that of x, ", x_in.scalar_type());
  if (dbias.has_value()) {
    TORCH_CHECK_VALUE(
        dbias->dim() == 1 && dbias->size(0) == outs && dbias->is_contiguous() && dbias->scalar_type() == acc, op,
        ": dbias is ", dbias->scalar_type(), " ", dbias->sizes(), "; contiguous ", acc, " [", outs, "] is needed");
  }
  if (!is_half_width(x_in.scalar_type())) {
    accumulate ? at::addmm_out(dweight, dweight, dy_in.t(), x_in) : at::mm_out(dweight, dy_in.t(), x_in);
    if (dbias.has_value()) {
      const at::Tensor sums = dy_in.sum(0);
      accumulate ? dbias->add_(sums) : dbias->copy_(sums);
    }
    return;
  }
  raise_version(dweight);
  if (dbias.has_value()) {
    raise_version(*dbias);
  }
  if (rows == 0) {
    if (!accumulate) {
      dweight.zero_();
      if (dbias.has_value()) {
        dbias->zero_();
      }
    }
    return;
  }
  const at::Tensor dy = by_rows(dy_in), x = by_rows(x_in);
  const c10::ScalarType dtype = x.scalar_type();
  const int64_t size = x.element_size();
  const int64_t depth = std::min(rows, kOuterDepth), depths = std::max<int64_t>(at::divup(rows, kOuterDepth), 1);
  const int64_t padded = depth + depth % 2;
  const Products& form = products(dtype, padded);  // the transposed dy has a column of zeros where rows are odd
  const LinearKernels& kernels = MEGAPRE_CHOOSE(linear_kernels);

  // All of x, packed once and read by every thread.
  const int64_t panels = at::divup(ins, kPanel);
  const int64_t panel_bytes = at::divup(form.packed_bytes(depth, kPanel), 64) * 64;
  at::Tensor packed = at::empty({depths * panels, panel_bytes}, x.options().dtype(c10::kByte));
  const auto packed_panel = [&](int64_t block, int64_t panel) {
    return static_cast<char*>(packed.data_ptr()) + (block * panels + panel) * panel_bytes;
  };
  at::parallel_for(0, depths * panels, 1, [&](int64_t begin, int64_t end) {
    for (const auto unit : c10::irange(begin, end)) {
      const int64_t block = unit / panels, first = unit % panels * kPanel;
      const int64_t from = block * kOuterDepth;
      form.pack(
          std::min(depth, rows - from), std::min(kPanel, ins - first),
          static_cast<const char*>(x.const_data_ptr()) + (from * x.stride(0) + first) * size, x.stride(0),
          packed_panel(block, unit % panels));
    }
  });

  const bool direct = dweight.scalar_type() == c10::kFloat;
  const int64_t transposed_bytes = at::divup(kOuterRows * padded * size, 64) * 64;
  const int64_t c_bytes = direct ? 0 : kOuterRows * ins * static_cast<int64_t>(sizeof(float));
  at::Tensor workspace =
      at::empty({at::get_num_threads(), transposed_bytes + c_bytes}, x.options().dtype(c10::kByte));
  at::parallel_for(0, at::divup(outs, kOuterRows), 1, [&](int64_t begin, int64_t end) {
    char* transposed =
        static_cast<char*>(workspace.data_ptr()) + at::get_thread_num() * (transposed_bytes + c_bytes);
    for (const auto unit : c10::irange(begin, end)) {
      const int64_t first = unit * kOuterRows, count = std::min(kOuterRows, outs - first);
      float* c = direct ? dweight.data_ptr<float>() + first * dweight.stride(0)
                        : reinterpret_cast<float*>(transposed + transposed_bytes);
      const int64_t ldc = direct ? dweight.stride(0) : ins;
      for (int64_t block = 0; block < depths; ++block) {
        const int64_t from = block * kOuterDepth, here = std::min(depth, rows - from), even = here + here % 2;
        const bool adds = (direct && accumulate) || block > 0;
        form.transpose(
            here, count, static_cast<const char*>(dy.const_data_ptr()) + (from * dy.stride(0) + first) * size,
            dy.stride(0), transposed);
        if (dbias.has_value()) {
          kernels.row_sums(
              dtype, count, here, transposed, even, dbias->data_ptr<float>() + first, accumulate || block > 0);
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
          form.multiply(
              count, std::min(kPanel, ins - panel * kPanel), even, transposed, even, packed_panel(block, panel),
              c + panel * kPanel, ldc, adds);
        }
      }
      if (!direct) {
        kernels.finish(
            dtype, count, ins, c, ldc, nullptr,
            static_cast<char*>(dweight.data_ptr()) + first * dweight.stride(0) * size, dweight.stride(0), accumulate);
      }
    }
    form.release();
  });
}


}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("linear_", &megapre::cpu::linear_);
  m.impl("linear_input_gradient_", &megapre::cpu::linear_input_gradient_);
  m.impl("linear_weight_gradient_", &megapre::cpu::linear_weight_gradient_);
}
