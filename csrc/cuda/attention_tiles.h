// Tiles of 16-bit rows in shared memory, and products of them on tensor cores (device/mma.h).
//
// A row of D elements is D / 8 chunks of 16 bytes. Chunk c of row r lies at c xor a number made of r, chosen so that
// the 8 chunks that one phase of an ldmatrix reads (8 rows, one column of chunks) lie in 8 different groups of 4 banks:
// with rows of whole 128 bytes that number is r % 8, with rows of 64 or 192 bytes r / 2 % 4.
//
// Two kinds of products: scores, rows of A times rows of B summed over D, both from shared memory; and sums, a matrix
// that lies in registers as accumulators do times the rows of B, for all D columns. Rows of A belong to one warp, 16 M
// of them.
#pragma once

#include <device/cp_async.h>
#include <device/mma.h>

#include <cstdint>

#include "attention.h"

namespace megapre::cuda {

// warps of `parts` times 16 rows each, by `columns` rows of the other side, of which `slots` tiles are on chip.
struct AttentionTiles {
  int warps, parts, columns, slots;
  constexpr int rows() const { return 16 * warps * parts; }
  constexpr int threads() const { return 32 * warps; }
};

template <typename T, int D>
struct Tile {
  static_assert(D % 32 == 0, "rows are whole groups of four chunks");
  static constexpr int kChunks = D / 8;
  static constexpr int kTurned = kChunks % 8 == 0 ? 8 : 4;  // chunks that change places with each other
  T* data;

  // Of element `column`, a multiple of 8, of a row.
  static __device__ __forceinline__ int offset(int row, int column) {
    const int turn = (kTurned == 8 ? row % 8 : row / 2 % 4) * 8;
    return row * D + (column ^ turn);
  }

  // The 16 x 16 elements from (row, column) on: as operand A, or with TRANSPOSED as operands B {r[0], r[1]} of the
  // first 8 columns and {r[2], r[3]} of the others, rows being k; without, as operands B {r[0], r[2]} of the first 8
  // rows and {r[1], r[3]} of the others, columns being k. Both are multiples of 16, so that all places within a group
  // of chunks are one number of the lane, xor a constant.
  template <bool TRANSPOSED = false>
  __device__ __forceinline__ void load(uint32_t (&r)[4], int row, int column) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, within = column % (8 * kTurned);
    const int place = offset(lane % 16, lane / 16 * 8) ^ within;
    load_matrices<TRANSPOSED>(r, data + row * D + (column - within) + place);
  }

  // Rows of `dim` elements `stride` apart (kLargestStride), of which `rows` exist, as one of THREADS threads copies
  // them: the threads are laid over a tile so that a thread's places in it are one place plus constants.
  template <int THREADS>
  struct Source {
    static constexpr int kAcross = kTurned == 4 ? 4 : kChunks < 16 ? kChunks : 16, kDown = THREADS / kAcross;
    static_assert(kChunks % kAcross == 0 && kDown % 8 == 0);
    const T* at;
    int stride, rows, columns;  // from the thread's own first on

    __device__ __forceinline__ Source(const T* from, int64_t stride, int rows, int dim)
        : at(from + row() * stride + column()),
          stride(static_cast<int>(stride)),
          rows(rows - row()),
          columns(dim - column()) {}

    static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kAcross; }
    static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % kAcross * 8; }
  };

  // Starts to copy rows first .. first + ROWS - 1. What does not exist is 0.
  template <int ROWS, int THREADS>
  __device__ __forceinline__ void copy(const Source<THREADS>& from, int first) const {
    using From = Source<THREADS>;
    static_assert(ROWS % From::kDown == 0);
    T* const to = data + offset(From::row(), From::column());
    const T* at = from.at + int64_t{first} * from.stride;
#pragma unroll
    for (int down = 0; down < ROWS; down += From::kDown) {
#pragma unroll
      for (int across = 0; across < D; across += 8 * From::kAcross) {
        copy_async(to + down * D + across, at + across, down < from.rows - first && across < from.columns);
      }
      at += From::kDown * from.stride;
    }
  }
};

