// The glue, unmodified, for tensors on a CPU: every call's results are looked at before they are given back.
#define RESNET_FUSED_CUDA_ARCHITECTURES "8.0;9.0+PTX"
#include "../../csrc/cuda/batch_norm_add_relu.cpp"

namespace {

using namespace resnet_fused;

template <typename F>
auto checked(F f) {
  const emulation::Call call;
  auto results = f();
  call.check_results();
  return results;
}

struct Emulated {
  static ForwardResults forward(const ForwardArguments& a) {
    return checked([&] { return cuda::Cuda::forward(a); });
  }
  static BackwardResults backward(const BackwardArguments& a) {
    return checked([&] { return cuda::Cuda::backward(a); });
  }
  static Tensor statistics(const NormArguments& a) {
    return checked([&] { return cuda::Cuda::statistics(a); });
  }
};

}  // namespace

RESNET_FUSED_REGISTER(RESNET_FUSED_LIBRARY, CPU, Emulated)
