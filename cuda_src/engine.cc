#include "engine.h"

#include <stdexcept>

#include "cpu/kernels.h"
#include "host_matrix.h"
#include "ops/check.h"

namespace vla {

const char* version() { return VLA_VERSION; }

bool built_with_cuda() {
#ifdef VLA_WITH_CUDA
  return true;
#else
  return false;
#endif
}

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::Kernels* kernels : cpu::runnable_kernels()) names.push_back(kernels->name);
  return names;
}

namespace {

// More than any machine has: sizes beyond it are wrong, and would overflow in sums.
constexpr size_t kMostBytes = size_t{1} << 46;

void check_size(size_t bytes) {
  if (bytes > kMostBytes)
    throw std::invalid_argument("engine: " + std::to_string(bytes) + " bytes asked for");
}

void check_dtype(DType dtype) {
  const int code = static_cast<int>(dtype);
  if (code < 0 || code > static_cast<int>(DType::kE4M3) || dtype == DType::kI8)
    throw std::invalid_argument("engine: no such type: " + std::to_string(code));
}

}  // namespace

struct Engine::Impl {
  struct Stored {
    std::byte* data;
    size_t size;
  };
  std::unique_ptr<Device> device;
  std::vector<Weight> weights;
  std::vector<Stored> stored;
  std::byte* arena = nullptr;
  size_t arena_size = 0, table_size = 0, stored_size = 0;

  int keep(const void* values, size_t bytes) {
    check_size(bytes);
    std::byte* to = device->allocate(bytes);
    device->write(to, values, bytes);
    stored_size += bytes;
    stored.push_back({to, bytes});
    return static_cast<int>(stored.size()) - 1;
  }
};

namespace {

std::unique_ptr<Device> make_device(const std::string& name, DType act, int threads) {
  if (name == "cpu") return make_cpu_device(act, threads, "");
  if (name.starts_with("cpu:")) return make_cpu_device(act, threads, name.substr(4));
#ifdef VLA_WITH_CUDA_DEVICE
  if (name == "cuda") return make_cuda_device(act, 0, threads);
#else
  if (name == "cuda") {
    throw std::runtime_error("engine: device 'cuda': this build has no CUDA executor; use device 'cpu'");
  }
#endif
  throw std::runtime_error("engine: device: expected 'cpu' or 'cuda', got '" + name + "'");
}

}  // namespace

Engine::Engine(const std::string& device, DType act, int threads) : impl_(std::make_unique<Impl>()) {
  impl_->device = make_device(device, act, threads);
}
Engine::~Engine() = default;

std::string Engine::device_name() const { return impl_->device->name(); }
DType Engine::act() const { return impl_->device->act(); }

namespace {
void check_parts(Packing packing, const std::vector<HostMatrix>& parts) {
  if (parts.empty()) throw std::invalid_argument("pack: expected at least one matrix");
  if (packing != Packing::kStacked && packing != Packing::kInterleaved)
    throw std::invalid_argument("pack: no such packing");
  for (const HostMatrix& part : parts) {
    const bool fits = part.k == parts[0].k && part.n > 0 && part.k > 0 &&
                      (packing == Packing::kStacked || (part.n == parts[0].n && parts.size() == 2));
    if (!fits) throw std::invalid_argument("pack: matrices that do not go together");
  }
}
}  // namespace

int Engine::pack(Packing packing, const std::vector<HostMatrix>& parts, int rows) {
  check_parts(packing, parts);
  impl_->weights.push_back(impl_->device->pack(packing, parts, rows));
  return static_cast<int>(impl_->weights.size()) - 1;
}

int Engine::pack_int8(Packing packing, const std::vector<HostMatrix>& parts) {
  check_parts(packing, parts);
  constexpr int kMost = 65000;  // 255 * 127 * k stays in 32 bits
  if (parts[0].k > kMost) throw std::invalid_argument("pack: more columns than int8 sums hold");
  impl_->weights.push_back(impl_->device->pack_int8(packing, parts));
  return static_cast<int>(impl_->weights.size()) - 1;
}

