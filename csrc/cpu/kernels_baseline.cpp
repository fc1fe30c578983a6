// The kernels for any CPU.
#include "kernels.h"

#define CPU_CAPABILITY baseline
#include "kernels_impl.h"
