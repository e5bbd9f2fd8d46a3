#include "products.h"

#include <cstring>

#include "asynchronous.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulator {
namespace {

constexpr unsigned kPoison = 0xFFFFFFFFu;

float element(const unsigned char* at, bool is_bf16) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return is_bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

// A matrix in shared memory as a descriptor says it.
struct Matrix {
  const unsigned char* memory;
  size_t bytes;
  uint32_t address, leading, stride;
  bool is_bf16;

  Matrix(const Units& units, uint64_t panel, bool is_bf16)
      : memory(units.seen.data()),
        bytes(units.seen.size()),
        address((panel & 0x3fff) << 4),
        leading((panel >> 16 & 0x3fff) << 4),
        stride((panel >> 32 & 0x3fff) << 4),
        is_bf16(is_bf16) {
    if (panel >> 62 != 1 || (panel >> 49 & 7) != 0) {
      fail("a matrix descriptor with another swizzle than that of 128 bytes, or with a base offset");
    }
  }

  float at(uint32_t place) const {
    place = swizzled(place);
    if (place + 2 > bytes) {
      fail("a matrix descriptor that leads past the end of shared memory");
    }
    return element(memory + place, is_bf16);
  }

  // Rows in groups of 8, `stride` apart; k along the row.
  float k_major(int row, int k) const {
    return at(address + row / 8 * stride + row % 8 * 128 + k * 2);
  }

  // k in groups of 8, `stride` apart; 64 columns along the row, the next 64 `leading` further.
  float mn_major(int column, int k) const {
    return at(address + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }
};

}  // namespace

Products::Held& Products::held(const Product& product) {
  for (Held& known : held_) {
    if (known.sums == product.sums) {
      return known;
    }
  }
  held_.push_back({product.sums, std::vector<float>(product.sums, product.sums + product.count)});
  std::memset(product.sums, 0xFF, product.count * sizeof(float));
  return held_.back();
}

void Products::start(Product product) {
  if (!arrived_) {
    fail("wgmma without wgmma.fence after the last wait");
  }
  if (blockDim.x % 128 != 0 || blockDim.y * blockDim.z != 1) {
    fail("wgmma in a block that is not whole warpgroups");
  }
  // All lanes come here, with the same descriptors.
  const uint64_t panels[2] = {product.a_panel, product.b_panel};
  const unsigned char* lanes = meet(0xffffffffu, panels, sizeof panels);
  for (int other = 0; other < kWarp; ++other) {
    if (std::memcmp(lanes + 16 * other, panels, sizeof panels) != 0) {
      fail("wgmma with different descriptors in the lanes of a warp");
    }
  }
  if (!product.a_is_shared) {
    lanes = meet(0xffffffffu, product.a, sizeof product.a);
    for (int k = 0; k < 16; ++k) {
      for (int half = 0; half < 2; ++half) {  // row g + 8 half
        const unsigned char* at = lanes + 16 * (lane() / 4 * 4 + k % 8 / 2) + 4 * (k / 8 * 2 + half) + k % 2 * 2;
        product.rows[half][k] = element(at, product.is_bf16);
      }
    }
  }
  held(product);
  product.group = group_;
  used_.emplace_back(product.sums, group_);
  started_.push_back(product);
  if (at_once()) {
    while (!started_.empty()) {
      run_first();
    }
  }
}

void Products::run_first() {
  const Product product = started_.front();
  started_.pop_front();
  const Units& here = units();
  const int row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + lane() / 4), column = static_cast<int>(lane() % 4 * 2);
  float a[2][16];
  std::memcpy(a, product.rows, sizeof a);
  if (product.a_is_shared) {
    const Matrix matrix(here, product.a_panel, product.is_bf16);
    for (int k = 0; k < 16; ++k) {
      a[0][k] = matrix.k_major(row, k);
      a[1][k] = matrix.k_major(row + 8, k);
    }
  }
  const Matrix matrix(here, product.b_panel, product.is_bf16);
  std::vector<float>& sums = held(product).values;
  for (int j = 0; j < product.count / 4; ++j) {
    for (int e = 0; e < 2; ++e) {
      const int n = 8 * j + column + e;
      float upper = product.add ? sums[4 * j + e] : 0.0f, lower = product.add ? sums[4 * j + 2 + e] : 0.0f;
      for (int k = 0; k < 16; ++k) {
        const float b = product.transposed ? matrix.mn_major(n, k) : matrix.k_major(n, k);
        upper += a[0][k] * b;
        lower += a[1][k] * b;
      }
      sums[4 * j + e] = upper;
      sums[4 * j + 2 + e] = lower;
    }
  }
}

void Products::commit() {
  ++group_;
}

void Products::wait(int groups) {
  arrived_ = false;  // registers are the threads' again
  while (!started_.empty() && started_.front().group < group_ - groups) {
    run_first();
  }
  while (!used_.empty() && used_.front().second < group_ - groups) {
    used_.pop_front();
  }
  for (size_t i = 0; i < held_.size();) {
    bool in_use = false;
    for (const auto& [sums, group] : used_) {
      in_use |= sums == held_[i].sums;
    }
    if (in_use) {
      ++i;
      continue;
    }
    for (size_t s = 0; s < held_[i].values.size(); ++s) {
      if (__float_as_uint(held_[i].sums[s]) != kPoison) {
        fail("sums of a product were written between its start and the wait for it");
      }
      held_[i].sums[s] = held_[i].values[s];
    }
    held_.erase(held_.begin() + static_cast<ptrdiff_t>(i));
  }
}

}  // namespace emulator
