// Driver of grad_norm: checks, memory, the table of tensors. The kernels are in grad_norm_sums.h: one launch for up to 128
// tensors of any dtypes, and one for the root. Nothing on the host waits for the device.
//
//   norm = sqrt(sum over tensors and elements of g^2)
//
// Floor: bytes / read rate; 0.93 ms per 1e9 in fp32 on an H200.
// Not yet run on a GPU; proven by tests/cuda/.

#include <type_traits>
#include <vector>

#include "grad_norm_sums.h"
#include "launch.h"
#include "ops.h"
#include "tensor.h"

namespace megapre::cuda {
namespace {

int64_t chunks_of(const Tensor& grad) {
  return (grad.numel() + kGradChunk - 1) / kGradChunk;
}

GradKind kind_of(const Tensor& grad) {
  GradKind kind = GradKind::kFloat;
  dispatch("grad_norm", grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    kind = sizeof(T) == 4 ? GradKind::kFloat : std::is_same_v<T, bf16> ? GradKind::kBFloat16 : GradKind::kHalf;
  });
  return kind;
}

// Tensors added one by one; launched where the table is full, and at the end.
class Sums {
  GradTable table_{};
  int64_t chunks_ = 0;  // of the table
  cudaStream_t stream_;

 public:
  Sums(double* partials, cudaStream_t stream) : stream_(stream) { table_.partials = partials; }

  void add(const Tensor& grad) {
    const int at = table_.tensors++;
    table_.first[at] = chunks_;
    table_.data[at] = grad.data_ptr();
    table_.count[at] = grad.numel();
    table_.kind[at] = kind_of(grad);
    chunks_ += chunks_of(grad);
    if (table_.tensors == kGradTensors) {
      launch_table();
    }
  }

  void launch_table() {
    if (chunks_ > 0) {
      launch(
          {.op = "grad_norm", .grid = dim3(static_cast<unsigned>(chunks_)), .block = dim3(kGradThreads),
           .stream = stream_},
          square_sums_kernel, table_);
    }
    table_.partials += chunks_;
    table_.tensors = 0;
    chunks_ = 0;
  }
};

// There is one gradient at least: without any, the call would find no device.
Tensor grad_norm(std::vector<Tensor> grads) {
  int64_t chunks = 0;
  std::vector<Tensor> flat;
  for (const Tensor& grad : grads) {
    kind_of(grad);
    check(
        grad.device() == grads[0].device(), "grad_norm: gradients ", describe(grads[0]), " and ", describe(grad),
        " are on different devices; one norm needs them on one");
    if (grad.numel() > 0) {
      flat.push_back(torch::stable::contiguous(grad));
      chunks += chunks_of(grad);
    }
  }
  const DeviceGuard guard(grads[0]);
  const cudaStream_t stream = current_stream(grads[0]);
  const Tensor partials = empty(grads[0], {chunks}, ScalarType::Double);
  Tensor norm = empty(grads[0], {}, ScalarType::Float);
  Sums sums(static_cast<double*>(partials.data_ptr()), stream);
  for (const Tensor& grad : flat) {
    sums.add(grad);
  }
  sums.launch_table();
  launch(
      {.op = "grad_norm", .grid = dim3(1), .block = dim3(1024), .stream = stream}, root_kernel,
      static_cast<const double*>(partials.data_ptr()), chunks, static_cast<float*>(norm.data_ptr()));
  return norm;
}

}  // namespace
}  // namespace megapre::cuda

MEGAPRE_CUDA_OPS(m) {
  m.impl("grad_norm", TORCH_BOX(&megapre::cuda::grad_norm));
}
