// A denoising loop of any size in host memory, for the checks of the persistent head: its operations, its
// weights packed as the kernel wants them, the loop by the table (walk) and by the operations (reference).
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "../cuda/head/build.h"

namespace vla::test::loop {

using namespace cuda::head;

inline std::mt19937& source() {
  static std::mt19937 s(20261122);
  return s;
}
inline float from_bits(Bits b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline Bits to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return Bits((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// Memory of the test: one zeroed block, so that all of it can be copied to a device at once.
struct Heap {
  static constexpr size_t kCapacity = size_t{3} << 30;  // of address space: what is not used is never touched
  std::byte* memory = static_cast<std::byte*>(std::calloc(1, kCapacity));
  std::byte* base = memory + (256 - reinterpret_cast<uintptr_t>(memory) % 256) % 256;
  size_t used = 0;
  Heap() = default;
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  ~Heap() { std::free(memory); }
  std::byte* take(size_t bytes) {
    std::byte* p = base + used;
    used += (bytes + 256 + 255) / 256 * 256;  // a vector may read past a row's end
    if (used > kCapacity - 512) std::abort();
    return p;
  }
  View matrix(int rows, int cols, DType type, float scale, float mean = 0.0f, int extra = 0) {
    View v{take(size_t(rows) * (cols + extra) * size_of(type)), rows, cols, cols + extra, 0, type};
    std::normal_distribution<float> d(mean, 1.0f);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) set(v, i, j, mean + scale * (d(source()) - mean));
    }
    return v;
  }
  static void set(const View& v, int i, int j, float f) {
    if (v.dtype == DType::kBF16) {
      reinterpret_cast<Bits*>(v.base)[i * v.ld + j] = to_bits(f);
    } else if (v.dtype == DType::kF32) {
      reinterpret_cast<float*>(v.base)[i * v.ld + j] = f;
    } else {
      reinterpret_cast<int*>(v.base)[i * v.ld + j] = int(f);
    }
  }
  static double get(const View& v, int i, int j, int step = 0) {
    const std::byte* base = v.base + step * v.step_bytes;
    return v.dtype == DType::kBF16  ? double(from_bits(reinterpret_cast<const Bits*>(base)[i * v.ld + j]))
           : v.dtype == DType::kF32 ? double(reinterpret_cast<const float*>(base)[i * v.ld + j])
                                    : double(reinterpret_cast<const int*>(base)[i * v.ld + j]);
  }
};
inline View rows_of(View v, int first, int rows) {
  v.base += first * v.ld * int64_t(size_of(v.dtype));
  v.rows = rows;
  return v;
}

struct Sizes {
  const char* name;
  int layers, width, mlp, heads, kv_heads, d, prefix, m, steps;
  bool adaptive, cross, time_mlp;
  int state = 0;  // rows before the actions' that are the same at every step
  int actions() const { return m - state; }
};

// W (n, k) in the packing of small/pack.cu: what that kernel writes, computed another way than layout.h does.
inline std::vector<Bits> fragments(const std::vector<View>& parts, bool interleaved) {
  const int k = parts[0].cols, k_tiles = (k + 15) / 16;
  std::vector<Bits> out;
  int first = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int halves = interleaved ? 1 : 2, blocks = (parts[i].rows + 16 * halves - 1) / (16 * halves);
    if (out.size() < size_t(first + blocks) * k_tiles * 512)
      out.resize(size_t(first + blocks) * k_tiles * 512, 0);
    for (int b = 0; b < blocks; ++b)
      for (int t = 0; t < k_tiles; ++t)
        for (int h = 0; h < halves; ++h)
          for (int lane = 0; lane < 32; ++lane)
            for (int j = 0; j < 8; ++j) {
              const int row = (b * halves + h) * 16 + lane / 4 + j / 2 % 2 * 8,
                        col = t * 16 + lane % 4 * 2 + j / 4 * 8 + j % 2;
              const int where = interleaved ? int(i) : h;
              out[((size_t(first + b) * k_tiles + t) * 64 + where * 32 + lane) * 8 + j] =
                  row < parts[i].rows && col < k
                      ? reinterpret_cast<const Bits*>(parts[i].base)[row * parts[i].ld + col]
                      : Bits(0);
            }
    if (!interleaved) first += blocks;
  }
  return out;
}

inline double act_of(double x, int act) {
  if (act == int(Act::kSilu)) return x / (1.0 + std::exp(-x));
  if (act == int(Act::kGeluTanh))
    return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
  return x;
}

class Head {
 public:
  explicit Head(const Sizes& s) : s_(s) {
    const int q = s.heads * s.d, kv = s.kv_heads * s.d, total = s.prefix + s.m;
    actions_ = heap_.matrix(s.actions(), 32, DType::kF32, 1.0f);
    const View x = bf16(s.m, s.width), begin = s.state ? bf16(s.m, s.width) : x, x2 = bf16(s.m, s.width),
               h = bf16(s.m, s.mlp), queries = bf16(s.m, q);
    const View mixed = bf16(s.m, q), rope = heap_.matrix(total, s.d, DType::kF32, 0.7f);
    View positions = heap_.matrix(total, 1, DType::kI32, 0.0f), blocks = positions;
    blocks = heap_.matrix(total, 1, DType::kI32, 0.0f);
    for (int i = 0; i < total; ++i) Heap::set(positions, i, 0, float(total - 1 - i));
    for (int i = 0; i < total; ++i)
      Heap::set(blocks, i, 0, i < s.prefix ? float(i % 5 == 3 ? 1 << 30 : 0) : float(2 + i - s.prefix));
    const View own = rows_of(positions, s.prefix, s.m);
    if (s.time_mlp) {
      const View a = bf16(s.actions(), s.width), b = bf16(s.actions(), s.width);
      Linear in;
      in.x = actions_, in.out = a, in.bias = vector(s.width), in.w = weight({s.width}, 32);
      body_.push_back(in);
      Linear mid;
      mid.x = a, mid.out = b, mid.act = Act::kSilu, mid.bias = vector(s.width, true),
      mid.w = weight({s.width}, s.width);
      body_.push_back(mid);
      Linear out;
      out.x = b, out.out = rows_of(begin, s.state, s.actions()), out.bias = vector(s.width),
      out.w = weight({s.width}, s.width);
      body_.push_back(out);
    } else {
      Linear in;
      in.x = actions_, in.out = rows_of(begin, s.state, s.actions()), in.bias = vector(s.width),
      in.w = weight({s.width}, 32);
      body_.push_back(in);
    }
    for (int i = 0; i < s.layers; ++i) {
      const View k = heap_.matrix(total, kv, DType::kBF16, 1.0f, 0.0f, 8),
                 v = heap_.matrix(total, kv, DType::kBF16, 1.0f);
      const bool cross = s.cross && i % 2;
      Qkv qkv;
      const View before = i == 0 ? begin : x;
      qkv.x = before, qkv.q = queries, qkv.rope = rope, qkv.positions = own, qkv.head_dim = s.d,
      qkv.norm = norm();
      if (!cross) qkv.k = rows_of(k, s.prefix, s.m), qkv.v = rows_of(v, s.prefix, s.m);
      qkv.w = weight(cross ? std::vector<int>{q} : std::vector<int>{q, kv, kv}, s.width);
      body_.push_back(qkv);
      const int keys = cross ? s.prefix : total;
      Attention a;
      a.q = queries, a.k = rows_of(k, 0, keys), a.v = rows_of(v, 0, keys), a.out = mixed, a.head_dim = s.d;
      a.q_block = rows_of(blocks, s.prefix, s.m), a.k_block = rows_of(blocks, 0, keys);
      body_.push_back(a);
      Linear o;
      o.x = mixed, o.out = x2, o.residual = before, o.w = weight({s.width}, q);
      if (s.adaptive) o.gate = vector(s.width, true);
      body_.push_back(o);
      GatedLinear g;
      g.x = x2, g.out = h, g.norm = norm(), g.act = s.adaptive ? Act::kGeluTanh : Act::kSilu;
      g.w = weight({s.mlp, s.mlp}, s.width, Packing::kInterleaved);
      body_.push_back(g);
      Linear down;
      down.x = h, down.out = x, down.residual = x2, down.w = weight({s.width}, s.mlp);
      if (s.adaptive) down.gate = vector(s.width, true);
      body_.push_back(down);
    }
    Euler e;
    e.h = rows_of(x, s.state, s.actions()), e.bias = vector(32), e.x = actions_;
    e.previous = heap_.matrix(s.actions(), 32, DType::kF32, 1.0f);
    e.weight = heap_.matrix(s.actions(), 1, DType::kF32, 0.5f), e.gain = number(), e.time = number(),
    e.norm = norm();
    e.w = weight({32}, s.width), e.dt = -1.0f / float(s.steps);
    body_.push_back(e);
    for (const Op& op : body_) facts_.push_back(fact(op));
    mark_ = heap_.used;
  }

