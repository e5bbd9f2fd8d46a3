// Vector form of the tile products, and packing for both forms. Compiled once per CPU level.
//
// Vector form: B is packed as panels of kColumns columns in fp32, [panel][k][kColumns], the last one filled up by zeros.
// A block of kRows rows of A times a panel stays in registers over all of k: each step loads kVectors vectors of B,
// broadcasts kRows elements of A and does kRows * kVectors multiply-adds.
//
// brgemm's form of a 16-bit B [k, n] is [k / 2][n][2]: two rows interleaved, as the instructions that multiply pairs of
// 16-bit numbers want them.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "products.h"

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

using Vector = at::vec::Vectorized<float>;

// Registers: 32 with AVX-512, 16 with AVX2. Without either, Vectorized is an array that the compiler cuts up itself.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 12, kVectors = 2;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 2, kVectors = 1;
#endif
constexpr int64_t kColumns = kVectors * Vector::size();

int64_t padded(int64_t k) {
  return k + k % 2;
}

int64_t vector_packed_bytes(int64_t k, int64_t n) {
  return (n + kColumns - 1) / kColumns * kColumns * padded(k) * static_cast<int64_t>(sizeof(float));
}

template <typename T>
void vector_pack(int64_t k, int64_t n, const void* b, int64_t ldb, void* packed) {
  float* out = static_cast<float*>(packed);
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t count = std::min(kColumns, n - first);
    const T* row = static_cast<const T*>(b) + first;
    for (int64_t i = 0; i < k; ++i, row += ldb, out += kColumns) {
      for (int64_t j = 0; j < count; ++j) {
        out[j] = static_cast<float>(row[j]);
      }
      std::fill(out + count, out + kColumns, 0.0f);
    }
    if (k % 2 != 0) {
      out = std::fill_n(out, kColumns, 0.0f);
    }
  }
}

template <typename T>
void vector_pack_transposed(int64_t k, int64_t n, const void* b, int64_t ldb, void* packed) {
  float* out = static_cast<float*>(packed);
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t count = std::min(kColumns, n - first);
    if (count < kColumns || k % 2 != 0) {
      std::fill_n(out, kColumns * padded(k), 0.0f);
    }
    for (int64_t j = 0; j < count; ++j) {
      const T* column = static_cast<const T*>(b) + (first + j) * ldb;
      for (int64_t i = 0; i < k; ++i) {
        out[i * kColumns + j] = static_cast<float>(column[i]);
      }
    }
    out += kColumns * padded(k);
  }
}

// C [rows, count] of one panel.
template <typename T, int rows>
void block(int64_t count, int64_t k, const T* a, int64_t lda, const float* panel, float* c, int64_t ldc, bool accumulate) {
  Vector sum[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vector(0.0f);
    }
  }
  for (int64_t i = 0; i < k; ++i, panel += kColumns) {
    Vector b[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      b[v] = Vector::loadu(panel + v * Vector::size());
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vector scalar(static_cast<float>(a[r * lda + i]));
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = at::vec::fmadd(scalar, b[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = count - v * Vector::size();
      if (left > 0) {
        const int64_t here = std::min<int64_t>(left, Vector::size());
        float* out = c + r * ldc + v * Vector::size();
        const Vector total = accumulate ? sum[r][v] + Vector::loadu(out, here) : sum[r][v];
        total.store(out, static_cast<int>(here));
      }
    }
  }
}

template <typename T, int rows = kRows>
void rest(
    int64_t m, int64_t count, int64_t k, const T* a, int64_t lda, const float* panel, float* c, int64_t ldc,
    bool accumulate) {
  if constexpr (rows > 0) {
    if (m == rows) {
      block<T, rows>(count, k, a, lda, panel, c, ldc, accumulate);
    } else {
      rest<T, rows - 1>(m, count, k, a, lda, panel, c, ldc, accumulate);
    }
  }
}

template <typename T>
void vector_multiply(
    int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* packed, float* c, int64_t ldc,
    bool accumulate) {
  const T* rows = static_cast<const T*>(a);
  const float* panel = static_cast<const float*>(packed);
  for (int64_t first = 0; first < n; first += kColumns, panel += kColumns * padded(k)) {
    const int64_t count = std::min(kColumns, n - first);
    for (int64_t row = 0; row < m; row += kRows) {
      rest<T>(
          std::min<int64_t>(kRows, m - row), count, k, rows + row * lda, lda, panel, c + row * ldc + first, ldc,
          accumulate);
    }
  }
}

template <typename T>
void transpose(int64_t k, int64_t n, const void* a, int64_t lda, void* at) {
  constexpr int64_t kTile = 16;
  const int64_t width = padded(k);
  const T* in = static_cast<const T*>(a);
  T* out = static_cast<T*>(at);
  for (int64_t i = 0; i < k; i += kTile) {
    for (int64_t j = 0; j < n; j += kTile) {
      for (int64_t jj = j; jj < std::min(j + kTile, n); ++jj) {
        for (int64_t ii = i; ii < std::min(i + kTile, k); ++ii) {
          out[jj * width + ii] = in[ii * lda + jj];
        }
      }
    }
  }
  for (int64_t j = 0; j < n && width != k; ++j) {
    out[j * width + k] = T(0);
  }
}

void nothing() {}

template <typename T>
constexpr Products vector_form() {
  return {
      padded, vector_packed_bytes, vector_pack<T>, vector_pack_transposed<T>, vector_multiply<T>, transpose<T>,
      nothing};
}

// ---- brgemm's packing. Bit patterns only: bf16 and fp16 alike. ---------------------------------------------------

#if defined(CPU_CAPABILITY_AVX512)

int64_t pair_filled(int64_t k) {
  return k > 32 ? (k + 31) / 32 * 32 : static_cast<int64_t>(std::bit_ceil(std::max<uint64_t>(k, 2)));
}

int64_t pair_packed_bytes(int64_t k, int64_t n) {
  return pair_filled(k) * n * static_cast<int64_t>(sizeof(uint16_t));
}

// rows[i] = 16 pairs of row i -> rows[i] = pair i of each of 16 rows.
void transpose_16x16(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = 0; i < 4; ++i) {
      t[half + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + 4 + i], 0x88);
      t[half + 4 + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// Two rows of up to 32 elements, interleaved: elements 0 .. 15 in `low`, 16 .. 31 in `high`.
struct Interleaved {
  __m512i low, high;
};

Interleaved interleave(const uint16_t* even, const uint16_t* odd, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
  const __m512i a = _mm512_maskz_loadu_epi16(mask, even);
  const __m512i b = odd == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, odd);
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  return {
      _mm512_permutex2var_epi16(a, low, b),
      _mm512_permutex2var_epi16(a, _mm512_add_epi16(low, _mm512_set1_epi16(16)), b)};
}

__mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
}

