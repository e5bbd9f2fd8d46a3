// Emulated csrc/cuda/device/cp_async.h: a copy is made by the wait for its group, as late as it may be, so that whoever
// does not wait reads what was there before.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <deque>
#include <vector>

namespace megapre::cuda {

struct AsyncCopies {
  struct Copy {
    void* shared;
    const void* global;
    bool exists;
  };
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

inline void copy_async(void* shared, const void* global, bool exists = true) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (exists && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulator::fail("copy_async between addresses that are not multiples of 16");
  }
  emulator::of_thread<AsyncCopies>().open.push_back({shared, global, exists});
}

inline void copy_async_commit() {
  auto& copies = emulator::of_thread<AsyncCopies>();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int PENDING>
void copy_async_wait() {
  auto& groups = emulator::of_thread<AsyncCopies>().groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const AsyncCopies::Copy& copy : groups.front()) {
      copy.exists ? std::memcpy(copy.shared, copy.global, 16) : std::memset(copy.shared, 0, 16);
    }
  }
}

}  // namespace megapre::cuda
