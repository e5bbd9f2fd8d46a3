// Rotation of heads (Su et al. 2021, eq. 34), for queries, keys and what is only moved, in one launch.
//
//   (a, b) -> (a cos - b sin, b cos + a sin); pairs (i, i + D/2), or (2i, 2i + 1) when interleaved
//
// Bytes: every head is read once and written once; a token's cos and sin come out of the caches.
//
// A thread has the same pairs of two heads of a token: four accesses of 16 bytes are under way before one is needed, and
// the angles are read once for both. Neighbouring threads have neighbouring memory. A token that stands outside of the
// tables, which the host cannot know, becomes NaN, and nothing is read for it.
#pragma once

#include <cstdint>
#include <limits>

#include "launch.h"
#include "vector.h"

namespace megapre::cuda {

// Some heads of every token, rotated or only moved from `in` to `out`, which may be the same memory. Strides are in
// elements; elements of a head are neighbours.
struct RopePart {
  const void* in;
  int64_t in_batch, in_token, in_head;
  void* out;
  int64_t out_batch, out_token, out_head;
  int heads;
  bool rotate;
};

constexpr int kRopeParts = 3;  // queries, keys, values
constexpr int kRopeHeads = 2;  // of a thread
constexpr int kRopeThreads = 512;

struct Rope {
  RopePart parts[kRopeParts];  // those that are not there have no heads
  unsigned tokens;
  unsigned sequence;           // tokens in a row of the batch
  int heads;                   // of all parts
  int half;                    // pairs in a head
  const float* cos;            // [rows, half]
  const float* sin;
  int64_t rows;
  const int64_t* positions;    // of each token; null: by its document, or its place in its row of the batch
  const int32_t* cu_seqlens;   // [documents + 1]; null: none
  int documents;
  bool inverse;                // by the other angle
  int block_tokens;            // tokens a block has
};

// Each document counts from 0, and so does what a row of the batch cuts off from its beginning.
__device__ __forceinline__ int64_t rope_position(const Rope& op, unsigned token, unsigned place) {
  if (op.positions != nullptr) {
    return op.positions[token];
  }
  if (op.cu_seqlens == nullptr) {
    return place;
  }
  int low = 0, high = op.documents;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (op.cu_seqlens[middle] <= static_cast<int64_t>(token)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return token - max(int64_t{op.cu_seqlens[low]}, int64_t{token - place});
}

// N / RUNS numbers from each of RUNS places, `apart` from each other.
template <int N, int RUNS>
__device__ __forceinline__ void load_angles(float (&x)[N], const float* table, int apart) {
  constexpr int kRun = N / RUNS, kAccess = kRun < 4 ? kRun : 4;
#pragma unroll
  for (int i = 0; i < N; i += kAccess) {
    float some[kAccess];
    Vector<float, kAccess>::load(table + i / kRun * apart + i % kRun).to(some);
#pragma unroll
    for (int j = 0; j < kAccess; ++j) {
      x[i + j] = some[j];
    }
  }
}

__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  const float turned = __fmaf_rn(a, cos, -(b * sin));
  b = __fmaf_rn(b, cos, a * sin);
  a = turned;
}

// N > 1: heads lie at multiples of 16 bytes, and half is a multiple of N. A thread has N neighbours in each half of a
// head: the pairs that they make with each other, or, interleaved, those that they make among themselves.
template <typename T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const __grid_constant__ Rope op) {
  constexpr bool kWithin = INTERLEAVED && N > 1;
  const int lanes = op.half / N, groups = (op.heads + kRopeHeads - 1) / kRopeHeads;
  for (int unit = static_cast<int>(threadIdx.x); unit < op.block_tokens * groups * lanes; unit += blockDim.x) {
    const int row = unit / lanes, lane = unit - row * lanes, own = row / groups, group = row - own * groups;
    const unsigned token = blockIdx.x * static_cast<unsigned>(op.block_tokens) + static_cast<unsigned>(own);
    if (token >= op.tokens) {
      return;
    }
    const unsigned batch = token / op.sequence, place = token - batch * op.sequence;
    const int first = INTERLEAVED && N == 1 ? 2 * lane : lane * N;
    const int second = INTERLEAVED && N == 1 ? first + 1 : op.half + first;

    Vector<T, N> a[kRopeHeads], b[kRopeHeads];
    T* out[kRopeHeads];
    bool rotate[kRopeHeads];
#pragma unroll
    for (int i = 0; i < kRopeHeads; ++i) {
      int head = group + i * groups, part = 0;
      if (head >= op.parts[0].heads) {
        head -= op.parts[0].heads;
        part = head >= op.parts[1].heads ? 2 : 1;
        head -= part == 2 ? op.parts[1].heads : 0;
      }
      const RopePart& p = op.parts[part];
      out[i] = nullptr;
      if (head < p.heads) {
        const T* in = static_cast<const T*>(p.in) + batch * p.in_batch + place * p.in_token + head * p.in_head;
        a[i] = Vector<T, N>::load(in + first);
        b[i] = Vector<T, N>::load(in + second);
        out[i] = static_cast<T*>(p.out) + batch * p.out_batch + place * p.out_token + head * p.out_head;
        rotate[i] = p.rotate;
      }
    }

    const int64_t position = rope_position(op, token, place);
    float cos[N], sin[N];
    if (position >= 0 && position < op.rows) {
      const int64_t at = position * op.half + (kWithin ? first / 2 : first / (INTERLEAVED ? 2 : 1));
      load_angles<N, kWithin ? 2 : 1>(cos, op.cos + at, op.half / 2);
      load_angles<N, kWithin ? 2 : 1>(sin, op.sin + at, op.half / 2);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        cos[j] = sin[j] = std::numeric_limits<float>::quiet_NaN();
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sin[j] = op.inverse ? -sin[j] : sin[j];
    }

#pragma unroll
    for (int i = 0; i < kRopeHeads; ++i) {
      if (out[i] == nullptr) {
        continue;
      }
      if (rotate[i]) {
        float x[N], y[N];
        a[i].to(x);
        b[i].to(y);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if constexpr (!kWithin) {
            turn(x[j], y[j], cos[j], sin[j]);
          } else if (j % 2 == 0) {
            turn(x[j], x[j + 1], cos[j / 2], sin[j / 2]);
            turn(y[j], y[j + 1], cos[(N + j) / 2], sin[(N + j) / 2]);
          }
        }
        a[i] = Vector<T, N>::from(x);
        b[i] = Vector<T, N>::from(y);
      }
      a[i].store(out[i] + first);
      b[i].store(out[i] + second);
    }
  }
}

// One token a block, or as many as make 128 threads.
template <typename T, int N>
void rotate_as(const char* name, Rope op, bool interleaved, cudaStream_t stream) {
  const int threads = (op.heads + kRopeHeads - 1) / kRopeHeads * (op.half / N);  // a token
  op.block_tokens = max(1, 128 / threads);
  const unsigned tile = static_cast<unsigned>(op.block_tokens);
  const Launch how{
      .op = name,
      .grid = dim3(op.tokens / tile + (op.tokens % tile != 0)),
      .block = dim3(static_cast<unsigned>(min(kRopeThreads, (op.block_tokens * threads + 31) / 32 * 32))),
      .stream = stream};
  launch(how, interleaved ? rope_kernel<T, N, true> : rope_kernel<T, N, false>, op);
}

}  // namespace megapre::cuda
