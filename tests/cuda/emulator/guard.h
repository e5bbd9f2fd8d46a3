// Memory whose end is the end of the mapped world: reading or writing past it traps. What lies in front of it within its
// page, and the few bytes up to 16 behind it, hold a pattern that `changed` looks at.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {

// Filled with NaN (all bits set), aligned to 16 bytes and to nothing more. The caller gives it back.
void* allocate(size_t bytes);
void release(void* data);

// What was written around any allocation; empty if nothing.
std::string changed();

// Where an address lies, for a message: "4 bytes past the end of an allocation of 100 bytes".
std::string place(const void* address);

}  // namespace emulator
