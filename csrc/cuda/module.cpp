// The Python module resnet_fused._CUDA: what was built. Loading it registers the kernels of the ops that
// resnet_fused._C declares.
#undef TORCH_TARGET_VERSION  // it closes torch 2.10's pybind11, which is no part of the stable ABI
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "The CUDA part of resnet_fused: kernels of the ops in torch.ops.resnet_fused.";
  m.def(
      "cuda_version",
      [] { return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10); },
      "The version of the CUDA toolkit it was compiled with, as '13.0'.");
  m.def(
      "arch_list", [] { return RESNET_FUSED_CUDA_ARCHITECTURES; },
      "The GPUs it was compiled for, as TORCH_CUDA_ARCH_LIST names them: '8.0;9.0+PTX'.");
}
