// The kernels for CPUs with AVX2. Headers come before the pragma, which widens all that follows.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define CPU_CAPABILITY avx2
#define CPU_VECTOR_BYTES 32
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
