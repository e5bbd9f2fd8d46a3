// CPU levels: each file of inner loops is compiled once per level, and one level is chosen when the first op runs.
#pragma once

namespace megapre::cpu {

enum class Level { DEFAULT, AVX2, AVX512 };

const char* name(Level level);

// The best level of this CPU, or the one that MEGAPRE_CPU_LEVEL=default|avx2|avx512 asks for. Decided once.
// Raises if the variable names no level, or one that this CPU cannot run.
Level level();

#if defined(__x86_64__)
// A set of row loops `Kernels NAME` exists once per level, each in the namespace of that level.
#define MEGAPRE_DECLARE_LEVELS(Kernels, NAME) \
  namespace DEFAULT {                         \
  extern const Kernels NAME;                  \
  }                                           \
  namespace AVX2 {                            \
  extern const Kernels NAME;                  \
  }                                           \
  namespace AVX512 {                          \
  extern const Kernels NAME;                  \
  }

template <typename Kernels>
const Kernels& choose(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  switch (level()) {
    case Level::AVX512:
      return avx512;
    case Level::AVX2:
      return avx2;
    default:
      return baseline;
  }
}

#define MEGAPRE_CHOOSE(NAME) ::megapre::cpu::choose(DEFAULT::NAME, AVX2::NAME, AVX512::NAME)
#else
// Elsewhere there is one level.
#define MEGAPRE_DECLARE_LEVELS(Kernels, NAME) \
  namespace DEFAULT {                         \
  extern const Kernels NAME;                  \
  }
#define MEGAPRE_CHOOSE(NAME) DEFAULT::NAME
#endif

}  // namespace megapre::cpu