  std::string build_table(const Settings& settings) {
    packed_.clear();
    heap_.used = mark_;  // of the table before
    std::memset(heap_.base + mark_, 0, heap_peak_ > mark_ ? heap_peak_ - mark_ : 0);
    table_ = std::make_unique<Table>();
    std::memset(static_cast<void*>(table_.get()), 0, sizeof(Table));
    const Memory memory{[this](size_t bytes) { return heap_.take(bytes); },
                        [this](const Phase& p, const Weight& w) { return packed(p, w); }};
    const std::string why = build(*table_, body_, s_.steps, facts_, settings, memory);
    heap_peak_ = std::max(heap_peak_, heap_.used);
    return why;
  }
  const Table& table() const { return *table_; }

  // The actions after the loop by the table, and by the operations; the noise is put back.
  std::vector<float> walked() {
    const std::vector<float> noise = sample();
    walk();
    const std::vector<float> got = sample();
    restore(noise);
    return got;
  }
  // The walk, with a call after each phase of its first step, when what the phase wrote is still there.
  void walk_and_look(std::function<void(int phase)> look) {
    const std::vector<float> noise = sample();
    look_ = std::move(look);
    walk();
    look_ = nullptr;
    restore(noise);
  }
  const std::vector<float>& expected() {
    if (expected_.empty()) {
      const std::vector<float> noise = sample();
      reference();
      expected_ = sample();
      restore(noise);
    }
    return expected_;
  }
  // The error of actions, relative to how far the loop has moved them from the noise.
  double error(const std::vector<float>& got) {
    const std::vector<float> noise = sample(), &want = expected();
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
      norm += (double(want[i]) - noise[i]) * (double(want[i]) - noise[i]);
    }
    return std::sqrt(difference / norm);
  }
  Heap& heap() { return heap_; }
  const View& actions() const { return actions_; }
  // Every packed weight: its phase, and what it was packed from.
  struct PackedWeight {
    int phase;
    const Bits* data;
    std::vector<Bits> from;
    int n[3], parts, k;
    bool interleaved;
  };
  const std::vector<PackedWeight>& weights() const { return packed_; }

