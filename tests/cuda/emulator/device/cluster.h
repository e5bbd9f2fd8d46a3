// Emulated csrc/cuda/device/cluster.h.
#pragma once

#include <cuda_runtime.h>

#include "mbarrier.h"

namespace megapre::cuda {

inline unsigned cluster_rank() { return emulator::cluster_rank(); }
inline unsigned cluster_blocks() { return emulator::cluster_blocks(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

inline void send_to_block(float value, float* shared, Mbarrier* barrier, unsigned rank) {
  float* const there = static_cast<float*>(emulator::in_block(shared, rank));
  Mbarrier* const counter = static_cast<Mbarrier*>(emulator::in_block(barrier, rank));
  emulator::later(counter, [=] {
    *there = value;
    mbarrier_land(counter, sizeof value);
  });
}

template <typename T>
T load_from_block(const T* shared, unsigned rank) {
  return *static_cast<const T*>(emulator::in_block(const_cast<T*>(shared), rank));
}

}  // namespace megapre::cuda
