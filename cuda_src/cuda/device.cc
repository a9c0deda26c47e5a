// The CUDA device: memory, packing through pinned staging, plans.
#include "../device.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include "plan.h"

namespace vla {
namespace cuda {

namespace {

constexpr int kFewColumns = 128;
constexpr size_t kStaging = size_t{32} << 20;
// Threads that fill inputs where the caller does not say how many: one copies 7 GB/s, three 11, six no more.
constexpr int kFillers = 3;

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, int threads) : filling_(threads) {
    context_.filling = &filling_;
    VLA_CHECK(cudaSetDevice(index), "choosing GPU " + std::to_string(index));
    cudaDeviceProp properties;
    VLA_CHECK(cudaGetDeviceProperties(&properties, index), "asking about GPU " + std::to_string(index));
    name_ = std::string("cuda (") + properties.name + ")";
    context_.arch = properties.major * 10 + properties.minor;
    context_.sms = properties.multiProcessorCount;
    if (context_.arch < 80) {
      throw Unsupported("cuda: " + name_ + ": compute capability " + std::to_string(properties.major) + "." +
                        std::to_string(properties.minor) + ", expected 8.0 or later");
    }
    VLA_CHECK(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "making a stream");
    context_.layouts = &layouts_;
    context_.head_weights = &head_weights_;
    context_.prefix_weights = &prefix_weights_;
    context_.squares = reinterpret_cast<float*>(allocate(sizeof(float) * kSmallRows * kSquareParts));
  }
  ~CudaDevice() override {
    cudaStreamSynchronize(context_.stream);
    release_staging();
    if (context_.scratch) cudaFree(context_.scratch);
    for (std::byte* old : retired_) cudaFree(old);
    cudaStreamDestroy(context_.stream);
  }

  std::string name() const override { return name_; }
  DType act() const override { return DType::kBF16; }

