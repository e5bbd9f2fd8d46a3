#include "machine.h"

#include <algorithm>
#include <csignal>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include <sys/mman.h>

#include "asynchronous.h"
#include "guard.h"
#include "state.h"

// Saves the registers that a call must keep on the stack, leaves the stack in *from and goes on with the other one.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024, kPage = 4096;

void trap(int signal, siginfo_t* info, void*) {
  const std::string what = signal == SIGSEGV || signal == SIGBUS
      ? "illegal access: " + place(info->si_addr)
      : std::string("undefined or misaligned operation (trapped by -fsanitize=undefined)");
  leave("emulator: " + what + where());
}

// The handlers of a launch; what was there before comes back afterwards.
struct Traps {
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before[4];
  stack_t stack_before;
  std::vector<unsigned char> stack = std::vector<unsigned char>(64 * 1024);

  Traps() {
    stack_t own{};
    own.ss_sp = stack.data();
    own.ss_size = stack.size();
    sigaltstack(&own, &stack_before);
    struct sigaction action {};
    action.sa_sigaction = trap;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) {
      sigaction(kSignals[i], &action, &before[i]);
    }
  }
  ~Traps() {
    for (int i = 0; i < 4; ++i) {
      sigaction(kSignals[i], &before[i], nullptr);
    }
    sigaltstack(&stack_before, nullptr);
  }
};

// Stacks are kept for the next launch. Below each lies a page without access.
unsigned char* stack_of(size_t fiber) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= fiber) {
    void* map = mmap(
        nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (map == MAP_FAILED) {
      throw std::runtime_error("emulator: no memory for the stack of a thread");
    }
    mprotect(map, kPage, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(map) + kPage);
  }
  return stacks[fiber];
}

void fiber_main() {
  (*machine->kernel)();
  Fiber* self = machine->current;
  self->state = State::kEnded;
  --self->block->alive;
  release_if_complete(self->block->barriers[0], self->block->alive);
  pass_cluster_barrier();
  switch_out();
  __builtin_unreachable();
}

void prepare(Block& block, unsigned rank, uint3 index, unsigned threads, size_t first_stack) {
  const Grid& grid = machine->grid;
  block.index = index;
  block.rank = rank;
  block.alive = threads;
  block.arena_bytes = kStaticLimit + (grid.shared + 15) / 16 * 16;
  block.arena = static_cast<unsigned char*>(allocate(block.arena_bytes));
  block.static_bytes = 0;
  block.meetings.resize((threads + kWarp - 1) / kWarp);
  block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber = {&block, {i % grid.block.x, i / grid.block.x % grid.block.y, i / (grid.block.x * grid.block.y)}, i,
             State::kReady, "", 0, nullptr, {}};
    // Six registers and the address to go to; a function is entered with the stack 8 bytes off a multiple of 16.
    auto** top = reinterpret_cast<void**>(stack_of(first_stack + i) + kStack) - 8;
    std::fill(top, top + 6, nullptr);
    top[6] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = top;
  }
}

bool step(Fiber& fiber) {
  if (fiber.state != State::kReady && fiber.state != State::kPolling) {
    return false;
  }
  const bool polling = fiber.state == State::kPolling;
  fiber.state = State::kReady;
  machine->current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  emulator_switch(&machine->scheduler_stack, fiber.stack_pointer);
  machine->current = nullptr;
  machine->progress |= !polling || fiber.state != State::kPolling;
  return fiber.state != State::kPolling;
}

std::string stuck() {
  std::ostringstream text;
  text << "emulator: threads wait for each other for ever:";
  for (const Block& block : machine->blocks) {
    std::vector<std::pair<std::string, unsigned>> counts;
    for (const Fiber& fiber : block.fibers) {
      const std::string what = fiber.state == State::kEnded ? "have ended" : std::string("wait at ") + fiber.waits_for;
      if (counts.empty() || counts.back().first != what) {
        counts.emplace_back(what, 0);
      }
      ++counts.back().second;
    }
    for (const auto& [what, count] : counts) {
      text << " " << count << " " << what << ",";
    }
  }
  text << " (runs of threads in their order)" << where();
  return text.str();
}

std::vector<unsigned> drawn_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule_seed != 0) {
    std::shuffle(order.begin(), order.end(), machine->random);
  }
  return order;
}

