// A GPU on the host, for tests: every thread of a block is a fiber, and the fibers take turns on one CPU thread.
//
// One warp runs until all of its lanes wait at a barrier of the block or have ended, then the next, in an order drawn from
// a seed: the widest races that barriers allow. Whoever reads what another warp has still to write reads poison. Blocks
// run one after another, also in a drawn order; the blocks of a cluster run together.
//
// What ends a launch with an error: an access outside of every allocation, a misaligned or undefined operation (the
// compiler's traps), a write around an array, a barrier that not all threads reach, an impossible launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs now.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;

// The device that the host code sees; tests set it.
struct Device {
  int multiprocessors = 3;
  int capability = 90;
};

inline Device device;
inline uint64_t schedule_seed = 0;
inline int64_t launches = 0;

struct Grid {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;
};

// Runs `kernel` for every thread of the grid. std::runtime_error says what went wrong, where, and in which thread.
void run(const Grid& grid, const std::function<void()>& kernel);

// Ends the launch from within a thread.
[[noreturn]] void fail(const std::string& what);

void sync_threads();
void named_barrier(int id, int threads, bool wait);
void cluster_arrive();
void cluster_wait();
unsigned cluster_rank();
unsigned cluster_blocks();

// The same place in the shared memory of another block of the cluster.
void* in_block(void* shared, unsigned rank);

// Lets others run until `ready`; the launch fails when nothing moves any more. `what` is for the message.
void wait_until(const std::function<bool()>& ready, const char* what);

// The lanes of `mask` meet; each leaves `size` bytes (up to 16) and finds those of all, 16 bytes a lane, until it meets
// them twice more. What lanes outside of the mask left is poison.
const unsigned char* meet(unsigned mask, const void* value, size_t size);
unsigned lane();

unsigned char* dynamic_shared();
size_t dynamic_shared_bytes();
void* static_shared(const void* key, size_t bytes);

// What a feature keeps for a thread from one call to the next; gone when the thread ends.
std::shared_ptr<void>& thread_slot(const void* key);

template <typename T>
T& of_thread() {
  static const char key = 0;
  std::shared_ptr<void>& slot = thread_slot(&key);
  if (slot == nullptr) {
    slot = std::make_shared<T>();
  }
  return *static_cast<T*>(slot.get());
}

// A static shared array by the address of something that its declaration alone owns.
template <typename Array>
Array& shared_array(const void* key) {
  return *static_cast<Array*>(static_shared(key, sizeof(Array)));
}

template <typename T>
T from_lane(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 16);
  const unsigned char* all = meet(mask, &value, sizeof(T));
  T result;
  std::memcpy(&result, all + 16 * (source & (kWarp - 1)), sizeof(T));
  return result;
}

}  // namespace emulator
