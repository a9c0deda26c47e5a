// The denoising loop of a model of full size with random weights, as operations on the device.
#pragma once

#include <cstring>
#include <map>
#include <memory>

#include "../cuda/small/product.cuh"
#include "harness.h"

namespace vla::test {

using cuda::Launch;

// Any bf16 pattern is a valid packed weight, so weights are made where they are: hashed, normal enough.
static __global__ void fill_random(__nv_bfloat16* to, size_t n, float scale, unsigned seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    unsigned h = unsigned(i) * 2654435761u + seed;
    h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u, h ^= h >> 16;
    to[i] = __float2bfloat16(scale * 1.73f * (float(h & 0xffffff) / 8388608.0f - 1.0f));
  }
}

struct Sizes {
  const char* name;
  int layers, width, mlp, heads, kv_heads, d, prefix, rows, steps;
  bool adaptive, cross;
};

struct Timed {
  std::string kind;
  Op op;
  const float* shift = nullptr;
};

// The denoising loop of a model: x f32 -> in -> layers -> euler, `steps` times.
class Head {
 public:
  Head(const Sizes& s, const Launch& at) : s_(s), at_(at) {
    squares_ = matrix(cuda::kSmallRows, cuda::kSquareParts, DType::kF32, 0.0f).at<float>(0);
    const int q = s.heads * s.d, kv = s.kv_heads * s.d, total = s.prefix + s.rows;
    actions_ = matrix(s.rows, 32, DType::kF32, 1.0f);
    start_.resize(size_t(s.rows) * 32);
    TEST_CUDA(cudaMemcpy(start_.data(), actions_.base, start_.size() * 4, cudaMemcpyDeviceToHost));
    const View actions = actions_, previous = matrix(s.rows, 32, DType::kF32, 1.0f);
    const View guide = matrix(s.rows, 1, DType::kF32, 0.0f), scalar = matrix(1, 1, DType::kF32, 0.0f);
    const View x = matrix(s.rows, s.width, DType::kBF16, 1.0f),
               x2 = matrix(s.rows, s.width, DType::kBF16, 1.0f);
    const View h = matrix(s.rows, s.mlp, DType::kBF16, 1.0f), queries = matrix(s.rows, q, DType::kBF16, 1.0f);
    const View mixed = matrix(s.rows, q, DType::kBF16, 1.0f), rope = matrix(total, s.d, DType::kF32, 0.5f);
    positions_ = std::make_unique<Matrix>(total, 1, DType::kI32);
    positions_->fill([](int i, int) { return float(i); });
    blocks_ = std::make_unique<Matrix>(total, 1, DType::kI32);
    blocks_->fill([&](int i, int) { return i < s.prefix ? 0.0f : 1.0f; });
    const View own = rows_of(positions_->view(), s.prefix, s.rows);
    add("in", Linear{matrix_f32_of(actions),
                     matrix(1, s.width, DType::kF32, 0.1f),
                     {},
                     {},
                     x,
                     {},
                     weight({s.width}, 32)});
    for (int i = 0; i < s.layers; ++i) {
      const View k = matrix(total, kv, DType::kBF16, 1.0f), v = matrix(total, kv, DType::kBF16, 1.0f);
      const bool cross = s.cross && i % 2;
      const View gate = s.adaptive ? matrix(1, s.width, DType::kF32, 0.1f) : View{};
      Qkv qkv;
      qkv.x = x, qkv.q = queries, qkv.rope = rope, qkv.positions = own, qkv.head_dim = s.d, qkv.norm = norm();
      if (!cross) qkv.k = rows_of(k, s.prefix, s.rows), qkv.v = rows_of(v, s.prefix, s.rows);
      qkv.w = weight(cross ? std::vector<int>{q} : std::vector<int>{q, kv, kv}, s.width);
      add(cross ? "q" : "qkv", qkv);
      const int keys = cross ? s.prefix : total;
      const View key_block = rows_of(blocks_->view(), 0, keys);
      Attention a{queries,
                  rows_of(k, 0, keys),
                  rows_of(v, 0, keys),
                  rows_of(blocks_->view(), s.prefix, s.rows),
                  key_block,
                  mixed};
      a.head_dim = s.d;
      add("attention", a);
      add("o", Linear{mixed, {}, x, gate, x2, {}, weight({s.width}, q)});
      GatedLinear g;
      g.x = x2, g.out = h, g.norm = norm(), g.w = weight({s.mlp, s.mlp}, s.width, Packing::kInterleaved);
      g.act = s.adaptive ? Act::kGeluTanh : Act::kSilu;
      add("gated", g);
      add("down", Linear{h, {}, x2, gate, x, {}, weight({s.width}, s.mlp)});
    }
    Euler e;
    e.h = x, e.bias = matrix(1, 32, DType::kF32, 0.1f), e.x = actions, e.previous = previous,
    e.weight = guide;
    e.gain = scalar, e.time = scalar, e.norm = norm(), e.w = weight({32}, s.width), e.dt = -0.1f;
    add("euler", e);
  }
  ~Head() {
    for (void* p : memory_) cudaFree(p);
  }

