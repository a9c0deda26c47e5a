// The engine: one device, the weights it holds, and the programs (one a prompt bucket) that share them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "ops/parse.h"

#ifdef _WIN32
#define VLA_API
#else
#define VLA_API __attribute__((visibility("default")))
#endif

namespace vla {

VLA_API const char* version();
VLA_API bool built_with_cuda();
// Names of the instruction sets that the CPU device can use here, the best first.
VLA_API std::vector<std::string> cpu_instruction_sets();

// Where an operand lies: in the arena shared by all programs, in the program's own tables, or a stored
// tensor.
struct Place {
  static constexpr int kArena = -1, kTables = -2;
  int store = kArena;  // or the number of a stored tensor
  int64_t offset = 0;  // bytes
  int rows = 0, cols = 0;
  int64_t ld = 0, step_bytes = 0;
  DType dtype = DType::kF32;
};

enum class Phase : int { kAtLoad = 0, kBefore = 1, kLoop = 2, kAfter = 3 };

class VLA_API Engine {
 public:
  // device: "cpu", "cpu:" and an instruction set, or "cuda" (throws std::runtime_error where it cannot be
  // had); threads: of the CPU, 0: all processors; on a GPU those that fill its inputs, 0: a few.
  Engine(const std::string& device, DType act, int threads);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::string device_name() const;
  DType act() const;
  // All return a number to refer to what was stored. Values are copied (converted) to the device.
  int pack(Packing packing, const std::vector<HostMatrix>& parts, int rows);
  int pack_int8(Packing packing, const std::vector<HostMatrix>& parts);
  int pack_fp8(Packing packing, const std::vector<HostMatrix>& parts);
  int store(const HostMatrix& values, DType as);
  int store_ints(const int32_t* values, int rows, int cols);
  // One arena for all programs; to be called once, before the first program is finished.
  void reserve(size_t arena_bytes);
  size_t weight_bytes() const;
  size_t arena_bytes() const;  // the arena, tables and scratch
  // Of the device, see Device.
  size_t memory_in_use() const;
  // See Device::host_memory; outlives the engine.
  std::shared_ptr<std::byte> host_memory(size_t bytes) const;
  double copy_rate(size_t bytes);

 private:
  friend class Program;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class VLA_API Program {
 public:
  Program(Engine& engine, size_t table_bytes);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void add(Phase phase, const std::string& kind, const std::map<std::string, Place>& operands,
           const std::vector<int>& weights, const std::map<std::string, double>& attrs);
  // Runs what is to be run at load and makes the plan.
  void finish(int steps, const std::vector<Place>& inputs, const std::vector<Place>& outputs);
  std::byte* input(int index);
  const std::byte* output(int index);
  // Fills rows of an input, see Plan::stage; throws std::invalid_argument where one is too long.
  void stage(int index, const std::vector<Bytes>& rows);
  void settle();
  void run();
  // Seconds of each operation that is not run at load, in the order they were added.
  std::vector<double> profile();
  size_t graph_nodes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vla
