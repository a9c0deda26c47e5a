#include <pybind11/pybind11.h>

#include "engine.h"

PYBIND11_MODULE(_engine, module) {
  module.doc() = "The C++ engine of vla_infer.";
  module.def("version", &vla::version, "Version of the package the engine was built for.");
  module.def("built_with_cuda", &vla::built_with_cuda, "Whether the CUDA executor was built in.");
}