  std::map<std::string, std::pair<int, int>> splits;  // by kind; others are chosen

  // Microseconds of the loop: replays of one graph, sorted; empty where a split does not fit. `only`: one
  // kind.
  std::vector<float> time(Launch at, int warm_up, int count, const std::string& only = "") {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    TEST_CUDA(cudaStreamBeginCapture(at.stream, cudaStreamCaptureModeThreadLocal));
    const bool pdl = at.pdl;
    at.pdl = false;
    bool fits = true;
    parts_ = 0;
    for (int step = 0; step < s_.steps && fits; ++step) {
      for (const Timed& t : ops_) {
        if (!only.empty() && (only[0] == '-' ? t.kind == only.substr(1) : t.kind != only)) continue;
        fits = fits && launch(t, at);
        at.pdl = pdl;
      }
    }
    TEST_CUDA(cudaStreamEndCapture(at.stream, &graph));
    std::vector<float> times;
    if (fits) {
      TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
      times = replay_times(exec, at.stream, warm_up, count);
      TEST_CUDA(cudaGraphExecDestroy(exec));
    }
    TEST_CUDA(cudaGraphDestroy(graph));
    return times;
  }
  // The actions after one loop from the same start.
  std::vector<float> result(const Launch& at) {
    TEST_CUDA(cudaMemcpy(actions_.base, start_.data(), start_.size() * 4, cudaMemcpyHostToDevice));
    std::vector<float> out(start_.size());
    time(at, 0, 1);
    TEST_CUDA(cudaMemcpy(out.data(), actions_.base, out.size() * 4, cudaMemcpyDeviceToHost));
    return out;
  }
  const std::vector<Timed>& ops() const { return ops_; }
  const Sizes& sizes() const { return s_; }
  // The actions as they were before the first loop, and as they are.
  void reset() {
    TEST_CUDA(cudaMemcpy(actions_.base, start_.data(), start_.size() * 4, cudaMemcpyHostToDevice));
  }
  std::vector<float> actions() const {
    std::vector<float> out(start_.size());
    TEST_CUDA(cudaMemcpy(out.data(), actions_.base, out.size() * 4, cudaMemcpyDeviceToHost));
    return out;
  }
  size_t weight_bytes() const { return weight_bytes_; }
  size_t launches() const { return ops_.size() * s_.steps; }
  std::pair<int, int> chosen(const std::string& kind, const Launch& at) const {
    std::pair<int, int> result{0, 0};
    for (const Timed& t : ops_) {
      if (t.kind != kind) continue;
      std::visit(
          [&](const auto& o) {
            if constexpr (requires { cuda::small::arguments(o, 0, 0, 1); }) {
              cuda::small::Args a = cuda::small::arguments(o, 0, 0, s_.rows);
              cuda::small::choose_split_sm90(a, at);
              result = {a.wn / 2, a.split};
            }
          },
          t.op);
    }
    return result;
  }

