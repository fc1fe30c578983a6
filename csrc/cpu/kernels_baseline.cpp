// The kernels for any CPU.
#include "kernels.h"

#define CPU_CAPABILITY baseline
#define CPU_VECTOR_BYTES 16
#include "kernels_impl.h"
