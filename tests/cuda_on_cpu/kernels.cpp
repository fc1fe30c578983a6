// The CUDA kernels as C++: torch's build takes a .cu file to nvcc.
#include "../../csrc/cuda/batch_norm_add_relu.cu"
