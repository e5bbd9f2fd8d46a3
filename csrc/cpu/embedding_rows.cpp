// Row loops of the embedding's gradient. Compiled once per CPU level.

#include <algorithm>

#include "embedding.h"
#include "lanes.h"

namespace megapre::cpu::CPU_CAPABILITY {
namespace {

// out = in, or out + in where `keep`, in the accumulation type.
template <typename Out, typename In>
void add(const In* in, Out* out, int64_t width, bool keep) {
  for_lanes<In>(width, [&](int64_t i, auto... count) {
    auto v = load_lanes(in + i, count...);
    if (keep) {
      v = v + load_lanes(out + i, count...);
    }
    store_lanes(out + i, v, count...);
  });
}

template <typename T>
void add_row_of(const EmbeddingRow& row) {
  using A = acc_t<T>;
  A* sum = static_cast<A*>(row.sum);
  for (int64_t i = 0; i < row.count; ++i) {
    add<A, T>(static_cast<const T*>(row.dy) + row.tokens[i] * row.dy_stride, sum, row.width, i > 0);
  }
  if (row.total_dtype == row.dtype) {
    add<T, A>(sum, static_cast<T*>(row.total), row.width, row.accumulate);
  } else {
    add<A, A>(sum, static_cast<A*>(row.total), row.width, row.accumulate);
  }
}

void add_row(const EmbeddingRow& row) {
  with_type(row.dtype, [&](auto t) { add_row_of<decltype(t)>(row); });
}

}  // namespace

const EmbeddingKernels embedding_kernels{add_row};

}  // namespace megapre::cpu::CPU_CAPABILITY
