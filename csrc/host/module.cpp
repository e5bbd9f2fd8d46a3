// megapre._host: the loops of data preparation that are too slow in Python. Each has a NumPy form with the same result.

#include "host.h"

PYBIND11_MODULE(_host, module) {
  module.doc() = "Index builders of megapre.data in C++.";
  megapre::define_sample_index(module);
  megapre::define_blend(module);
}
