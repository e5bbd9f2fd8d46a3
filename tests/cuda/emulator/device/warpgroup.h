// Emulated csrc/cuda/device/warpgroup.h: a block starts with as many registers a thread as fit, and more are had only once
// others have given them up.
#pragma once

#include <cuda_runtime.h>

#include "../asynchronous.h"

namespace megapre::cuda {

inline int registers_at_start() {
  return std::min(256, static_cast<int>(65536 / (blockDim.x * blockDim.y * blockDim.z) / 8 * 8));
}

template <int REGISTERS>
void fewer_registers() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  if (REGISTERS > registers_at_start()) {
    emulator::fail("setmaxnreg.dec to more registers than the kernel starts with");
  }
  emulator::units().free_registers += registers_at_start() - REGISTERS;
}

template <int REGISTERS>
void more_registers() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  const int wanted = REGISTERS - registers_at_start();
  if (wanted < 0) {
    emulator::fail("setmaxnreg.inc to fewer registers than the kernel starts with");
  }
  emulator::Units* const units = &emulator::units();
  emulator::wait_until([=] { return units->free_registers >= wanted; }, "registers that others give up");
  units->free_registers -= wanted;
}

inline void barrier_wait(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }

}  // namespace megapre::cuda
