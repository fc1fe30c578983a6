// What the glue asks of torch's CUDA part, for tensors on a CPU: the linker takes these functions before torch's own of
// the same names. Every tensor is a CUDA tensor; on device 0, where the emulation has not allocated it for another one.
#undef TORCH_TARGET_VERSION  // it closes ATen, which is no part of the stable ABI
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "runtime.h"
#include "torch_cuda.h"

using emulation::current_device;

namespace emulation {
namespace {

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type, int device) {
  const int before = std::exchange(current_device(), device);
  void* const data = allocate(c10::multiply_integers(sizes) * c10::elementSize(type), lane_of(current_stream(device)));
  current_device() = before;
  return at::from_blob(data, sizes, strides, release, type);
}

int device_of(const at::Tensor& tensor) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  const Allocation* const allocation = find(tensor.storage().data());
  return allocation == nullptr ? 0 : allocation->lane.device;
}

}  // namespace

at::Tensor to_device(const at::Tensor& tensor, int device) {
  return empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), device).copy_(tensor);
}

}  // namespace emulation

struct DeviceGuardOpaque {
  int before;
};

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = emulation::device_of(*reinterpret_cast<at::Tensor*>(tensor));
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t type,
                                        int32_t, int32_t device, AtenTensorHandle* result) {
  const auto length = static_cast<size_t>(dim);
  const at::ScalarType scalar_type = static_cast<at::ScalarType>(type);
  at::Tensor tensor = emulation::empty_strided({sizes, length}, {strides, length}, scalar_type, device);
  emulation::expect_written(tensor.storage().mutable_data());
  *result = reinterpret_cast<AtenTensorHandle>(new at::Tensor(std::move(tensor)));
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = new DeviceGuardOpaque{std::exchange(current_device(), device)};
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  current_device() = guard->before;
  delete guard;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = emulation::current_stream(device);
  return AOTI_TORCH_SUCCESS;
}