int Engine::pack_fp8(Packing packing, const std::vector<HostMatrix>& parts) {
  check_parts(packing, parts);
  impl_->weights.push_back(impl_->device->pack_fp8(packing, parts));
  return static_cast<int>(impl_->weights.size()) - 1;
}

int Engine::store(const HostMatrix& m, DType as) {
  if (m.n <= 0 || m.k <= 0) throw std::invalid_argument("store: expected positive sizes");
  if (as != DType::kF32 && as != DType::kBF16) throw std::invalid_argument("store: expected a float type");
  const size_t count = static_cast<size_t>(m.n) * m.k;
  if (as == m.dtype && m.ld == m.k) return impl_->keep(m.data, count * size_of(as));
  std::vector<std::byte> values(count * size_of(as));
  for (int i = 0; i < m.n; ++i) {
    for (int j = 0; j < m.k; ++j) {
      const size_t at = static_cast<size_t>(i) * m.k + j;
      if (as == DType::kBF16) {
        reinterpret_cast<uint16_t*>(values.data())[at] = float_to_bf16(element(m, i, j));
      } else {
        reinterpret_cast<float*>(values.data())[at] = element(m, i, j);
      }
    }
  }
  return impl_->keep(values.data(), values.size());
}

int Engine::store_ints(const int32_t* values, int rows, int cols) {
  if (rows <= 0 || cols <= 0) throw std::invalid_argument("store: expected positive sizes");
  return impl_->keep(values, sizeof(int32_t) * rows * cols);
}

void Engine::reserve(size_t arena_bytes) {
  if (impl_->arena) throw std::logic_error("engine: the arena is reserved already");
  check_size(arena_bytes);
  impl_->arena = impl_->device->allocate(arena_bytes);
  impl_->arena_size = arena_bytes;
}

size_t Engine::weight_bytes() const { return impl_->device->weight_bytes() + impl_->stored_size; }
std::shared_ptr<std::byte> Engine::host_memory(size_t bytes) const {
  return impl_->device->host_memory(bytes);
}
size_t Engine::memory_in_use() const { return impl_->device->memory_in_use(); }
double Engine::copy_rate(size_t bytes) { return impl_->device->copy_rate(bytes); }
size_t Engine::arena_bytes() const {
  return impl_->arena_size + impl_->table_size + impl_->device->scratch_bytes();
}

struct Program::Impl {
  Engine::Impl& engine;
  std::byte* tables = nullptr;
  size_t table_bytes = 0;
  std::vector<Op> at_load;
  Script script;
  std::unique_ptr<Plan> plan;

  struct Moving {
    size_t end, room;  // bytes: of the memory used at the first step, and there is
    int64_t step;
  };
  std::vector<Moving> moving;
  std::vector<View> inputs;  // of the plan

  // The view of a place, within its memory at the first step; of what moves with the loop it keeps note.
  View view(const Place& p, const std::string& name) {
    const auto fail = [&name](const char* what) { throw std::invalid_argument("program: " + name + what); };
    size_t size = 0;
    std::byte* base = nullptr;
    if (p.store == Place::kArena) {
      base = engine.arena, size = engine.arena_size;
      if (!base) throw std::logic_error("program: the arena is not reserved yet");
    } else if (p.store == Place::kTables) {
      base = tables, size = table_bytes;
    } else if (p.store >= 0 && static_cast<size_t>(p.store) < engine.stored.size()) {
      base = engine.stored[p.store].data, size = engine.stored[p.store].size;
    }
    if (!base) fail(": no such memory");
    check_dtype(p.dtype);
    const int64_t unit = static_cast<int64_t>(size_of(p.dtype)), room = static_cast<int64_t>(size);
    if (p.rows <= 0 || p.cols <= 0 || p.ld < p.cols)
      fail(": expected positive sizes, and rows that do not overlap");
    if (p.offset < 0 || p.step_bytes < 0 || p.offset % unit || p.step_bytes % unit)
      fail(": not on an element");
    if (p.offset > room || p.cols > room || (p.rows > 1 && p.ld > room / (p.rows - 1)))
      fail(": outside its memory");
    const int64_t end = p.offset + ((p.rows - 1) * p.ld + p.cols) * unit;
    if (end > room) fail(": outside its memory");
    if (p.step_bytes) moving.push_back({static_cast<size_t>(end), size, p.step_bytes});
    return {base + p.offset, p.rows, p.cols, p.ld, p.step_bytes, p.dtype};
  }
};

