// The Python module _cuda_on_cpu: the emulation's counters and settings. Loading it registers the CUDA ops for tensors
// on a CPU, as torch.ops.resnet_fused_cuda_on_cpu.
#undef TORCH_TARGET_VERSION  // it closes torch 2.10's pybind11, which is no part of the stable ABI
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/plan.h"
#include "emulator.h"

namespace py = pybind11;
using resnet_fused::cuda::Plan;

// Of the current device, for torch.frombuffer.
struct Memory {
  explicit Memory(size_t size)
      : data(static_cast<char*>(emulation::allocate(size, emulation::lane_of(nullptr)))), size(size) {}
  ~Memory() { emulation::release(data); }
  Memory(const Memory&) = delete;

  char* const data;
  const ssize_t size;
};

PYBIND11_MODULE(_cuda_on_cpu, m) {
  py::class_<emulation::Counters>(m, "Counters")
      .def_readonly("launches", &emulation::Counters::launches)
      .def_readonly("threads", &emulation::Counters::threads)
      .def_readonly("bytes_read", &emulation::Counters::bytes_read)
      .def_readonly("bytes_written", &emulation::Counters::bytes_written)
      .def_readonly("bytes_loaded", &emulation::Counters::bytes_loaded);
  m.def("counters", &emulation::counters);
  m.def("reset_counters", &emulation::reset_counters);
  m.def("set_seed", &emulation::set_seed);
  m.def("set_multiprocessors", [](int count) { emulation::multiprocessors = count; });

  using emulation::current_device, emulation::current_stream, emulation::Graph;
  const auto stream_of = [](intptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); };
  m.attr("PER_THREAD_STREAM") = reinterpret_cast<intptr_t>(cudaStreamPerThread);
  m.def("create_stream", [] { return reinterpret_cast<intptr_t>(emulation::create_stream()); });
  m.def("destroy_stream", [=](intptr_t stream) { emulation::destroy_stream(stream_of(stream)); });
  m.def("current_device", [] { return current_device(); });
  m.def("set_device", [](int device) { current_device() = device; });
  m.def("set_stream", [=](intptr_t stream) { current_stream(current_device()) = stream_of(stream); });
  py::class_<Memory>(m, "Memory", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](const Memory& memory) {
    return py::buffer_info(memory.data, memory.size);
  });
  m.def("allocations", &emulation::allocations);
  m.def("before_next_launch", &emulation::before_next_launch);
  m.def("fail_launch", [](int error, int after) { emulation::fail_launch(static_cast<cudaError_t>(error), after); });
  py::class_<Graph>(m, "Graph")
      .def(py::init([=](intptr_t stream) { return std::make_unique<Graph>(stream_of(stream)); }))
      .def("end", &Graph::end)
      .def("replay", &Graph::replay);

  py::class_<Plan>(m, "Plan")
      .def(py::init(&resnet_fused::cuda::make_plan), py::arg("outer"), py::arg("channels"), py::arg("inner"),
           py::arg("element_size"), py::arg("aligned") = true, py::arg("multiprocessors") = 132)
      .def_readonly("rows", &Plan::rows)
      .def_readonly("columns", &Plan::columns)
      .def_readonly("width", &Plan::width)
      .def_readonly("threads_x", &Plan::threads_x)
      .def_property_readonly("threads_y", [](const Plan& plan) -> int64_t { return plan.threads_y; })
      .def_property_readonly("tiles", [](const Plan& plan) -> int64_t { return plan.tiles; })
      .def_readonly("splits", &Plan::splits)
      .def_readonly("split_rows", &Plan::split_rows)
      .def_readonly("waves", &Plan::waves)
      .def_readonly("last_wave", &Plan::last_wave)
      .def_property_readonly("threads", &Plan::threads)
      .def_property_readonly("blocks", &Plan::blocks);
  m.def("quotient", [](int64_t n, int64_t by) { return n / resnet_fused::cuda::Divisor(by); });
  m.attr("max_threads") = resnet_fused::cuda::kMaxThreads;
  m.attr("resident_threads") = resnet_fused::cuda::kResidentThreads;
}
