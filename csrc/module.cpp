// The Python module resnet_fused._C: what was built. Loading it registers the ops.
#undef TORCH_TARGET_VERSION  // it closes torch 2.10's pybind11, which is no part of the stable ABI
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "contents.h"
#include "cpu/capability.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ part of resnet_fused; its ops are in torch.ops.resnet_fused.";
  m.def("cpu_capability", &resnet_fused::cpu_capability,
        "The instruction set the CPU kernels run with: 'baseline', 'avx2' or 'avx512'. ValueError where "
        "RESNET_FUSED_CPU_CAPABILITY asks for one that there isn't.");
  pybind11::class_<resnet_fused::Contents>(m, "Contents", "What memory held; of (address, sizes, strides, item size).")
      .def(pybind11::init<const std::vector<resnet_fused::Contents::Tensor>&>())
      .def("holds", &resnet_fused::Contents::holds, "Whether it still does.")
      .def_property_readonly("nbytes", &resnet_fused::Contents::nbytes);
}
