// What runs beside the threads of a block: copies by the TMA unit and products of warpgroups. Each is done at some moment
// between its start and the wait for it, drawn from the schedule's seed; for seed 0 at the last. So what is read too early
// is poison, and what is overwritten too early is read overwritten.
//
// These units see shared memory through a view of their own: what threads write is in it once one of them has passed
// async_fence (on a GPU a thread's fence is for its own writes alone).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace emulator {

// Of the block of the thread that runs now.
struct Units {
  std::vector<unsigned char> seen;  // dynamic shared memory as the units see it
  unsigned char* memory;            // and as threads do
  int64_t free_registers;
};

Units& units();

// Does `work` later: the latest when no thread can move, or when `owner` is waited for. Owners are threads or barriers.
void later(const void* owner, std::function<void()> work);

// Does all work of an owner now.
void finish(const void* owner);

// Whether a product that starts now is done at once.
bool at_once();

// The place of the running thread in dynamic shared memory; fails for any other memory.
uint32_t shared_offset(const void* p);

// Bits 4 to 6 of a place xored with bits 7 to 9.
inline uint32_t swizzled(uint32_t place) {
  return place ^ (place >> 7 & 7) << 4;
}

// For the machine: between turns of warps, some of the work or all of it (whether there was some); at a launch's start;
// at the end of its blocks (what was left undone, empty if nothing).
bool advance(bool all);
void start_units();
const char* end_units();

}  // namespace emulator
