// The Python module vla_infer._engine: a thin layer over engine.h. The interpreter's lock is let go while a
// program runs. Places are tuples (store, offset, rows, cols, ld, step bytes, dtype), see
// vla_infer/engine.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "engine.h"
#include "errors.h"

namespace py = pybind11;
using vla::DType;
using vla::Place;

namespace {

using PlaceTuple = std::tuple<int, int64_t, int, int, int64_t, int64_t, int>;

Place place(const PlaceTuple& t) {
  const auto& [store, offset, rows, cols, ld, step, dtype] = t;
  return {store, offset, rows, cols, ld, step, static_cast<DType>(dtype)};
}

std::vector<Place> places(const std::vector<PlaceTuple>& tuples) {
  std::vector<Place> out;
  for (const PlaceTuple& t : tuples) out.push_back(place(t));
  return out;
}

// float32, or uint16 holding bfloat16 bits; rows may be strided (columns of a wider matrix).
vla::HostMatrix matrix(const py::array& a) {
  if (a.ndim() != 2) throw std::invalid_argument("engine: expected a matrix");
  const bool f32 = py::isinstance<py::array_t<float>>(a), bf16 = py::isinstance<py::array_t<uint16_t>>(a);
  if (!f32 && !bf16) throw std::invalid_argument("engine: expected float32 or bfloat16 (as uint16)");
  if (a.strides(1) != a.itemsize()) throw std::invalid_argument("engine: expected rows without gaps");
  return {a.data(), f32 ? DType::kF32 : DType::kBF16, static_cast<int>(a.shape(0)),
          static_cast<int>(a.shape(1)), static_cast<int64_t>(a.strides(0) / a.itemsize())};
}

std::vector<vla::HostMatrix> matrices(const std::vector<py::array>& parts) {
  std::vector<vla::HostMatrix> list;
  for (const py::array& part : parts) list.push_back(matrix(part));
  return list;
}

vla::Bytes dense(const py::array& a) {
  if (!py::isinstance<py::array_t<uint8_t>>(a) || !(a.flags() & py::array::c_style))
    throw std::invalid_argument("engine: expected uint8 without gaps");
  return {static_cast<const std::byte*>(a.data()), static_cast<size_t>(a.nbytes())};
}

using Rows = std::vector<std::optional<py::array>>;

// A program with the arrays that its inputs are filled from, until others are staged: the device may read
// them itself. The base that is named first goes last: by then nothing reads them.
struct Staged {
  Rows staged;
};
struct StagedProgram : Staged, vla::Program {
  using vla::Program::Program;
};

// A NumPy array over memory of the program; it keeps the program alive.
py::array over(py::object owner, const void* data, const PlaceTuple& t) {
  const auto& [store, offset, rows, cols, ld, step, dtype] = t;
  const DType type = static_cast<DType>(dtype);
  const py::dtype format = type == DType::kF32       ? py::dtype::of<float>()
                           : type == DType::kI32     ? py::dtype::of<int32_t>()
                           : vla::size_of(type) == 1 ? py::dtype::of<uint8_t>()
                                                     : py::dtype::of<uint16_t>();
  const auto size = static_cast<py::ssize_t>(vla::size_of(type));
  return py::array(format, {py::ssize_t{rows}, py::ssize_t{cols}}, {ld * size, size}, data, owner);
}

// What the engine throws, as the package's own exceptions; pybind11's are left to it.
void translate(std::exception_ptr thrown) {
  const auto raise = [](const char* type, const std::exception& error) {
    py::set_error(py::module_::import("vla_infer.errors").attr(type), error.what());
  };
  try {
    std::rethrow_exception(thrown);
  } catch (const py::builtin_exception&) {
    throw;
  } catch (const vla::DeviceLost& error) {
    raise("DeviceLostError", error);
  } catch (const std::runtime_error& error) {
    raise("EngineError", error);
  } catch (const std::logic_error& error) {
    raise("EngineError", error);
  }
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  py::register_local_exception_translator(translate);
  m.doc() = "The engine behind vla_infer.engine. Private.";
  m.def("version", &vla::version);
  m.def("built_with_cuda", &vla::built_with_cuda);
  m.def("cpu_instruction_sets", &vla::cpu_instruction_sets);

  py::class_<vla::Engine>(m, "Engine")
      .def(py::init([](const std::string& device, bool bf16, int threads) {
             return std::make_unique<vla::Engine>(device, bf16 ? DType::kBF16 : DType::kF32, threads);
           }),
           py::kw_only(), py::arg("device"), py::arg("bf16"), py::arg("threads"))
      .def_property_readonly("device_name", &vla::Engine::device_name)
      .def_property_readonly("weight_bytes", &vla::Engine::weight_bytes)
      .def_property_readonly("arena_bytes", &vla::Engine::arena_bytes)
      .def_property_readonly("memory_in_use", &vla::Engine::memory_in_use)
      .def("host_memory",
           [](const vla::Engine& engine, size_t bytes) {
             auto* memory = new std::shared_ptr<std::byte>(engine.host_memory(bytes));
             const py::capsule owner(memory,
                                     [](void* p) { delete static_cast<std::shared_ptr<std::byte>*>(p); });
             return py::array(py::dtype::of<uint8_t>(), {static_cast<py::ssize_t>(bytes)}, {py::ssize_t{1}},
                              memory->get(), owner);
           })
      .def("copy_rate", &vla::Engine::copy_rate, py::call_guard<py::gil_scoped_release>())
      .def("pack",
           [](vla::Engine& e, int packing, const std::vector<py::array>& parts, int rows) {
             const std::vector<vla::HostMatrix> given = matrices(parts);
             py::gil_scoped_release release;
             return e.pack(static_cast<vla::Packing>(packing), given, rows);
           })
      .def("pack_int8",
           [](vla::Engine& e, int packing, const std::vector<py::array>& parts) {
             const std::vector<vla::HostMatrix> given = matrices(parts);
             py::gil_scoped_release release;
             return e.pack_int8(static_cast<vla::Packing>(packing), given);
           })
      .def("pack_fp8",
           [](vla::Engine& e, int packing, const std::vector<py::array>& parts) {
             const std::vector<vla::HostMatrix> given = matrices(parts);
             py::gil_scoped_release release;
             return e.pack_fp8(static_cast<vla::Packing>(packing), given);
           })
      .def("store", [](vla::Engine& e, const py::array& a,
                       int dtype) { return e.store(matrix(a), static_cast<DType>(dtype)); })
      .def("store_ints",
           [](vla::Engine& e, const py::array_t<int32_t, py::array::c_style>& a) {
             if (a.ndim() != 2) throw std::invalid_argument("engine: expected a matrix");
             return e.store_ints(a.data(), static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1)));
           })
      .def("reserve", &vla::Engine::reserve);

  py::class_<StagedProgram>(m, "Program")
      .def(py::init<vla::Engine&, size_t>(), py::keep_alive<1, 2>())
      .def("add",
           [](StagedProgram& p, int phase, const std::string& kind,
              const std::map<std::string, PlaceTuple>& operands, const std::vector<int>& weights,
              const std::map<std::string, double>& attrs) {
             std::map<std::string, Place> named;
             for (const auto& [name, t] : operands) named[name] = place(t);
             p.add(static_cast<vla::Phase>(phase), kind, named, weights, attrs);
           })
      .def(
          "finish",
          [](StagedProgram& p, int steps, const std::vector<PlaceTuple>& inputs,
             const std::vector<PlaceTuple>& outputs) { p.finish(steps, places(inputs), places(outputs)); },
          py::call_guard<py::gil_scoped_release>())
      .def("input",
           [](py::object self, int index, const PlaceTuple& t) {
             return over(self, self.cast<StagedProgram&>().input(index), t);
           })
      .def("output",
           [](py::object self, int index, const PlaceTuple& t) {
             return over(self, self.cast<StagedProgram&>().output(index), t);
           })
      // rows: uint8 arrays without gaps, None for one that is left as it is
      .def("stage",
           [](StagedProgram& p, int index, Rows rows) {
             std::vector<vla::Bytes> given;
             for (const auto& row : rows) given.push_back(row ? dense(*row) : vla::Bytes{});
             {
               py::gil_scoped_release release;
               p.stage(index, given);
             }
             p.staged = std::move(rows);  // those before are settled
           })
      .def("settle", &StagedProgram::settle, py::call_guard<py::gil_scoped_release>())
      .def("profile", &StagedProgram::profile, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("graph_nodes", &StagedProgram::graph_nodes)
      .def(
          "run",
          [](StagedProgram& p, int times) {
            for (int i = 0; i < times; ++i) p.run();
          },
          py::arg("times") = 1, py::call_guard<py::gil_scoped_release>());
}
