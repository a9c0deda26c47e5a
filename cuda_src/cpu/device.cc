// The CPU as a device: memory, packing, and the plan that runs operation after operation on the pool.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "host_matrix.h"

namespace vla {
namespace cpu {

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> list;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(&avx512bf16_kernels());
  if (avx512) list.push_back(&avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&avx2_kernels());
#endif
  list.push_back(&generic_kernels());
  return list;
}

namespace {

constexpr size_t kAlign = 256;

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory aligned(size_t bytes) {
  const size_t size = (bytes + kAlign - 1) / kAlign * kAlign + kAlign;  // vectors may read past a row's end
  auto* p = static_cast<std::byte*>(std::aligned_alloc(kAlign, size));
  if (!p) throw std::runtime_error("engine: out of memory: " + std::to_string(size) + " bytes");
  std::memset(p, 0, size);
  return Memory(p);
}

class CpuDevice;

class CpuPlan final : public Plan {
 public:
  CpuPlan(const CpuDevice& device, Script script) : device_(device), script_(std::move(script)) {}
  std::byte* input(int index) override { return script_.inputs.at(index).base; }
  const std::byte* output(int index) override { return script_.outputs.at(index).base; }
  void use(int, size_t) override {}
  void run() override;
  std::vector<double> profile() override;

 private:
  const CpuDevice& device_;
  Script script_;
};

class CpuDevice final : public Device {
 public:
  CpuDevice(DType act, int threads, const Kernels& kernels)
      : act_(act), threads_(threads), kernels_(kernels) {}

  std::string name() const override {
    return std::string("cpu (") + kernels_.name + ", " + std::to_string(threads_.count()) + " threads)";
  }
  DType act() const override { return act_; }

  std::byte* allocate(size_t bytes) override {
    memory_.push_back(aligned(bytes));
    return memory_.back().get();
  }
  void write(std::byte* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const std::byte* from, size_t bytes) override { std::memcpy(to, from, bytes); }

  // Panels of kPanel rows by all of k (see cpu/product.h); every part begins at a panel, the last is padded
  // with zeros. Interleaved: panels of the two parts alternate.
  Weight pack(Packing packing, const std::vector<HostMatrix>& parts, int) override {
    Weight w{nullptr, act_, packing, parts.at(0).k, {}};
    const int width = kernels_.panel, pair = act_ == DType::kBF16 ? 2 : 1;
    const int64_t panel_size = static_cast<int64_t>((w.k + pair - 1) / pair) * pair * width;
    int64_t total = 0;
    for (const HostMatrix& part : parts) {
      w.n.push_back(part.n);
      total += (part.n + width - 1) / width;
    }
    const size_t bytes = static_cast<size_t>(total * panel_size) * size_of(act_);
    std::byte* base = allocate(bytes);
    weight_bytes_ += bytes;
    int64_t first = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const HostMatrix& part = parts[i];
      const int count = (part.n + width - 1) / width;
      threads_.run(count, [&](int panel, int) {
        const int64_t slot =
            packing == Packing::kInterleaved ? panel * int64_t(parts.size()) + int64_t(i) : first + panel;
        std::byte* out = base + slot * panel_size * size_of(act_);
        for (int j = 0; j < width && panel * width + j < part.n; ++j) {
          for (int p = 0; p < part.k; ++p) {
            const int64_t at = (static_cast<int64_t>(p / pair) * width + j) * pair + p % pair;
            const float value = element(part, panel * width + j, p);
            if (act_ == DType::kBF16) {
              reinterpret_cast<uint16_t*>(out)[at] = float_to_bf16(value);
            } else {
              reinterpret_cast<float*>(out)[at] = value;
            }
          }
        }
      });
      first += count;
    }
    w.data = base;
    return w;
  }

  size_t weight_bytes() const override { return weight_bytes_; }
  size_t scratch_bytes() const override { return scratch_size_; }

  void run_once(const std::vector<Op>& ops) override {
    reserve(ops);
    run(ops, 0);
  }

  std::unique_ptr<Plan> plan(Script script) override {
    reserve(script.before);
    reserve(script.body);
    reserve(script.after);
    return std::make_unique<CpuPlan>(*this, std::move(script));
  }

  void run(const std::vector<Op>& ops, int step) const {
    const Context context{&threads_, scratch_.get(), act_};
    for (const Op& op : ops) kernels_.run(op, context, step);
  }

  void profile(const std::vector<Op>& ops, int step, double* seconds) const {
    const Context context{&threads_, scratch_.get(), act_};
    for (const Op& op : ops) {
      const auto start = std::chrono::steady_clock::now();
      kernels_.run(op, context, step);
      *seconds++ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }

 private:
  // Plans share one scratch: it only grows while plans are made.
  void reserve(const std::vector<Op>& ops) {
    size_t need = 0;
    for (const Op& op : ops) need = std::max(need, kernels_.scratch_bytes(op, threads_.count(), act_));
    if (need > scratch_size_ || !scratch_) {
      scratch_ = aligned(need);
      scratch_size_ = need;
    }
  }

  DType act_;
  mutable Threads threads_;
  const Kernels& kernels_;
  std::vector<Memory> memory_;
  Memory scratch_;
  size_t weight_bytes_ = 0, scratch_size_ = 0;
};

void CpuPlan::run() {
  device_.run(script_.before, 0);
  for (int step = 0; step < script_.steps; ++step) device_.run(script_.body, step);
  device_.run(script_.after, 0);
}

std::vector<double> CpuPlan::profile() {
  std::vector<double> seconds(script_.before.size() + script_.body.size() + script_.after.size());
  double* at = seconds.data();
  device_.profile(script_.before, 0, at);
  at += script_.before.size();
  for (int step = 0; step < script_.steps; ++step) device_.profile(script_.body, step, at);
  device_.profile(script_.after, 0, at + script_.body.size());
  return seconds;
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Device> make_cpu_device(DType act, int threads, const std::string& instruction_set) {
  std::string known;
  for (const cpu::Kernels* kernels : cpu::runnable_kernels()) {
    if (instruction_set.empty() || instruction_set == kernels->name) {
      return std::make_unique<cpu::CpuDevice>(act, threads, *kernels);
    }
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw std::runtime_error("engine: device 'cpu:" + instruction_set + "': this processor runs " + known);
}

}  // namespace vla
