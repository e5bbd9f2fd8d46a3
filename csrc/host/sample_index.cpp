// The sample index of a GPT dataset, in one pass over the document index.
//
// Rules and names: megapre/data/gpt_index.py. Row k is where sample k starts, (place in `document`, token offset): walk
// s + x tokens from row k - 1 and step back x. The loop runs over sequences, not over samples, so that each sequence's
// length is read once; the lengths are gathered in shuffled order from an array much larger than the caches, so they are
// prefetched ahead of their use.

#include "host.h"

#include <cstdint>
#include <stdexcept>

namespace py = pybind11;

namespace megapre {
namespace {

constexpr int64_t kAhead = 32;  // sequences; enough to hide a miss to memory behind the work on those before

template <typename Length, typename Row>
void fill_rows(const Length* lengths, const int32_t* document, int64_t places, Row* rows, int64_t count,
               int64_t seq_length, int64_t extra) {
  rows[0] = rows[1] = 0;
  int64_t k = 1;
  int64_t start = 0;                  // tokens of the line before the sequence at `place`
  int64_t walk = seq_length + extra;  // tokens of the line up to which row k is walked
  for (int64_t place = 0; place < places && k <= count; ++place) {
    if (place + kAhead < places) __builtin_prefetch(&lengths[document[place + kAhead]]);
    const int64_t end = start + lengths[document[place]];
    while (walk <= end && k <= count) {
      rows[2 * k] = static_cast<Row>(place);
      rows[2 * k + 1] = static_cast<Row>(walk - extra - start);
      walk += seq_length;
      ++k;
    }
    start = end;
  }
  for (; k <= count; ++k) {  // tokens ran out: only the partial last sample gets here
    rows[2 * k] = static_cast<Row>(places - 1);
    rows[2 * k + 1] = static_cast<Row>(static_cast<int64_t>(lengths[document[places - 1]]) - extra);
  }
}

template <typename Length, typename Row>
void build(const py::array& lengths, const Indices& document, py::array& sample, int64_t seq_length, int64_t extra) {
  const auto* length = static_cast<const Length*>(lengths.data());
  const int32_t* place = document.data();
  auto* row = static_cast<Row*>(sample.mutable_data());
  const int64_t sequences = lengths.size();
  const int64_t places = document.size();
  const int64_t count = sample.shape(0) - 1;
  py::gil_scoped_release release;
  for (int64_t i = 0; i < places; ++i) {
    if (place[i] < 0 || place[i] >= sequences) throw std::out_of_range("a document lies outside of the lengths");
  }
  fill_rows<Length, Row>(length, place, places, row, count, seq_length, extra);
}

void build_sample_index(const py::array& lengths, const Indices& document, py::array sample, int64_t seq_length,
                        int64_t extra) {
  const bool contiguous = (lengths.flags() & sample.flags() & py::array::c_style) != 0;
  if (!contiguous || lengths.ndim() != 1 || document.ndim() != 1 || sample.ndim() != 2 || sample.shape(1) != 2) {
    throw std::invalid_argument("build_sample_index wants contiguous lengths [n], document [m] and sample [count + 1, 2]");
  }
  if (document.size() == 0 || sample.shape(0) < 1 || seq_length < 1) {
    throw std::invalid_argument("build_sample_index wants a document, a row and a positive seq_length");
  }
  const bool wide_length = py::isinstance<py::array_t<int64_t>>(lengths);
  const bool wide_row = py::isinstance<py::array_t<int64_t>>(sample);
  if ((!wide_length && !py::isinstance<py::array_t<int32_t>>(lengths)) ||
      (!wide_row && !py::isinstance<py::array_t<int32_t>>(sample))) {
    throw std::invalid_argument("build_sample_index wants int32 or int64 lengths and sample");
  }
  const auto chosen = wide_length ? (wide_row ? build<int64_t, int64_t> : build<int64_t, int32_t>)
                                  : (wide_row ? build<int32_t, int64_t> : build<int32_t, int32_t>);
  chosen(lengths, document, sample, seq_length, extra);
}

}  // namespace

void define_sample_index(py::module_& module) {
  module.def("build_sample_index", &build_sample_index, py::arg("lengths"), py::arg("document"), py::arg("sample"),
             py::arg("seq_length"), py::arg("extra"),
             "Fill sample [count + 1, 2] with (place in document, token offset) of each sample's start.");
}

}  // namespace megapre