// One cluster, from its first instruction to the end of its last thread.
void run_cluster() {
  const unsigned warps = static_cast<unsigned>(machine->blocks[0].meetings.size());
  const unsigned blocks = static_cast<unsigned>(machine->blocks.size());
  for (bool alive = true; alive;) {
    machine->progress = false;
    for (const unsigned at : drawn_order(warps * blocks)) {
      Block& block = machine->blocks[at / warps];
      const unsigned first = at % warps * kWarp;
      const unsigned last = std::min<unsigned>(first + kWarp, block.fibers.size());
      for (unsigned i = first; i < last; ++i) {
        if (block.fibers[i].state == State::kPolling) {
          step(block.fibers[i]);
        }
      }
      for (bool moved = true; moved;) {
        moved = false;
        for (unsigned i = first; i < last; ++i) {
          if (block.fibers[i].state == State::kReady) {
            moved |= step(block.fibers[i]);
          }
        }
      }
      machine->progress |= advance(false);
    }
    alive = false;
    for (const Block& block : machine->blocks) {
      alive |= block.alive > 0;
    }
    if (alive && !machine->progress && !advance(true)) {
      leave(stuck());
    }
  }
}

void check_red_zones(const Block& block) {
  for (const size_t zone : block.red_zones) {
    for (size_t i = 0; i < kRedZone; ++i) {
      if (block.arena[zone + i] != kRedByte) {
        leave("emulator: something was written past the end of a shared array" + where());
      }
    }
  }
}

void end_cluster() {
  for (Block& block : machine->blocks) {
    release(block.arena);
  }
  machine->blocks.clear();
}

struct Ending {
  ~Ending() {
    end_cluster();
    machine = nullptr;
  }
};

void run_all() {
  const Grid& grid = machine->grid;
  const unsigned threads = grid.block.x * grid.block.y * grid.block.z;
  const unsigned clusters = grid.grid.x * grid.grid.y * grid.grid.z / grid.cluster;
  for (const unsigned at : drawn_order(clusters)) {
    machine->cluster_arrived = 0;
    machine->cluster_generation = 0;
    machine->blocks = std::vector<Block>(grid.cluster);
    for (unsigned rank = 0; rank < grid.cluster; ++rank) {
      const unsigned linear = at * grid.cluster + rank;
      const uint3 index{linear % grid.grid.x, linear / grid.grid.x % grid.grid.y, linear / (grid.grid.x * grid.grid.y)};
      prepare(machine->blocks[rank], rank, index, threads, static_cast<size_t>(rank) * threads);
    }
    start_units();
    run_cluster();
    if (const std::string left = end_units(); !left.empty()) {
      leave("emulator: " + left + where());
    }
    for (const Block& block : machine->blocks) {
      check_red_zones(block);
    }
    if (const std::string what = changed(); !what.empty()) {
      leave("emulator: " + what + where());
    }
    end_cluster();
  }
}

}  // namespace

std::string where() {
  std::ostringstream text;
  if (machine->current != nullptr) {
    const uint3 b = machine->current->block->index, t = machine->current->thread;
    text << " in thread (" << t.x << ", " << t.y << ", " << t.z << ") of block (" << b.x << ", " << b.y << ", " << b.z
         << ")";
  }
  const Grid& g = machine->grid;
  text << ", grid " << g.grid.x << " x " << g.grid.y << " x " << g.grid.z << " of " << g.block.x << " x " << g.block.y
       << " x " << g.block.z << " threads";
  return text.str();
}

[[noreturn]] void leave(const std::string& error) {
  machine->error = error;
  siglongjmp(machine->escape, 1);
}

void switch_out() {
  emulator_switch(&machine->current->stack_pointer, machine->scheduler_stack);
}

void run(const Grid& grid, const std::function<void()>& kernel) {
  if (machine != nullptr) {
    throw std::runtime_error("emulator: a launch from within a launch");
  }
  Machine here{};
  here.grid = grid;
  here.kernel = &kernel;
  here.random.seed(schedule_seed);
  machine = &here;
  const Ending ending;
  gridDim = grid.grid;
  blockDim = grid.block;
  ++launches;
  {
    const Traps traps;
    if (sigsetjmp(here.escape, 1) == 0) {
      run_all();
    }
  }
  if (!here.error.empty()) {
    throw std::runtime_error(here.error);
  }
}

}  // namespace emulator
