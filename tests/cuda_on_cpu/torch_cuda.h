// Of torch_cuda.cpp, for the Python module.
#pragma once

#include <ATen/core/Tensor.h>

namespace emulation {

at::Tensor to_device(const at::Tensor&, int device);

}  // namespace emulation
