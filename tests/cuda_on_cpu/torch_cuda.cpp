// What the glue asks of torch's CUDA part, for tensors on a CPU: the linker takes these functions before torch's own of
// the same names. Every tensor is a CUDA tensor; on device 0, where the emulation has not allocated it for another one.
#undef TORCH_TARGET_VERSION  // it closes ATen, which is no part of the stable ABI
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "runtime.h"

using namespace emulation;

struct DeviceGuardOpaque {
  int before;
};

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  const Allocation* const allocation = find(reinterpret_cast<at::Tensor*>(tensor)->storage().data());
  *index = allocation == nullptr ? 0 : allocation->lane.device;
  return AOTI_TORCH_SUCCESS;
}

// As torch's allocator does, for the device's current stream.
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t type,
                                        int32_t, int32_t device, AtenTensorHandle* tensor) {
  const at::IntArrayRef shape(sizes, static_cast<size_t>(dim)), steps(strides, static_cast<size_t>(dim));
  const at::ScalarType scalar_type = static_cast<at::ScalarType>(type);
  const int before = std::exchange(current_device(), device);
  void* const data =
      allocate(c10::multiply_integers(shape) * c10::elementSize(scalar_type), lane_of(current_stream(device)));
  current_device() = before;
  expect_written(data);
  *tensor = reinterpret_cast<AtenTensorHandle>(new at::Tensor(at::from_blob(data, shape, steps, release, scalar_type)));
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
  *stream = current_stream(device);
  return AOTI_TORCH_SUCCESS;
}
