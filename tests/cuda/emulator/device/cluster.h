// Emulated csrc/cuda/device/cluster.h.
#pragma once

#include <cuda_runtime.h>

namespace megapre::cuda {

inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline unsigned cluster_blocks() { return emulator::cluster_blocks(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

template <typename T>
T load_from_block(const T* shared, unsigned rank) {
  return *static_cast<const T*>(emulator::in_block(const_cast<T*>(shared), rank));
}

}  // namespace megapre::cuda
