// What the machine knows of a launch that runs, for the files of the emulator: machine.cpp, which lets threads take turns,
// and threads.cpp, which they call.
#pragma once

#include <csetjmp>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr size_t kSharedLimit = 227 * 1024, kStaticLimit = 48 * 1024, kRedZone = 64;
constexpr unsigned char kRedByte = 0x5A;

enum class State { kReady, kWaiting, kPolling, kEnded };

struct Block;

struct Fiber {
  Block* block;
  uint3 thread;
  unsigned index;  // within the block
  State state;
  const char* waits_for;
  uint64_t cluster_generation;
  void* stack_pointer;
  std::map<const void*, std::shared_ptr<void>> slots;
};

// Where the lanes of one mask meet.
struct Meeting {
  unsigned mask, arrived;
  uint64_t generation;
  unsigned char values[2][kWarp * 16];
};

struct Barrier {
  unsigned arrived;
  std::vector<Fiber*> waiting;
};

struct Block {
  uint3 index;
  unsigned rank;  // in the cluster
  unsigned alive;
  unsigned char* arena;    // static arrays, then dynamic shared memory up to the end
  size_t arena_bytes, static_bytes;
  std::vector<std::pair<const void*, size_t>> statics;  // key and offset
  std::vector<size_t> red_zones;
  Barrier barriers[16];
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  // by warp
  std::vector<Fiber> fibers;
};

struct Machine {
  Grid grid;
  const std::function<void()>* kernel;
  std::vector<Block> blocks;  // of the cluster that runs
  Fiber* current;
  void* scheduler_stack;
  bool progress;
  unsigned cluster_arrived;
  uint64_t cluster_generation;
  std::mt19937_64 random;
  std::string error;
  sigjmp_buf escape;
};

inline Machine* machine = nullptr;

// Which thread, block and grid, for a message.
std::string where();

// Ends the launch with an error.
[[noreturn]] void leave(const std::string& error);

// Lets other threads run, until this one's turn comes.
void switch_out();

// A thread that waits is let go by whoever makes it ready.
void wait_at(const char* what);

void release_if_complete(Barrier& barrier, unsigned expected);
void pass_cluster_barrier();

}  // namespace emulator
