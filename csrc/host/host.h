// What the files of megapre._host share: each defines its functions on the module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace megapre {

// C-contiguous and of exactly this type: arguments are bound with noconvert where a silent copy would lose the result.
using Indices = pybind11::array_t<int32_t, pybind11::array::c_style>;

void define_sample_index(pybind11::module_& module);
void define_blend(pybind11::module_& module);

}  // namespace megapre
