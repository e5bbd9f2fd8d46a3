// Registration of CUDA kernels under the schemas of csrc/ops.cpp. The emulator registers them elsewhere.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef MEGAPRE_OPS_NAMESPACE
#define MEGAPRE_OPS_NAMESPACE megapre
#define MEGAPRE_OPS_KEY CUDA
#endif

#define MEGAPRE_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(MEGAPRE_OPS_NAMESPACE, MEGAPRE_OPS_KEY, m)