void pair_pack(int64_t k, int64_t n, const void* b, int64_t ldb, void* packed) {
  const uint16_t* in = static_cast<const uint16_t*>(b);
  uint32_t* out = static_cast<uint32_t*>(packed);
  for (int64_t i = 0; i < k; i += 2, out += n) {
    const uint16_t* even = in + i * ldb;
    const uint16_t* odd = i + 1 < k ? even + ldb : nullptr;
    for (int64_t j = 0; j < n; j += 32) {
      const int64_t count = n - j;
      const auto pairs = interleave(even + j, odd == nullptr ? nullptr : odd + j, count);
      _mm512_mask_storeu_epi32(out + j, first(count), pairs.low);
      if (count > 16) {
        _mm512_mask_storeu_epi32(out + j + 16, first(count - 16), pairs.high);
      }
    }
  }
  std::fill_n(out, (pair_filled(k) - padded(k)) / 2 * n, 0u);
}

void pair_pack_transposed(int64_t k, int64_t n, const void* b, int64_t ldb, void* packed) {
  const uint16_t* in = static_cast<const uint16_t*>(b);
  uint32_t* out = static_cast<uint32_t*>(packed);
  for (int64_t i = 0; i < k; i += 32) {
    const int64_t elements = std::min<int64_t>(32, k - i), pairs = (elements + 1) / 2;
    const __mmask32 mask = elements >= 32 ? ~__mmask32(0) : (__mmask32(1) << elements) - 1;
    for (int64_t j = 0; j < n; j += 16) {
      const int64_t count = std::min<int64_t>(16, n - j);
      __m512i rows[16];
#pragma GCC unroll 16
      for (int64_t r = 0; r < 16; ++r) {
        rows[r] = r < count ? _mm512_maskz_loadu_epi16(mask, in + (j + r) * ldb + i) : _mm512_setzero_si512();
      }
      transpose_16x16(rows);
#pragma GCC unroll 16
      for (int64_t p = 0; p < 16; ++p) {
        if (p < pairs) {
          _mm512_mask_storeu_epi32(out + (i / 2 + p) * n + j, first(count), rows[p]);
        }
      }
    }
  }
}

// Rows in pairs, then pairs across.
void pair_transpose(int64_t k, int64_t n, const void* a, int64_t lda, void* at) {
  const uint16_t* in = static_cast<const uint16_t*>(a);
  uint32_t* out = static_cast<uint32_t*>(at);
  const int64_t width = pair_filled(k) / 2;
  for (int64_t j = 0; j < n; j += 32) {
    const int64_t count = n - j;
    for (int64_t i = 0; i < k; i += 32) {
      const int64_t pairs = std::min<int64_t>(16, width - i / 2);
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int64_t p = 0; p < 16; ++p) {
        Interleaved both{_mm512_setzero_si512(), _mm512_setzero_si512()};
        if (i + 2 * p < k) {
          const uint16_t* even = in + (i + 2 * p) * lda + j;
          both = interleave(even, i + 2 * p + 1 < k ? even + lda : nullptr, count);
        }
        low[p] = both.low;
        high[p] = both.high;
      }
      transpose_16x16(low);
      transpose_16x16(high);
#pragma GCC unroll 16
      for (int64_t c = 0; c < 16; ++c) {
        if (c < count) {
          _mm512_mask_storeu_epi32(out + (j + c) * width + i / 2, first(pairs), low[c]);
        }
        if (c + 16 < count) {
          _mm512_mask_storeu_epi32(out + (j + 16 + c) * width + i / 2, first(pairs), high[c]);
        }
      }
    }
  }
}

constexpr Products kPairForm{
    pair_filled, pair_packed_bytes, pair_pack, pair_pack_transposed, nullptr, pair_transpose, nothing};

#else

constexpr Products kPairForm{};  // brgemm is used at the AVX-512 level only

#endif

}  // namespace

const ProductKernels product_kernels{
    vector_form<float>(), vector_form<c10::BFloat16>(), vector_form<c10::Half>(), kPairForm};

}  // namespace megapre::cpu::CPU_CAPABILITY