 private:
  View bf16(int rows, int cols) { return heap_.matrix(rows, cols, DType::kBF16, 1.0f, 0.0f, 8); }
  View vector(int n, bool moves = false) {
    View v = heap_.matrix(moves ? s_.steps : 1, n, DType::kF32, 0.5f);
    v.rows = 1;
    if (moves) v.step_bytes = 4 * n;
    return v;
  }
  View number() {
    View v = heap_.matrix(s_.steps, 1, DType::kF32, 0.3f);
    v.rows = 1, v.step_bytes = 4;
    return v;
  }
  Norm norm() {
    Norm n;
    n.kind = NormKind::kRms, n.eps = 1e-5f, n.plus = s_.adaptive ? 1.0f : 0.0f;
    n.weight = vector(s_.width, s_.adaptive);
    if (s_.adaptive) n.bias = vector(s_.width, true);
    return n;
  }
  Weight weight(const std::vector<int>& n, int k, Packing packing = Packing::kStacked) {
    Weight w{nullptr, DType::kBF16, packing, k, n};
    std::vector<View> parts;
    for (int rows : n) parts.push_back(heap_.matrix(rows, k, DType::kBF16, 1.0f / std::sqrt(float(k))));
    w.data = parts[0].base;
    raw_[w.data] = parts;
    return w;
  }
  Fact fact(const Op& op) {
    Fact f;
    std::visit(
        [&](const auto& o) {
          if constexpr (requires {
                          o.head_dim;
                          o.k_block;
                        })
            f.stable_keys = o.k.rows == s_.prefix ? s_.prefix : s_.prefix;
          if constexpr (requires {
                          o.norm;
                          o.w;
                        }) {
            if (!o.norm.bias) return;
            // norm.bias W^T in the order of the packed rows, from the packed weight itself
            const std::vector<View>& parts = raw_[o.w.data];
            const bool interleaved = o.w.packing == Packing::kInterleaved;
            int rows = 0;
            for (const View& p : parts)
              rows += interleaved ? (p.rows + 15) / 16 * 16 : (p.rows + 31) / 32 * 32;
            float* to = reinterpret_cast<float*>(heap_.take(sizeof(float) * rows * s_.steps));
            int n[3] = {}, first = 0;
            for (size_t i = 0; i < parts.size(); ++i) n[i] = parts[i].rows;
            for (size_t i = 0; i < parts.size(); ++i) {
              for (int r = 0; r < parts[i].rows; ++r) {
                const int at = interleaved ? r / 16 * 32 + int(i) * 16 + r % 16 : first + r;
                for (int step = 0; step < s_.steps; ++step) {
                  double sum = 0.0;
                  for (int c = 0; c < o.w.k; ++c)
                    sum += Heap::get(parts[i], r, c) * Heap::get(o.norm.bias, 0, c, step);
                  to[step * rows + at] = float(sum);
                }
              }
              first += (n[i] + 31) / 32 * 32;
            }
            f.shift = to, f.shift_stride = rows;
          }
        },
        op);
    return f;
  }
  // As the packing kernel does it.
  const Bits* packed(const Phase& p, const Weight& w) {
    const std::vector<View>& parts = raw_[w.data];
    const bool interleaved = w.packing == Packing::kInterleaved;
    const std::vector<Bits> from = fragments(parts, interleaved);
    int n[3] = {};
    for (size_t i = 0; i < parts.size(); ++i) n[i] = parts[i].rows;
    const size_t units = packed_elements(p) / 8;
    Bits* to = reinterpret_cast<Bits*>(heap_.take(units * 16));
    for (size_t i = 0; i < units; ++i) {
      const int unit = int(i % 8), row = int(i / 8 % p.tile_rows),
                chunk = int(i / 8 / p.tile_rows % p.chunks);
      const SourceRow source = source_row(p, int(i / 8 / p.tile_rows / p.chunks), row);
      for (int j = 0; j < 8; ++j) {
        const int col = chunk * kChunk + unit * 8 + j;
        to[(i - unit) * 8 + (unit ^ (row & 7)) * 8 + j] =
            source.row >= 0 && col < w.k
                ? from[fragment_index(fragment_row(n, source.part, source.row, interleaved), col,
                                      divide_up(w.k, 16))]
                : Bits(0);
      }
    }
    packed_.push_back(
        {int(&p - table_->phase), to, from, {n[0], n[1], n[2]}, int(parts.size()), w.k, interleaved});
    return to;
  }
  std::vector<float> sample() const {
    std::vector<float> v;
    for (int i = 0; i < s_.actions(); ++i)
      for (int j = 0; j < 32; ++j) v.push_back(float(Heap::get(actions_, i, j)));
    return v;
  }
  void restore(const std::vector<float>& v) {
    for (int i = 0; i < s_.actions(); ++i)
      for (int j = 0; j < 32; ++j) Heap::set(actions_, i, j, v[i * 32 + j]);
  }

  void walk();       // head_walk.h
  void reference();  // head_walk.h

  Sizes s_;
  Heap heap_;
  std::map<const void*, std::vector<View>> raw_;
  std::vector<Op> body_;
  std::vector<Fact> facts_;
  std::unique_ptr<Table> table_;
  View actions_;
  std::vector<PackedWeight> packed_;
  std::vector<float> expected_;
  std::function<void(int)> look_;
  size_t mark_ = 0, heap_peak_ = 0;
};

#include "head_walk.h"

}  // namespace vla::test::loop
