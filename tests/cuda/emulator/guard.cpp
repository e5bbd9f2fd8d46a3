#include "guard.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>

namespace emulator {
namespace {

constexpr unsigned char kPattern = 0xA5;

struct Allocation {
  unsigned char* map;  // a page without access, the data with what fills its pages, a page without access
  size_t mapped;
  unsigned char* data;
  size_t bytes;
};

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

std::map<uintptr_t, Allocation>& allocations() {
  static std::map<uintptr_t, Allocation> all;
  return all;
}

bool intact(const unsigned char* begin, const unsigned char* end) {
  for (; begin < end; ++begin) {
    if (*begin != kPattern) {
      return false;
    }
  }
  return true;
}

}  // namespace

void* allocate(size_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16;
  const size_t pages = (rounded + kPage - 1) / kPage * kPage;
  Allocation a{nullptr, pages + 2 * kPage, nullptr, bytes};
  void* map = mmap(nullptr, a.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(static_cast<unsigned char*>(map) + kPage, pages, PROT_READ | PROT_WRITE) != 0) {
    throw std::runtime_error("emulator: no memory for " + std::to_string(bytes) + " bytes");
  }
  a.map = static_cast<unsigned char*>(map);
  a.data = a.map + kPage + pages - rounded;
  std::memset(a.map + kPage, kPattern, pages);
  std::memset(a.data, 0xFF, bytes);
  allocations()[reinterpret_cast<uintptr_t>(a.data)] = a;
  return a.data;
}

void release(void* data) {
  const auto at = allocations().find(reinterpret_cast<uintptr_t>(data));
  munmap(at->second.map, at->second.mapped);
  allocations().erase(at);
}

std::string changed() {
  for (const auto& [_, a] : allocations()) {
    const bool front = intact(a.map + kPage, a.data);
    const bool back = intact(a.data + a.bytes, a.map + a.mapped - kPage);
    if (!front || !back) {
      return std::string("something was written ") + (front ? "behind" : "in front of") + " an allocation of " +
          std::to_string(a.bytes) + " bytes";
    }
  }
  return "";
}

std::string place(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (const auto& [_, a] : allocations()) {
    if (at >= a.map && at < a.map + a.mapped) {
      const bool past = at >= a.data + a.bytes;
      return std::to_string(past ? at - (a.data + a.bytes) : a.data - at) + " bytes " +
          (past ? "past the end" : "before the start") + " of an allocation of " + std::to_string(a.bytes) + " bytes";
    }
  }
  return "an address in no allocation";
}

}  // namespace emulator
