// What tests ask of the emulator: an op guard, and functions for ctypes.

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "device/torch.h"
#include "machine.h"

namespace {

using torch::stable::Tensor;

// A copy of a contiguous tensor whose end is the end of the mapped memory.
Tensor guard(const Tensor& t) {
  const auto sizes = t.sizes();
  Tensor copy = megapre::cuda::empty(t, {sizes.begin(), sizes.end()}, t.scalar_type());
  if (t.numel() > 0) {  // else there may be no address
    std::memcpy(copy.data_ptr(), t.data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
  }
  return copy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEGAPRE_OPS_NAMESPACE, m) {
  m.def("guard(Tensor t) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEGAPRE_OPS_NAMESPACE, MEGAPRE_OPS_KEY, m) {
  m.impl("guard", TORCH_BOX(&guard));
}

extern "C" __attribute__((visibility("default"))) void emulator_schedule(uint64_t seed) {
  emulator::schedule_seed = seed;
}

extern "C" __attribute__((visibility("default"))) void emulator_device(int multiprocessors, int capability) {
  emulator::device = {multiprocessors, capability};
}

extern "C" __attribute__((visibility("default"))) int64_t emulator_launches() {
  return emulator::launches;
}
