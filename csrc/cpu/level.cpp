#include "level.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace megapre::cpu {
namespace {

// The instruction sets that CMakeLists.txt lets the compiler use at each level.
bool runs(Level level) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  const bool avx2 = false;
  const bool avx512 = false;
#endif
  return level == Level::DEFAULT || (level == Level::AVX2 ? avx2 : avx512);
}

Level decide() {
  const Level best = runs(Level::AVX512) ? Level::AVX512 : runs(Level::AVX2) ? Level::AVX2 : Level::DEFAULT;
  const char* wish = std::getenv("MEGAPRE_CPU_LEVEL");
  if (wish == nullptr || *wish == '\0') {
    return best;
  }
  for (const Level level : {Level::DEFAULT, Level::AVX2, Level::AVX512}) {
    if (std::string_view(wish) == name(level)) {
      TORCH_CHECK_VALUE(
          runs(level), "MEGAPRE_CPU_LEVEL=", wish, ": this CPU cannot run it; its best level is ", name(best));
      return level;
    }
  }
  TORCH_CHECK_VALUE(false, "MEGAPRE_CPU_LEVEL=", wish, " names no level; levels are default, avx2 and avx512");
}

}  // namespace

const char* name(Level level) {
  switch (level) {
    case Level::AVX512:
      return "avx512";
    case Level::AVX2:
      return "avx2";
    default:
      return "default";
  }
}

Level level() {
  static const Level decided = decide();
  return decided;
}

}  // namespace megapre::cpu