Program::Program(Engine& engine, size_t table_bytes)
    : impl_(std::make_unique<Impl>(Impl{*engine.impl_, nullptr, table_bytes, {}, {}, nullptr, {}, {}})) {
  check_size(table_bytes);
  if (table_bytes) impl_->tables = engine.impl_->device->allocate(table_bytes);
  engine.impl_->table_size += table_bytes;
}
Program::~Program() = default;

void Program::add(Phase phase, const std::string& kind, const std::map<std::string, Place>& operands,
                  const std::vector<int>& weights, const std::map<std::string, double>& attrs) {
  Recorded recorded{kind, {}, {}, attrs};
  if (phase < Phase::kAtLoad || phase > Phase::kAfter) throw std::invalid_argument("program: no such phase");
  for (const auto& [name, place] : operands) {
    recorded.operands[name] = impl_->view(place, kind + ": operand '" + name + "'");
  }
  for (int w : weights) {
    if (w < 0 || static_cast<size_t>(w) >= impl_->engine.weights.size())
      throw std::invalid_argument("program: " + kind + ": no such weight");
    recorded.weights.push_back(impl_->engine.weights[w]);
  }
  std::vector<Op>& list = phase == Phase::kAtLoad   ? impl_->at_load
                          : phase == Phase::kBefore ? impl_->script.before
                          : phase == Phase::kLoop   ? impl_->script.body
                                                    : impl_->script.after;
  Op op = parse(recorded);
  const Device& device = *impl_->engine.device;
  check(op, {device.act(), device.has_e4m3()}, kind);
  list.push_back(std::move(op));
}

void Program::finish(int steps, const std::vector<Place>& inputs, const std::vector<Place>& outputs) {
  if (impl_->plan) throw std::logic_error("program: finished already");
  if (steps < 0 || steps > 1 << 20)
    throw std::invalid_argument("program: " + std::to_string(steps) + " steps");
  for (const Impl::Moving& m : impl_->moving) {
    if (steps > 1 && m.step > static_cast<int64_t>(m.room - m.end) / (steps - 1))
      throw std::invalid_argument("program: an operand of the loop leaves its memory");
  }
  impl_->engine.device->run_once(impl_->at_load);
  impl_->script.steps = steps;
  for (const Place& p : inputs) impl_->script.inputs.push_back(impl_->view(p, "an input"));
  for (const Place& p : outputs) impl_->script.outputs.push_back(impl_->view(p, "an output"));
  impl_->inputs = impl_->script.inputs;
  impl_->plan = impl_->engine.device->plan(std::move(impl_->script));
}

namespace {
Plan& finished(const std::unique_ptr<Plan>& plan) {
  if (!plan) throw std::logic_error("program: not finished");
  return *plan;
}
}  // namespace

std::byte* Program::input(int index) { return finished(impl_->plan).input(index); }
const std::byte* Program::output(int index) { return finished(impl_->plan).output(index); }
void Program::stage(int index, const std::vector<Bytes>& rows) {
  Plan& plan = finished(impl_->plan);
  const View& v = impl_->inputs.at(index);
  if (rows.size() > static_cast<size_t>(v.rows))
    throw std::invalid_argument("program: an input of " + std::to_string(v.rows) + " rows staged with " +
                                std::to_string(rows.size()));
  const size_t room = v.cols * size_of(v.dtype);
  for (const Bytes& row : rows) {
    if (row.size > room)
      throw std::invalid_argument("program: an input with rows of " + std::to_string(room) +
                                  " bytes staged with " + std::to_string(row.size));
  }
  plan.stage(index, rows);
}
void Program::settle() { finished(impl_->plan).settle(); }
void Program::run() { finished(impl_->plan).run(); }
std::vector<double> Program::profile() { return finished(impl_->plan).profile(); }
size_t Program::graph_nodes() const { return finished(impl_->plan).graph_nodes(); }

}  // namespace vla
