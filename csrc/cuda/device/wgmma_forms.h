// The text of wgmma instructions, which name their 32 to 128 sums one by one. Used by wgmma.h alone.
//
// MEGAPRE_WGMMA_SS(N, type, numbers of the operands: a, b, add, transposed) after the N / 2 sums, and
// MEGAPRE_WGMMA_RS(N, type, numbers of a[0] to a[3], b, add, transposed).
#pragma once

#define MEGAPRE_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define MEGAPRE_SUMS_64 "{" MEGAPRE_TEN() MEGAPRE_TEN(1) MEGAPRE_TEN(2) "%30, %31}"
#define MEGAPRE_SUMS_128 \
  "{" MEGAPRE_TEN() MEGAPRE_TEN(1) MEGAPRE_TEN(2) MEGAPRE_TEN(3) MEGAPRE_TEN(4) MEGAPRE_TEN(5) "%60, %61, %62, %63}"
#define MEGAPRE_SUMS_256 \
  "{" MEGAPRE_TEN() MEGAPRE_TEN(1) MEGAPRE_TEN(2) MEGAPRE_TEN(3) MEGAPRE_TEN(4) MEGAPRE_TEN(5) MEGAPRE_TEN(6) \
  MEGAPRE_TEN(7) MEGAPRE_TEN(8) MEGAPRE_TEN(9) MEGAPRE_TEN(10) MEGAPRE_TEN(11) \
  "%120, %121, %122, %123, %124, %125, %126, %127}"

#define MEGAPRE_HELD_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
  "+f"(d[i + 7])
#define MEGAPRE_HELD_64 MEGAPRE_HELD_8(0), MEGAPRE_HELD_8(8), MEGAPRE_HELD_8(16), MEGAPRE_HELD_8(24)
#define MEGAPRE_HELD_128 \
  MEGAPRE_HELD_64, MEGAPRE_HELD_8(32), MEGAPRE_HELD_8(40), MEGAPRE_HELD_8(48), MEGAPRE_HELD_8(56)
#define MEGAPRE_HELD_256 \
  MEGAPRE_HELD_128, MEGAPRE_HELD_8(64), MEGAPRE_HELD_8(72), MEGAPRE_HELD_8(80), MEGAPRE_HELD_8(88), \
  MEGAPRE_HELD_8(96), MEGAPRE_HELD_8(104), MEGAPRE_HELD_8(112), MEGAPRE_HELD_8(120)

#define MEGAPRE_WGMMA_SS(N, TYPE, A, B, ADD, TRANSPOSED_B) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " MEGAPRE_SUMS_##N \
      ", %" #A ", %" #B ", add, 1, 1, 0, %" #TRANSPOSED_B ";\n}\n" \
      : MEGAPRE_HELD_##N \
      : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(add)), "n"(TRANSPOSED ? 1 : 0))

#define MEGAPRE_WGMMA_RS(N, TYPE, A0, A1, A2, A3, B, ADD, TRANSPOSED_B) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " MEGAPRE_SUMS_##N \
      ", {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, %" #TRANSPOSED_B ";\n}\n" \
      : MEGAPRE_HELD_##N \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(static_cast<int>(add)), \
        "n"(TRANSPOSED ? 1 : 0))
