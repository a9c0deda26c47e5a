// One device's side of the engine: its memory, its packed weights, and how it runs a list of operations.
// cpu/ and cuda/ each have one. Nothing above this interface knows which it is.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops/ops.h"

namespace vla {

// A matrix of the checkpoint in host memory, row-major: (n, k) float32 or bfloat16, `ld` elements a row.
struct HostMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int n = 0, k = 0;
  int64_t ld = 0;
};

// What is run in one call: `before`, then `body` `steps` times, then `after`.
struct Script {
  std::vector<Op> before, body, after;
  int steps = 0;
  std::vector<View> inputs, outputs;  // in the order the caller knows them by
};

// What a row of an input is filled from; null for nothing.
struct Bytes {
  const std::byte* data = nullptr;
  size_t size = 0;
};

// A script made ready for its device. Not thread-safe: one run at a time.
class Plan {
 public:
  virtual ~Plan() = default;
  // Host memory that the caller fills (reads) before (after) run(); valid as long as the plan.
  virtual std::byte* input(int index) = 0;
  virtual const std::byte* output(int index) = 0;
  // Begins to fill rows of an input, and to send to the device what was filled, no more: a picture may be
  // smaller than its row. Where other threads do it, they are done after settle(), which run() does too, as
  // does stage() of any plan of the device; until then `rows` must not change, other inputs may. Rows in
  // memory that the device reads itself (host_memory()) are not copied, and must stay until the input is
  // staged again, and as they are until run() has returned. run() sends all inputs but the one that was
  // staged last, if no plan of the device ran since.
  virtual void stage(int index, const std::vector<Bytes>& rows) = 0;
  virtual void settle() {}
  // Everything from the inputs to the outputs; returns when the outputs can be read. Allocates nothing.
  virtual void run() = 0;
  // As run(), with the seconds that each operation took: `before`, then `body` (all steps together), then
  // `after`. Slower than run(), for looking; empty where the device cannot tell.
  virtual std::vector<double> profile() { return {}; }
  // Of what run() launches at once; 0 where it launches nothing.
  virtual size_t graph_nodes() const { return 0; }
};

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;
  virtual DType act() const = 0;  // what "act" means on this device: kF32 or kBF16
  // Zeroed memory, 256-byte aligned, owned by the device until it goes.
  virtual std::byte* allocate(size_t bytes) = 0;
  // Zeroed memory of the host, of the kind that stage() need not copy where the device has such.
  virtual std::shared_ptr<std::byte> host_memory(size_t bytes) const {
    return {new std::byte[bytes](), std::default_delete<std::byte[]>()};
  }
  virtual void write(std::byte* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const std::byte* from, size_t bytes) = 0;
  // `rows` tells for how many rows of x the product is wanted first: the layout may depend on it.
  virtual Weight pack(Packing packing, const std::vector<HostMatrix>& parts, int rows) = 0;
  // As pack(), as 8-bit integers with a scale for each row of W. Throws where the device has no int8.
  virtual Weight pack_int8(Packing, const std::vector<HostMatrix>&) {
    throw std::runtime_error("engine: precision: device '" + name() + "' has no int8, device 'cpu' has");
  }
  // Whether operands may be E4M3.
  virtual bool has_e4m3() const { return false; }
  // As pack(), as E4M3 with a scale for each row of W. Throws where the device has no E4M3.
  virtual Weight pack_fp8(Packing, const std::vector<HostMatrix>&) {
    throw std::runtime_error("engine: precision: device '" + name() +
                             "' has no fp8, device 'cuda' of compute capability 9.0 has");
  }
  // Bytes held for packed weights and allocations, scratch included.
  virtual size_t weight_bytes() const = 0;
  virtual size_t scratch_bytes() const = 0;
  // Bytes of the device's own memory that are in use, by whatever program; 0 where it has none.
  virtual size_t memory_in_use() const { return 0; }
  // Bytes a second, read and written, of the quickest of a few copies within the device's own memory; 0 where
  // it has none. Takes twice `bytes` meanwhile.
  virtual double copy_rate(size_t) { return 0; }
  // Runs operations once, at load (tables).
  virtual void run_once(const std::vector<Op>& ops) = 0;
  virtual std::unique_ptr<Plan> plan(Script script) = 0;
};

// instruction_set: one of runnable_kernels() (cpu/kernels.h), "" for the best.
std::unique_ptr<Device> make_cpu_device(DType act, int threads, const std::string& instruction_set);
// In builds with CUDA. threads: of the host that fill inputs, the caller's included; 0: a few.
std::unique_ptr<Device> make_cuda_device(DType act, int index, int threads);

}  // namespace vla