 private:
  bool launch(const Timed& t, const Launch& at) {
    return std::visit(
        [&](const auto& o) {
          Launch here = at;
          here.stable_keys = s_.prefix;
          here.squares = squares_, here.shift = t.shift, here.norm_constant = true;
          if constexpr (requires { o.norm; }) {
            if (o.norm.kind == NormKind::kRms && parts_ > 0)
              here.squares_in = squares_, here.square_parts = parts_;
          }
          parts_ = 0;
          if constexpr (std::is_same_v<std::decay_t<decltype(o)>, Linear>) {
            parts_ = cuda::small_square_parts(o, here);
            here.squares_out = parts_ > 0 ? squares_ : nullptr;
          }
          if constexpr (requires { cuda::small::arguments(o, 0, 0, 1); }) {
            const auto it = splits.find(t.kind);
            if (it != splits.end()) {
              cuda::small::Args a = cuda::small::arguments(o, at.step, 0, s_.rows);
              a.squares_in = here.squares_in, a.square_parts = here.square_parts,
              a.squares_out = here.squares_out;
              a.shift = here.shift, a.norm_constant = true;
              if (!cuda::small::fits_sm90(a, here)) return false;
              if (!cuda::small::set_split_sm90(a, it->second.first, it->second.second)) return false;
              TEST_CUDA(cuda::small::run_product_sm90(a, here));
              return true;
            }
          }
          if constexpr (requires { cuda::launch_small(o, at); }) TEST_CUDA(cuda::launch_small(o, here));
          return true;
        },
        t.op);
  }
  void add(const std::string& kind, const Op& op) {
    const float* shift = std::visit(
        [&](const auto& o) -> const float* {
          if constexpr (requires {
                          o.norm;
                          o.w;
                        }) {
            if (!o.norm.bias) return nullptr;
            const View to = matrix(1, cuda::packed_rows_small(o.w), DType::kF32, 0.0f);
            TEST_CUDA(cuda::make_shift(o.norm.bias, 1, o.w, to.at<float>(0), at_));
            TEST_CUDA(cudaStreamSynchronize(at_.stream));
            return to.at<float>(0);
          }
          return nullptr;
        },
        op);
    ops_.push_back({kind, op, shift});
  }
  static View rows_of(View v, int first, int rows) {
    v.base += first * v.ld * int64_t(size_of(v.dtype));
    v.rows = rows;
    return v;
  }
  static View matrix_f32_of(const View& v) { return v; }
  std::byte* random(size_t count, DType type, float scale) {
    void* p;
    TEST_CUDA(cudaMalloc(&p, count * 4 + 256));
    memory_.push_back(p);
    TEST_CUDA(cudaMemset(p, 0, count * 4 + 256));
    if (type == DType::kBF16) {
      fill_random<<<1024, 256>>>(static_cast<__nv_bfloat16*>(p), count, scale, ++seed_ * 7919u);
    } else if (scale > 0.0f) {
      std::vector<float> values(count);
      std::normal_distribution<float> d(0.0f, scale);
      for (float& v : values) v = d(random_source());
      TEST_CUDA(cudaMemcpy(p, values.data(), count * 4, cudaMemcpyHostToDevice));
    }
    TEST_CUDA(cudaDeviceSynchronize());
    return static_cast<std::byte*>(p);
  }
  View matrix(int rows, int cols, DType type, float scale) {
    return {random(size_t(rows) * cols, type, scale), rows, cols, cols, 0, type};
  }
  Norm norm() {
    Norm n;
    n.kind = NormKind::kRms, n.eps = 1e-6f, n.plus = 1.0f;
    n.weight = matrix(1, s_.width, DType::kF32, 0.1f);
    if (s_.adaptive) n.bias = matrix(1, s_.width, DType::kF32, 0.1f);
    return n;
  }
  Weight weight(const std::vector<int>& n, int k, Packing packing = Packing::kStacked) {
    const size_t bytes = cuda::packed_bytes_small(packing, n, k);
    weight_bytes_ += bytes;
    return {random(bytes / 2, DType::kBF16, 1.0f / std::sqrt(float(k))), DType::kBF16, packing, k, n};
  }

  Sizes s_;
  Launch at_;
  float* squares_ = nullptr;
  int parts_ = 0;  // of the sums of squares that the launch before left
  std::vector<Timed> ops_;
  std::vector<void*> memory_;
  std::unique_ptr<Matrix> positions_, blocks_;
  View actions_;
  std::vector<float> start_;
  size_t weight_bytes_ = 0;
  unsigned seed_ = 1;
};

inline const Sizes kLoops[] = {
    {"smolvla H=50", 16, 720, 2048, 15, 5, 64, 177, 50, 10, false, true},
    {"smolvla H=10", 16, 720, 2048, 15, 5, 64, 177, 10, 10, false, true},
    {"pi05 H=50", 18, 1024, 4096, 8, 1, 256, 560, 50, 10, true, false},
    {"pi05 H=10", 18, 1024, 4096, 8, 1, 256, 560, 10, 10, true, false},
    {"pi0 H=50", 18, 1024, 4096, 8, 1, 256, 560, 51, 10, false, false},
};

}  // namespace vla::test