  std::byte* allocate(size_t bytes) override {
    std::byte* p = pool_.take(bytes);
    VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing memory");
    return p;
  }
  std::shared_ptr<std::byte> host_memory(size_t bytes) const override {
    const auto pinned = std::make_shared<Pinned>(bytes);
    std::memset(pinned->data(), 0, bytes);
    return {pinned, pinned->data()};
  }
  void write(std::byte* to, const void* from, size_t bytes) override { upload(to, from, 1, bytes, bytes); }
  void read(void* to, const std::byte* from, size_t bytes) override {
    VLA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, context_.stream), "reading");
    VLA_CHECK(cudaStreamSynchronize(context_.stream), "reading");
  }

  Weight pack(Packing packing, const std::vector<HostMatrix>& parts, int rows) override {
    Weight w = unpacked(packing, parts, DType::kBF16);
    // few columns of the result, such as an action's, are for the small kernels whatever the rows
    const bool small = (rows <= kSmallRows && w.k <= kLongestSmall) || w.rows() <= kFewColumns;
    return pack_as(std::move(w), small ? Layout::kFragments : Layout::kRows, parts,
                   {small ? packed_bytes_small : packed_bytes_large, small ? pack_small : pack_large});
  }

  bool has_e4m3() const override { return context_.arch == 90; }
  Weight pack_fp8(Packing packing, const std::vector<HostMatrix>& parts) override {
    if (!has_e4m3()) {
      throw Unsupported("cuda: " + name_ + ": precision 'fp8': expected compute capability 9.0; use 'bf16'");
    }
    return pack_as(unpacked(packing, parts, DType::kE4M3), Layout::kRows, parts,
                   {packed_bytes_e4m3, pack_e4m3});
  }

  size_t memory_in_use() const override {
    size_t free = 0, total = 0;
    VLA_CHECK(cudaMemGetInfo(&free, &total), "asking for free memory");
    return total - free;
  }
  double copy_rate(size_t bytes) override { return cuda::copy_rate(context_, bytes); }

  size_t weight_bytes() const override { return weight_bytes_; }
  size_t scratch_bytes() const override { return context_.scratch_bytes; }

  void run_once(const std::vector<Op>& ops) override {
    prepare(ops);
    Sequence at;
    enqueue(ops, context_, 0, at);
    VLA_CHECK(cudaStreamSynchronize(context_.stream), "computing tables");
  }

  std::unique_ptr<Plan> plan(Script script) override {
    prepare(script.before);
    prepare(script.body);
    prepare(script.after);
    VLA_CHECK(cudaStreamSynchronize(context_.stream), "uploading weights");
    release_staging();
    return capture(std::move(script), context_, pool_);
  }

 private:
  static Weight unpacked(Packing packing, const std::vector<HostMatrix>& parts, DType dtype) {
    Weight w{nullptr, dtype, packing, parts.at(0).k, {}};
    for (const HostMatrix& p : parts) w.n.push_back(p.n);
    return w;
  }

  // How a layout is made: the bytes it takes, and the packing.
  struct Packer {
    size_t (*bytes)(Packing, const std::vector<int>&, int);
    cudaError_t (*pack)(void*, Packing, const std::vector<RawMatrix>&, cudaStream_t);
  };

  Weight pack_as(Weight w, Layout layout, const std::vector<HostMatrix>& parts, const Packer& packer) {
    const std::string what = "packing a weight of " + std::to_string(w.k) + " columns";
    size_t raw_bytes = 0;
    for (const HostMatrix& p : parts) raw_bytes += round(static_cast<size_t>(p.n) * p.k * size_of(p.dtype));
    if (raw_bytes > raw_size_) {
      VLA_CHECK(cudaStreamSynchronize(context_.stream), what);
      if (raw_) cudaFree(raw_);
      raw_ = nullptr, raw_size_ = 0;
      void* p = nullptr;
      VLA_CHECK(cudaMalloc(&p, raw_bytes), what);
      raw_ = static_cast<std::byte*>(p), raw_size_ = raw_bytes;
    }
    std::vector<RawMatrix> raw;
    std::byte* at = raw_;
    for (const HostMatrix& p : parts) {
      const size_t size = size_of(p.dtype), row = static_cast<size_t>(p.k) * size;
      upload(at, p.data, static_cast<size_t>(p.n), row, static_cast<size_t>(p.ld) * size);
      raw.push_back({at, p.dtype, p.n, p.k, p.k});
      at += round(static_cast<size_t>(p.n) * row);
    }
    const size_t bytes = packer.bytes(w.packing, w.n, w.k);
    std::byte* to = pool_.take(bytes);
    VLA_CHECK(cudaStreamSynchronize(nullptr), what);
    VLA_CHECK(packer.pack(to, w.packing, raw, context_.stream), what);
    weight_bytes_ += bytes;
    layouts_[to] = layout;
    w.data = to;
    return w;
  }

  static size_t round(size_t bytes) { return (bytes + 255) / 256 * 256; }

  // Host rows to tight device rows, through two pinned buffers: the copy to the device goes on while the next
  // piece is read (by the caller, too: this returns before the last piece has arrived).
  void upload(std::byte* to, const void* from, size_t rows, size_t row_bytes, size_t stride) {
    const auto* source = static_cast<const std::byte*>(from);
    if (stride == row_bytes) row_bytes *= rows, stride = row_bytes, rows = 1;
    for (size_t row = 0; row < rows;) {
      for (size_t begin = 0; begin < row_bytes;) {
        Staging& s = staging_[turn_ ^= 1];
        if (!s.memory) {
          s.memory = std::make_unique<Pinned>(kStaging);
          VLA_CHECK(cudaEventCreateWithFlags(&s.sent, cudaEventDisableTiming), "making an event");
        }
        VLA_CHECK(cudaEventSynchronize(s.sent), "uploading");
        size_t filled = 0;
        if (row_bytes <= kStaging) {
          for (; row < rows && filled + row_bytes <= kStaging; ++row, filled += row_bytes) {
            std::memcpy(s.memory->data() + filled, source + row * stride, row_bytes);
          }
          begin = row_bytes;
        } else {
          filled = std::min(kStaging, row_bytes - begin);
          std::memcpy(s.memory->data(), source + row * stride + begin, filled);
          begin += filled;
          if (begin == row_bytes) ++row;
        }
        VLA_CHECK(cudaMemcpyAsync(to, s.memory->data(), filled, cudaMemcpyHostToDevice, context_.stream),
                  "uploading");
        VLA_CHECK(cudaEventRecord(s.sent, context_.stream), "uploading");
        to += filled;
      }
    }
  }

  // Scratch only grows, and what captured graphs point to stays.
  void prepare(const std::vector<Op>& ops) {
    size_t need = 0;
    for (const Op& op : ops) {
      const Layout layout = context_.layout(op);
      check_supported(op, layout);
      if (!is_small(op, layout)) need = std::max(need, scratch_large(op, context_.sms));
    }
    if (need <= context_.scratch_bytes) return;
    if (context_.scratch) retired_.push_back(context_.scratch);
    void* p = nullptr;
    VLA_CHECK(cudaMalloc(&p, need), "allocating scratch");
    context_.scratch = static_cast<std::byte*>(p);
    context_.scratch_bytes = need;
    VLA_CHECK(cudaMemset(p, 0, need), "clearing scratch");
    VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing scratch");
  }

  void release_staging() {
    for (Staging& s : staging_) {
      if (s.sent) cudaEventDestroy(s.sent);
      s.sent = nullptr;
      s.memory.reset();
    }
    if (raw_) cudaFree(raw_);
    raw_ = nullptr, raw_size_ = 0;
  }

  struct Staging {
    std::unique_ptr<Pinned> memory;
    cudaEvent_t sent = nullptr;
  };

  std::string name_;
  Context context_;
  Pool pool_;
  std::map<const void*, Layout> layouts_;
  HeadWeights head_weights_;
  PrefixWeights prefix_weights_;
  std::array<Staging, 2> staging_;
  int turn_ = 0;
  std::byte* raw_ = nullptr;
  size_t raw_size_ = 0, weight_bytes_ = 0;
  std::vector<std::byte*> retired_;
  Filling filling_;
};

}  // namespace
}  // namespace cuda

std::unique_ptr<Device> make_cuda_device(DType act, int index, int threads) {
  if (act != DType::kBF16) {
    throw Unsupported("cuda: precision 'fp32': expected 'bf16' (float32 runs on device 'cpu')");
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || index >= count) {
    throw Unsupported("cuda: GPU " + std::to_string(index) + ": " + std::to_string(count) + " usable here (" +
                      cudaGetErrorString(error) + "); check the driver, or use device 'cpu'");
  }
  const int processors = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return std::make_unique<cuda::CudaDevice>(index,
                                            std::min(threads > 0 ? threads : cuda::kFillers, processors));
}

}  // namespace vla
