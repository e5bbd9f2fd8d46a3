// Emulated csrc/cuda/device/mbarrier.h: the state of a barrier lies in its eight bytes, as on a GPU.
#pragma once

#include <cuda_runtime.h>

#include "../asynchronous.h"

namespace megapre::cuda {

struct alignas(8) Mbarrier {
  uint16_t arrivals, missing;  // of a phase; what this one waits for still
  uint32_t phase : 1;
  int32_t bytes : 31;  // announced and not landed; negative when they landed first
};
static_assert(sizeof(Mbarrier) == 8);

inline uint32_t shared_address(const void* p) { return emulator::shared_offset(p); }

// Barriers start as poison, which no count of arrivals is.
inline void check_initialised(const Mbarrier& barrier) {
  if (barrier.arrivals == 0xFFFF) {
    emulator::fail("an mbarrier that was not initialised, or not before this thread came to it");
  }
}

inline void mbarrier_end_phase(Mbarrier& barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.missing = barrier.arrivals;
  }
}

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  emulator::in_block(barrier, emulator::cluster_rank());  // it lies in shared memory
  const auto count = static_cast<uint16_t>(arrivals);
  *barrier = {count, count, 0, 0};
}

inline void mbarrier_fence() {}

inline void mbarrier_arrive(Mbarrier* barrier) {
  check_initialised(*barrier);
  if (barrier->missing == 0) {
    emulator::fail("more arrivals at an mbarrier than a phase has");
  }
  --barrier->missing;
  mbarrier_end_phase(*barrier);
}

inline void mbarrier_expect(Mbarrier* barrier, int bytes) {
  check_initialised(*barrier);
  barrier->bytes += bytes;
  mbarrier_arrive(barrier);
}

inline void mbarrier_land(Mbarrier* barrier, int bytes) {
  check_initialised(*barrier);
  barrier->bytes -= bytes;
  mbarrier_end_phase(*barrier);
}

inline void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  check_initialised(*barrier);
  emulator::wait_until([=] { return barrier->phase != parity; }, "an mbarrier");
}

}  // namespace megapre::cuda
