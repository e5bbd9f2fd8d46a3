// What the threads of a kernel call: barriers, warps, clusters, shared memory.

#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"
#include "state.h"

namespace emulator {

void release_if_complete(Barrier& barrier, unsigned expected) {
  if (barrier.arrived < expected || barrier.arrived == 0) {
    return;
  }
  barrier.arrived = 0;
  for (Fiber* fiber : barrier.waiting) {
    fiber->state = State::kReady;
  }
  barrier.waiting.clear();
}

void wait_at(const char* what) {
  machine->current->state = State::kWaiting;
  machine->current->waits_for = what;
  switch_out();
}

// Those that have ended count as arrived at every barrier.
void pass_cluster_barrier() {
  unsigned alive = 0;
  for (const Block& block : machine->blocks) {
    alive += block.alive;
  }
  if (machine->cluster_arrived > 0 && machine->cluster_arrived >= alive) {
    machine->cluster_arrived = 0;
    ++machine->cluster_generation;
  }
}

void fail(const std::string& what) {
  leave("emulator: " + what + where());
}

void sync_threads() {
  Block& block = *machine->current->block;
  Barrier& barrier = block.barriers[0];
  ++barrier.arrived;
  if (barrier.arrived == block.alive) {
    release_if_complete(barrier, block.alive);
    return;
  }
  barrier.waiting.push_back(machine->current);
  wait_at("__syncthreads");
}

void named_barrier(int id, int threads, bool wait) {
  if (id < 1 || id > 15 || threads % kWarp != 0) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads: 1 to 15, whole warps");
  }
  Block& block = *machine->current->block;
  Barrier& barrier = block.barriers[id];
  ++barrier.arrived;
  if (barrier.arrived == static_cast<unsigned>(threads)) {
    release_if_complete(barrier, threads);
  } else if (wait) {
    barrier.waiting.push_back(machine->current);
    wait_at("a named barrier");
  }
}

void cluster_arrive() {
  machine->current->cluster_generation = machine->cluster_generation;
  ++machine->cluster_arrived;
  pass_cluster_barrier();
}

void cluster_wait() {
  const uint64_t generation = machine->current->cluster_generation;
  wait_until([=] { return machine->cluster_generation > generation; }, "a barrier of the cluster");
}

unsigned cluster_rank() {
  return machine->current->block->rank;
}

unsigned cluster_blocks() {
  return static_cast<unsigned>(machine->blocks.size());
}

void* in_block(void* shared, unsigned rank) {
  const Block& own = *machine->current->block;
  const ptrdiff_t offset = static_cast<unsigned char*>(shared) - own.arena;
  if (rank >= machine->blocks.size() || offset < 0 || offset >= static_cast<ptrdiff_t>(own.arena_bytes)) {
    fail("no such place in the shared memory of the cluster's block " + std::to_string(rank));
  }
  if (machine->blocks[rank].alive == 0) {
    fail("the shared memory of block " + std::to_string(rank) + " of the cluster, which has ended");
  }
  return machine->blocks[rank].arena + offset;
}

void wait_until(const std::function<bool()>& ready, const char* what) {
  while (!ready()) {
    machine->current->state = State::kPolling;
    machine->current->waits_for = what;
    switch_out();
  }
}

std::shared_ptr<void>& thread_slot(const void* key) {
  return machine->current->slots[key];
}

unsigned lane() {
  return machine->current->index % kWarp;
}

const unsigned char* meet(unsigned mask, const void* value, size_t size) {
  Fiber& self = *machine->current;
  Block& block = *self.block;
  const unsigned warp = self.index / kWarp, bit = 1u << lane();
  const unsigned there = std::min<unsigned>(kWarp, block.fibers.size() - warp * kWarp);
  if ((mask & bit) == 0 || (there < 32 && mask >> there != 0)) {
    fail("the mask of a warp operation does not hold its own lane, or holds lanes that do not exist");
  }
  Meeting* meeting = nullptr;
  for (const auto& known : block.meetings[warp]) {
    meeting = known->mask == mask ? known.get() : meeting;
  }
  if (meeting == nullptr) {
    block.meetings[warp].push_back(std::make_unique<Meeting>());
    meeting = block.meetings[warp].back().get();
    *meeting = {mask, 0, 0, {}};
    std::memset(meeting->values, 0xFF, sizeof meeting->values);
  }
  unsigned char* values = meeting->values[meeting->generation & 1];
  std::memcpy(values + 16 * lane(), value, size);
  meeting->arrived |= bit;
  if (meeting->arrived != mask) {
    wait_at("a warp operation");
    return values;
  }
  meeting->arrived = 0;
  ++meeting->generation;
  for (unsigned other = 0; other < there; ++other) {
    Fiber& fiber = block.fibers[warp * kWarp + other];
    if ((mask >> other & 1) != 0 && &fiber != &self) {
      fiber.state = State::kReady;
    }
  }
  return values;
}

unsigned char* dynamic_shared() {
  return machine->current->block->arena + kStaticLimit;
}

size_t dynamic_shared_bytes() {
  return machine->grid.shared;
}

void* static_shared(const void* key, size_t bytes) {
  Block& block = *machine->current->block;
  for (const auto& [known, offset] : block.statics) {
    if (known == key) {
      return block.arena + offset;
    }
  }
  const size_t offset = block.static_bytes, zone = offset + (bytes + 15) / 16 * 16;
  if (zone + kRedZone > kStaticLimit || zone + machine->grid.shared > kSharedLimit) {
    fail("static shared arrays of more than 48 KiB, or with the dynamic more than 227 KiB");
  }
  std::memset(block.arena + zone, kRedByte, kRedZone);
  block.red_zones.push_back(zone);
  block.statics.emplace_back(key, offset);
  block.static_bytes = zone + kRedZone;
  return block.arena + offset;
}

}  // namespace emulator
