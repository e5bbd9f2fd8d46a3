// Emulated csrc/cuda/device/shared.h: shared memory is a piece of the block's arena, poisoned when the block starts.
#pragma once

#include <cuda_runtime.h>

#define MEGAPRE_SHARED(type, name, ...) \
  auto& name = emulator::shared_array<type __VA_ARGS__>([]() -> const void* { static char key; return &key; }())

namespace megapre::cuda {

template <typename T = unsigned char>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

}  // namespace megapre::cuda
