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
#include <bit>
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

// The next of `left` rows that are multiplied together: a whole tile, in the end powers of two. Batches vary in rows, and
// brgemm compiles a kernel for every shape on every thread and keeps it for ever, so shapes must be few.
int64_t tile_rows(int64_t left) {
  return left >= kTileRows ? kTileRows : static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(left)));
}

void check_rows(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 2, op, ": ", name, " has shape ", t.sizes(), "; a matrix is needed");
  TORCH_CHECK_TYPE(
      is_supported(t.scalar_type()), op, ": ", name, " is ", t.scalar_type(),
      "; supported are fp32, bf16, fp16, fp64");
}

void check_out(const char* op, const at::Tensor& out, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(
      out.dim() == 2 && out.size(0) == rows && out.size(1) == columns, op, ": ", name, " has shape ", out.sizes(),
      "; [", rows, ", ", columns, "] is needed");
  check_writable(op, out, name);
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
        for (int64_t row = row_begin, rows; row < row_end; row += rows) {
          rows = tile_rows(row_end - row);
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
  const at::Tensor x = with_neighbours(x_in), weight = with_neighbours(weight_in);
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
  multiply(dx, with_neighbours(dy_in), with_neighbours(weight_in), /*transposed=*/false, /*bias=*/at::Tensor());
}

// dW and, where it is defined, dbias of a 16-bit layer, in three steps: all of x is packed, once for every thread; blocks of
// kOuterRows rows of dW are multiplied, each by one thread; where dW is not fp32, they are rounded on their way there.
class WeightGradient {
 public:
  WeightGradient(
      const at::Tensor& dweight, const at::Tensor& dbias, const at::Tensor& dy, const at::Tensor& x, bool accumulate)
      : dweight_(dweight), dbias_(dbias), dy_(dy), x_(x), accumulate_(accumulate) {}

  void run() const {
    at::parallel_for(0, pieces_ * panels_, 1, [&](int64_t begin, int64_t end) {
      for (const auto unit : c10::irange(begin, end)) {
        pack(unit / panels_, unit % panels_);
      }
    });
    at::parallel_for(0, at::divup(outs_, kOuterRows), 1, [&](int64_t begin, int64_t end) {
      char* transposed = static_cast<char*>(workspace_.data_ptr()) + at::get_thread_num() * workspace_.stride(0);
      for (const auto block : c10::irange(begin, end)) {
        const int64_t first = block * kOuterRows, count = std::min(kOuterRows, outs_ - first);
        if (is_direct_) {
          float* c = dweight_.data_ptr<float>() + first * dweight_.stride(0);
          multiply(first, count, transposed, c, dweight_.stride(0), accumulate_);
        } else {
          float* c = reinterpret_cast<float*>(transposed + transposed_bytes_);
          multiply(first, count, transposed, c, ins_, /*accumulate=*/false);
          kernels_.finish(
              dtype_, count, ins_, c, ins_, nullptr, row_of(dweight_, first), dweight_.stride(0), accumulate_);
        }
      }
      form_.release();
    });
  }

 private:
  // Rows of dy and x that are summed at a time.
  int64_t rows_of(int64_t piece) const {
    return std::min(kOuterDepth, x_.size(0) - piece * kOuterDepth);
  }

  static char* row_of(const at::Tensor& t, int64_t row) {
    return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * t.element_size();
  }

  char* packed(int64_t piece, int64_t panel) const {
    return static_cast<char*>(packed_.data_ptr()) + (piece * panels_ + panel) * packed_.stride(0);
  }

  int64_t columns_of(int64_t panel) const {
    return std::min(kPanel, ins_ - panel * kPanel);
  }

  void pack(int64_t piece, int64_t panel) const {
    const char* x = row_of(x_, piece * kOuterDepth) + panel * kPanel * x_.element_size();
    form_.pack(rows_of(piece), columns_of(panel), x, x_.stride(0), packed(piece, panel));
  }

  // c [count, ins] (+)= the rows of dW from `first` on, and the same of dbias.
  void multiply(int64_t first, int64_t count, char* transposed, float* c, int64_t ldc, bool accumulate) const {
    for (const auto piece : c10::irange(pieces_)) {
      const int64_t depth = form_.filled(rows_of(piece));
      const char* dy = row_of(dy_, piece * kOuterDepth) + first * dy_.element_size();
      form_.transpose(rows_of(piece), count, dy, dy_.stride(0), transposed);
      if (dbias_.defined()) {
        float* sums = dbias_.data_ptr<float>() + first;
        kernels_.row_sums(dtype_, count, rows_of(piece), transposed, depth, sums, accumulate_ || piece > 0);
      }
      for (const auto panel : c10::irange(panels_)) {
        form_.multiply(
            count, columns_of(panel), depth, transposed, depth, packed(piece, panel), c + panel * kPanel, ldc,
            accumulate || piece > 0);
      }
    }
  }

  const at::Tensor dweight_, dbias_, dy_, x_;
  const bool accumulate_;
  const c10::ScalarType dtype_ = x_.scalar_type();
  const bool is_direct_ = dweight_.scalar_type() == c10::kFloat;
  const Products& form_ = products(dtype_, /*k=*/2);  // depths are filled up to even numbers
  const LinearKernels& kernels_ = MEGAPRE_CHOOSE(linear_kernels);
  const int64_t outs_ = dy_.size(1), ins_ = x_.size(1);
  const int64_t panels_ = at::divup(ins_, kPanel), pieces_ = at::divup(x_.size(0), kOuterDepth);
  const at::Tensor packed_ = at::empty(
      {pieces_ * panels_, at::divup(form_.packed_bytes(rows_of(0), kPanel), 64) * 64},
      x_.options().dtype(c10::kByte));
  // For each thread a block of dy, transposed, and sums where they are not made in dW.
  const int64_t transposed_bytes_ = at::divup(kOuterRows * form_.filled(rows_of(0)) * x_.element_size(), 64) * 64;
  const int64_t sums_bytes_ = is_direct_ ? 0 : kOuterRows * ins_ * static_cast<int64_t>(sizeof(float));
  const at::Tensor workspace_ = at::empty({at::get_num_threads(), transposed_bytes_ + sums_bytes_}, packed_.options());
};

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
  WeightGradient(dweight, dbias.value_or(at::Tensor()), with_neighbours(dy_in), with_neighbours(x_in), accumulate).run();
}

}  // namespace
}  // namespace megapre::cpu

TORCH_LIBRARY_IMPL(megapre, CPU, m) {
  m.impl("linear_", &megapre::cpu::linear_);
  m.impl("linear_input_gradient_", &megapre::cpu::linear_input_gradient_);
  m.impl("linear_weight_gradient_", &megapre::cpu::linear_weight_gradient_);
}