// s[m][n] = rows 16 m.. from `row` on of a, times rows 8 n.. of b, over D.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[M][N][4], Tile<T, D> a, int row, Tile<T, D> b) {
  static_assert(N % 2 == 0);
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      a.load(left[m], row + 16 * m, k);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t r[4];
      b.load(r, 8 * n, k);
      const uint32_t even[2] = {r[0], r[2]}, odd[2] = {r[1], r[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(s[m][n], left[m], even);
        multiply_add<T>(s[m][n + 1], left[m], odd);
      }
    }
  }
}

// sum[m] += left[m] times the first 16 K rows of b.
template <typename T, int D, int M, int K>
__device__ __forceinline__ void add_product(float (&sum)[M][D / 8][4], const uint32_t (&left)[M][K][4], Tile<T, D> b) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      uint32_t r[4];
      b.template load<true>(r, 16 * k, 8 * d);
      const uint32_t even[2] = {r[0], r[1]}, odd[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add<T>(sum[m][d], left[m][k], even);
        multiply_add<T>(sum[m][d + 1], left[m][k], odd);
      }
    }
  }
}

// Two accumulators as two elements of T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  const float pair[2] = {low, high};
  return Vector<T, 2>::from(pair).bits;
}

// Accumulators of 16 M rows and 8 N columns as operand A.
template <typename T, int M, int N>
__device__ __forceinline__ void as_operand(uint32_t (&a)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      a[m][n / 2][0] = packed<T>(s[m][n][0], s[m][n][1]);
      a[m][n / 2][1] = packed<T>(s[m][n][2], s[m][n][3]);
      a[m][n / 2][2] = packed<T>(s[m][n + 1][0], s[m][n + 1][1]);
      a[m][n / 2][3] = packed<T>(s[m][n + 1][2], s[m][n + 1][3]);
    }
  }
}

// `with` in the place of the scores of a warp's rows that `seen`, of each row, does not hold. Columns are counted from
// `first` on.
template <int M, int N>
__device__ __forceinline__ void mask(float (&s)[M][N][4], int first, float with, const Interval* seen) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Interval here = seen[16 * m + 8 * half + lane / 4];
      here.first -= first + lane % 4 * 2;
      here.end -= first + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[m][n][2 * half + i];
          x = here.holds(8 * n + i) ? x : with;
        }
      }
    }
  }
}

// Writes a warp's sums, times factor[m][0] for the upper 8 of each 16 rows and factor[m][1] for the lower, to rows
// first .. of `to`, of which `rows` exist. They pass through the warp's own rows of `tile`, from `row` on, to be
// written 16 bytes at a time: after a barrier since anyone has read or copied there.
template <typename T, int D, int M>
__device__ __forceinline__ void store_rows(
    const float (&sum)[M][D / 8][4], const float (&factor)[M][2], Tile<T, D> tile, int row, T* to, int64_t stride,
    int first, int rows, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(tile.data + tile.offset(row + 16 * m + 8 * half + group, 8 * d) + pair) =
            packed<T>(sum[m][d][2 * half] * factor[m][half], sum[m][d][2 * half + 1] * factor[m][half]);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int at = lane; at < 16 * M * (D / 8); at += 32) {
    const int i = at / (D / 8), column = at % (D / 8);
    if (first + i < rows && column * 8 < dim) {
      Vector<T, 8>::load(tile.data + tile.offset(row + i, 8 * column)).store(to + (first + i) * stride + column * 8);
    }
  }
}

// body<T, D>() for the dtype and the tiles that the head dim fits in; the rest of their columns is 0.
template <typename Body>
void for_tiles_of(const Attention& op, Body body) {
  const auto with = [&]<typename T>() {
    op.dim <= 32 ? body.template operator()<T, 32>()
        : op.dim <= 64 ? body.template operator()<T, 64>()
        : op.dim <= 96 ? body.template operator()<T, 96>()
        : op.dim <= 128 ? body.template operator()<T, 128>()
                        : body.template operator()<T, 256>();
  };
  op.is_bf16 ? with.template operator()<bf16>() : with.template operator()<fp16>();
}

// One block for each tile of `length` rows, of each head of each row of the batch.
inline dim3 tile_grid(int length, AttentionTiles tiles, int heads, int batch) {
  return dim3(static_cast<unsigned>((length + tiles.rows() - 1) / tiles.rows() * int64_t{heads} * batch));
}

}  // namespace megapre::cuda
