// Products of warpgroups (wgmma) as their threads see them. PTX ISA 8.0, "wgmma".
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulator {

// One m64nNk16 product of one thread of a warpgroup; N is 2 count.
struct Product {
  float* sums;
  int count;
  bool is_bf16, transposed, add;
  bool a_is_shared;
  uint64_t a_panel, b_panel;
  uint32_t a[4];
  float rows[2][16] = {};  // of A, where they come from registers: row g and row g + 8
  int group = 0;
};

class Products {
  struct Held {
    float* sums;
    std::vector<float> values;  // what the sums are, while the registers are poison
  };
  std::deque<Product> started_;  // and not done, in their order
  std::vector<Held> held_;
  std::deque<std::pair<float*, int>> used_;  // sums and the group of each product that was not waited for
  int group_ = 0;
  bool arrived_ = false;

  Held& held(const Product& product);
  void run_first();

 public:
  void arrive() { arrived_ = true; }
  void start(Product product);
  void commit();
  void wait(int groups);
};

// Of the thread that runs now.
inline Products& products() {
  return of_thread<Products>();
}

}  // namespace emulator
