// The CPU as a device: memory, packing, and the plan that runs operation after operation on the pool.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

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
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) list.push_back(&avx512bf16_kernels());
  if (vnni) list.push_back(&avx512vnni_kernels());
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

// Memory for `bytes` that begins on a large page where it fills one. Large pages where the system has them: a
// panel is read once through, and a miss of the translation stops what is fetched ahead. Best effort.
Memory reserved(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  const size_t align = bytes < kPage ? kAlign : kPage;
  const size_t size = (bytes + align - 1) / align * align;
  auto* p = static_cast<std::byte*>(std::aligned_alloc(align, size));
  if (!p) throw std::runtime_error("engine: out of memory: " + std::to_string(size) + " bytes");
#ifdef __linux__
  if (align == kPage) madvise(p, size, MADV_HUGEPAGE);
#endif
  return Memory(p);
}

// Zeroed memory of a device, which goes with it, cut from large pieces: matrices of a megabyte or two, each
// by itself, would lie on large pages only in part. What is not asked for is not touched.
class Pool {
 public:
  std::byte* allocate(size_t bytes) {
    const size_t size = (bytes + kAlign - 1) / kAlign * kAlign + kAlign;  // vectors may read past a row's end
    if (size > left_) {
      left_ = std::max(size, kPiece);
      pieces_.push_back(reserved(left_));
      next_ = pieces_.back().get();
    }
    std::byte* p = next_;
    next_ += size;
    left_ -= size;
    std::memset(p, 0, size);
    return p;
  }

 private:
#if defined(__SANITIZE_ADDRESS__) || defined(VLA_LIBFUZZER)
  static constexpr size_t kPiece = 0;  // each by itself, so that what runs over one is seen
#else
  static constexpr size_t kPiece = size_t{32} << 20;
#endif
  std::vector<Memory> pieces_;
  std::byte* next_ = nullptr;
  size_t left_ = 0;
};

// An operation of fewer sums than this is done by the calling thread: below some ten microseconds, waking the
// others costs more than they bring, and on a busy machine they may come late.
constexpr double kAloneBelow = 2e6;

double work(const View& x, const Weight& w) { return 1.0 * x.rows * w.k * w.rows(); }
double work(const Linear& op) { return work(op.x, op.w); }
double work(const GatedLinear& op) { return work(op.x, op.w); }
double work(const Qkv& op) { return work(op.x, op.w); }
double work(const Euler& op) { return work(op.h, op.w); }
double work(const Attention& op) { return 2.0 * op.q.rows * op.q.cols * (op.k.rows / op.batch); }
// Those that only move values count what they write, times about what a value costs in sums.
double work(const ImagePatches& op) { return 200.0 * op.out.rows * op.out.cols; }
double work(const SpaceToDepth& op) { return 20.0 * op.out.rows * op.out.cols; }
double work(const Embed& op) { return 5.0 * op.out.rows * op.out.cols; }

struct Planned {
  Op op;
  bool alone;
};

std::vector<Planned> planned(std::vector<Op> ops) {
  std::vector<Planned> list;
  list.reserve(ops.size());
  for (Op& op : ops) {
    const bool alone = std::visit([](const auto& o) { return work(o); }, op) < kAloneBelow;
    list.push_back({std::move(op), alone});
  }
  return list;
}

class CpuDevice;

class CpuPlan final : public Plan {
 public:
  CpuPlan(const CpuDevice& device, Script script)
      : device_(device),
        before_(planned(std::move(script.before))),
        body_(planned(std::move(script.body))),
        after_(planned(std::move(script.after))),
        steps_(script.steps),
        inputs_(std::move(script.inputs)),
        outputs_(std::move(script.outputs)) {}
  std::byte* input(int index) override { return inputs_.at(index).base; }
  const std::byte* output(int index) override { return outputs_.at(index).base; }
  void stage(int index, const std::vector<Bytes>& rows) override {
    const View& v = inputs_.at(index);
    std::byte* to = v.base;
    for (const Bytes& row : rows) {
      if (row.data) std::memcpy(to, row.data, row.size);
      to += v.ld * static_cast<int64_t>(size_of(v.dtype));
    }
  }
  void run() override;
  std::vector<double> profile() override;

 private:
  const CpuDevice& device_;
  const std::vector<Planned> before_, body_, after_;
  const int steps_;
  const std::vector<View> inputs_, outputs_;
};

class CpuDevice final : public Device {
 public:
  CpuDevice(DType act, int threads, const Kernels& kernels)
      : act_(act), threads_(threads), kernels_(kernels) {}

  std::string name() const override {
    return std::string("cpu (") + kernels_.name + ", " + std::to_string(threads_.count()) + " threads)";
  }
  DType act() const override { return act_; }

  std::byte* allocate(size_t bytes) override { return pool_.allocate(bytes); }
  void write(std::byte* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const std::byte* from, size_t bytes) override { std::memcpy(to, from, bytes); }

