// Which compilation of the kernels runs: the widest that the CPU has, or what RESNET_FUSED_CPU_CAPABILITY says.
#pragma once

#include <string>

#include "kernels.h"

namespace resnet_fused {

// "baseline", "avx2" or "avx512". Throws std::invalid_argument where the environment variable asks for another, or for
// one that this CPU lacks.
const std::string& cpu_capability();

const Kernels& kernels(ElementType);

}  // namespace resnet_fused
