#include "asynchronous.h"

#include <map>
#include <random>

#include "machine.h"

namespace emulator {
namespace {

constexpr int kLongestDelay = 40;  // turns of warps

struct Work {
  const void* owner;
  int turns;
  std::function<void()> run;
};

std::vector<Work> pending;
std::map<const unsigned char*, Units> blocks;  // by the start of their dynamic shared memory
std::mt19937_64 draw;

}  // namespace

Units& units() {
  unsigned char* const memory = dynamic_shared();
  const auto at = blocks.find(memory);
  if (at != blocks.end()) {
    return at->second;
  }
  return blocks[memory] = {std::vector<unsigned char>(dynamic_shared_bytes(), 0xFF), memory, 0};
}

void later(const void* owner, std::function<void()> work) {
  const int turns = schedule_seed == 0 ? kLongestDelay : static_cast<int>(draw() % (kLongestDelay + 1));
  pending.push_back({owner, turns, std::move(work)});
}

void finish(const void* owner) {
  for (size_t i = 0; i < pending.size();) {
    if (pending[i].owner == owner) {
      const std::function<void()> run = std::move(pending[i].run);
      pending.erase(pending.begin() + static_cast<ptrdiff_t>(i));
      run();
    } else {
      ++i;
    }
  }
}

bool at_once() {
  return schedule_seed != 0 && draw() % 2 == 0;
}

uint32_t shared_offset(const void* p) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - dynamic_shared();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(dynamic_shared_bytes())) {
    fail("an address outside of dynamic shared memory for an instruction that takes such an address");
  }
  return static_cast<uint32_t>(offset);
}

bool advance(bool all) {
  bool some = false;
  for (size_t i = 0; i < pending.size();) {
    if (all || pending[i].turns-- <= 0) {
      const std::function<void()> run = std::move(pending[i].run);
      pending.erase(pending.begin() + static_cast<ptrdiff_t>(i));
      run();
      some = true;
    } else {
      ++i;
    }
  }
  return some;
}

void start_units() {
  pending.clear();
  blocks.clear();
  draw.seed(schedule_seed);
}

const char* end_units() {
  blocks.clear();
  return pending.empty() ? "" : "blocks have ended with copies under way that nobody waited for";
}

}  // namespace emulator