  // Panels of kPanel rows by all of k (see cpu/tile.h); every part begins at a panel, the last is padded
  // with zeros. Interleaved: panels of the two parts alternate.
  Weight pack(Packing packing, const std::vector<HostMatrix>& parts, int) override {
    const int width = kernels_.panel, pair = act_ == DType::kBF16 ? 2 : 1;
    const size_t size = static_cast<size_t>((parts.at(0).k + pair - 1) / pair) * pair * width * size_of(act_);
    return pack_panels(packing, parts, act_, size, [&](const HostMatrix& part, int first, std::byte* out) {
      for (int j = 0; j < width && first + j < part.n; ++j) {
        for (int p = 0; p < part.k; ++p) {
          const int64_t at = (static_cast<int64_t>(p / pair) * width + j) * pair + p % pair;
          const float value = element(part, first + j, p);
          if (act_ == DType::kBF16) {
            reinterpret_cast<uint16_t*>(out)[at] = float_to_bf16(value);
          } else {
            reinterpret_cast<float*>(out)[at] = value;
          }
        }
      }
    });
  }

  // Scales and starting sums come first in a panel.
  Weight pack_int8(Packing packing, const std::vector<HostMatrix>& parts) override {
    const int width = kernels_.panel;
    const size_t size = static_cast<size_t>((parts.at(0).k + 3) / 4 * 4 + 8) * width;
    return pack_panels(
        packing, parts, DType::kI8, size, [&](const HostMatrix& part, int first, std::byte* out) {
          auto* scales = reinterpret_cast<float*>(out);
          auto* starts = reinterpret_cast<int32_t*>(scales + width);
          auto* values = reinterpret_cast<int8_t*>(starts + width);
          for (int j = 0; j < width && first + j < part.n; ++j) {
            float top = 0.0f;
            for (int p = 0; p < part.k; ++p) {
              const float size = std::fabs(element(part, first + j, p));
              top = size <= top ? top : size;  // a NaN stays
            }
            const bool zero = top < 1e-30f;
            const float factor = zero ? 0.0f : 127.0f / top;
            int32_t sum = 0;
            for (int p = 0; p < part.k; ++p) {
              const float scaled = element(part, first + j, p) * factor;
              const auto value = static_cast<int8_t>(scaled == scaled ? std::lrint(scaled) : 0);
              values[(static_cast<int64_t>(p / 4) * width + j) * 4 + p % 4] = value;
              sum += value;
            }
            scales[j] = zero ? 0.0f : top / 127.0f;
            starts[j] = -kernels_.offset * sum;
          }
        });
  }

  size_t weight_bytes() const override { return weight_bytes_; }
  size_t scratch_bytes() const override { return scratch_size_; }

  void run_once(const std::vector<Op>& ops) override {
    reserve(ops);
    run(planned(ops), 0);
  }

  std::unique_ptr<Plan> plan(Script script) override {
    reserve(script.before);
    reserve(script.body);
    reserve(script.after);
    return std::make_unique<CpuPlan>(*this, std::move(script));
  }

  void run(const Planned& planned, int step) const {
    kernels_.run(planned.op, {&threads_, scratch_.get(), act_, planned.alone}, step);
  }

  void run(const std::vector<Planned>& ops, int step) const {
    for (const Planned& op : ops) run(op, step);
  }

  void profile(const std::vector<Planned>& ops, int step, double* seconds) const {
    for (const Planned& op : ops) {
      const auto start = std::chrono::steady_clock::now();
      run(op, step);
      *seconds++ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }

 private:
  // Memory for every panel of `size` bytes, each filled by fill(part, its first row, panel).
  template <typename Fill>
  Weight pack_panels(Packing packing, const std::vector<HostMatrix>& parts, DType type, size_t size,
                     const Fill& fill) {
    Weight w{nullptr, type, packing, parts.at(0).k, {}};
    const int width = kernels_.panel;
    size_t total = 0;
    for (const HostMatrix& part : parts) {
      w.n.push_back(part.n);
      total += static_cast<size_t>((part.n + width - 1) / width) * size;
    }
    std::byte* base = allocate(total);
    weight_bytes_ += total;
    size_t first = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const int count = (parts[i].n + width - 1) / width;
      threads_.run(count, [&](int panel, int) {
        const size_t slot = packing == Packing::kInterleaved ? panel * parts.size() + i : first + panel;
        fill(parts[i], panel * width, base + slot * size);
      });
      first += count;
    }
    w.data = base;
    return w;
  }

  // Plans share one scratch: it only grows while plans are made.
  void reserve(const std::vector<Op>& ops) {
    size_t need = 0;
    for (const Op& op : ops) need = std::max(need, kernels_.scratch_bytes(op, threads_.count(), act_));
    if (need > scratch_size_ || !scratch_) {
      scratch_ = reserved(need + kAlign);
      std::memset(scratch_.get(), 0, need + kAlign);
      scratch_size_ = need;
    }
  }

  DType act_;
  mutable Threads threads_;
  const Kernels& kernels_;
  Pool pool_;
  Memory scratch_;
  size_t weight_bytes_ = 0, scratch_size_ = 0;
};

void CpuPlan::run() {
  device_.run(before_, 0);
  for (int step = 0; step < steps_; ++step) device_.run(body_, step);
  device_.run(after_, 0);
}

std::vector<double> CpuPlan::profile() {
  std::vector<double> seconds(before_.size() + body_.size() + after_.size());
  double* at = seconds.data();
  device_.profile(before_, 0, at);
  at += before_.size();
  for (int step = 0; step < steps_; ++step) device_.profile(body_, step, at);
  device_.profile(after_, 0, at + body_.size());
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
