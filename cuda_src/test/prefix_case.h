// The layers of a prefix of any size in host memory, for the checks of the persistent prefix: its operations,
// its weights packed as the kernel wants them, the layers by the table (walk) and by the operations
// (reference), both in double precision.
#pragma once

#include <algorithm>
#include <thread>

#include "../cuda/prefix/build.h"
#include "head_case.h"

namespace vla::test::layers {

namespace pre = cuda::prefix;
using cuda::head::Bits;
using loop::from_bits;
using loop::Heap;
using loop::to_bits;
using pre::Kind;
using pre::Phase;
using pre::Table;

struct Sizes {
  const char* name;
  int layers, width, mlp, heads, kv_heads, m;
  bool projections;  // of the keys and values of every other layer
};

inline void parallel_for(int n, const std::function<void(int)>& f) {
  const int workers = int(std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int w = 0; w < workers; ++w)
    threads.emplace_back([=, &f] {
      for (int i = w; i < n; i += workers) f(i);
    });
  for (std::thread& t : threads) t.join();
}

using Values = std::vector<double>;  // of a matrix, row by row

class Prefix {
 public:
  explicit Prefix(const Sizes& s) : s_(s) {
    const int q = s.heads * 64, kv = s.kv_heads * 64, m = s.m;
    const View x = bf16(m, s.width), x2 = bf16(m, s.width), x3 = bf16(m, s.width), h = bf16(m, s.mlp),
               queries = bf16(m, q), mixed = bf16(m, q), rope = heap_.matrix(m + 50, 64, DType::kF32, 0.7f),
               positions = heap_.matrix(m, 1, DType::kI32, 0.0f),
               blocks = heap_.matrix(m, 1, DType::kI32, 0.0f);
    input_ = heap_.matrix(m, s.width, DType::kBF16, 1.0f);
    for (int i = 0; i < m; ++i)
      Heap::set(positions, i, 0, i == 5 ? 1e6f : float(m - 1 - i));  // one out of range
    for (int i = 0; i < m; ++i)
      Heap::set(blocks, i, 0, i % 7 == 3 ? float(1 << 30) : i + 1 == m ? 1.0f : 0.0f);
    std::vector<View> keys, values;
    View state = input_;
    for (int i = 0; i < s.layers; ++i) {
      // caches have the rows of the actions, too
      keys.push_back(loop::rows_of(heap_.matrix(m + 10, kv, DType::kBF16, 1.0f, 0.0f, 8), 0, m));
      values.push_back(loop::rows_of(heap_.matrix(m + 10, kv, DType::kBF16, 1.0f), 0, m));
      const bool last = i + 1 == s.layers;
      Qkv qkv;
      qkv.x = state, qkv.k = keys[i], qkv.v = values[i], qkv.rope = rope, qkv.positions = positions;
      qkv.head_dim = 64, qkv.norm = norm();
      if (!last) qkv.q = queries;
      qkv.w = weight(last ? std::vector<int>{kv, kv} : std::vector<int>{q, kv, kv}, s.width);
      ops.push_back(qkv);
      if (last) break;
      Attention a;
      a.q = queries, a.k = keys[i], a.v = values[i], a.q_block = a.k_block = blocks, a.out = mixed,
      a.head_dim = 64;
      ops.push_back(a);
      Linear o;
      o.x = mixed, o.out = x2, o.residual = state, o.w = weight({s.width}, q);
      ops.push_back(o);
      GatedLinear g;
      g.x = x2, g.out = h, g.norm = norm(), g.act = i % 2 ? Act::kGeluTanh : Act::kSilu;
      g.w = weight({s.mlp, s.mlp}, s.width, Packing::kInterleaved);
      ops.push_back(g);
      Linear down;
      down.x = h, down.out = state = i % 2 ? x : x3, down.residual = x2, down.w = weight({s.width}, s.mlp);
      ops.push_back(down);
    }
    for (int i = 1; i < s.layers && s.projections; i += 2) {
      for (const View& from : {keys[i], values[i]}) {
        Linear p;
        p.x = from, p.out = heap_.matrix(m, kv, DType::kBF16, 1.0f, 0.0f, 8), p.w = weight({kv}, kv);
        ops.push_back(p);
        results.push_back(p.out);
      }
    }
    results.insert(results.end(), keys.begin(), keys.end());
    results.insert(results.end(), values.begin(), values.end());
    mark_ = heap_.used;
  }

  std::string build_table(const pre::Settings& settings) {
    packed.clear();
    heap_.used = mark_;  // of the table before
    std::memset(heap_.base + mark_, 0, peak_ > mark_ ? peak_ - mark_ : 0);
    table = std::make_unique<Table>();
    const pre::Memory memory{[this](size_t bytes) { return heap_.take(bytes); },
                             [this](const Phase& p, const Weight& w) { return pack(p, w); }};
    const std::string why = pre::build(*table, ops, pre::find_layers(ops), settings, memory);
    peak_ = std::max(peak_, heap_.used);
    return why;
  }

  // What the operations give, one matrix for each of `results`.
  const std::vector<Values>& expected() {
    if (expected_.empty()) {
      reference();
      for (const View& v : results) expected_.push_back(exact_.at(v.base));
    }
    return expected_;
  }
  static Values read(const View& v) {
    Values all;
    for (int i = 0; i < v.rows; ++i)
      for (int j = 0; j < v.cols; ++j) all.push_back(Heap::get(v, i, j));
    return all;
  }
  // The largest error of a result, relative to its own size.
  double error(const std::function<Values(const View&)>& get) {
    double worst = 0.0;
    for (size_t i = 0; i < results.size(); ++i) {
      const Values got = get(results[i]), &want = expected()[i];
      double difference = 0.0, size = 1e-30;
      for (size_t j = 0; j < got.size(); ++j)
        difference += (got[j] - want[j]) * (got[j] - want[j]), size += want[j] * want[j];
      const double e = std::sqrt(difference / size);
      if (!(e <= worst)) worst = e;  // NaN stays
    }
    return worst;
  }
  void walk();  // prefix_walk.h

  struct Packed {
    Phase phase;
    const Bits* data;
    const Bits* from;
    int n[3], parts, k;
  };
  std::vector<Packed> packed;
  std::vector<Op> ops;
  std::vector<View> results;
  std::unique_ptr<Table> table;
  Heap& heap() { return heap_; }
  const View& input() const { return input_; }

 private:
  View bf16(int rows, int cols) { return heap_.matrix(rows, cols, DType::kBF16, 1.0f, 0.0f, 8); }
  Norm norm() {
    Norm n;
    n.kind = NormKind::kRms, n.eps = 1e-5f, n.weight = heap_.matrix(1, s_.width, DType::kF32, 0.3f, 1.0f);
    return n;
  }
  // As large/linear.cu packs it: parts one under another, or two that alternate by 32 rows.
  Weight weight(const std::vector<int>& n, int k, Packing packing = Packing::kStacked) {
    std::vector<View> parts;
    for (int rows : n) parts.push_back(heap_.matrix(rows, k, DType::kBF16, 1.0f / std::sqrt(float(k))));
    int total = 0;
    for (int rows : n) total += rows;
    std::byte* const data = heap_.take(size_t(total) * k * 2);
    std::byte* to = data;
    const auto rows = [&](const View& v, int first, int count) {
      for (int r = first; r < first + count; ++r, to += k * 2) std::memcpy(to, v.base + r * v.ld * 2, k * 2);
    };
    if (packing == Packing::kInterleaved) {
      for (int r = 0; r < n[0]; r += 32) rows(parts[0], r, 32), rows(parts[1], r, 32);
    } else {
      for (const View& v : parts) rows(v, 0, v.rows);
    }
    raw_[data] = parts;
    return {data, DType::kBF16, packing, k, n};
  }
  const Bits* pack(const Phase& p, const Weight& w) {
    const auto* from = static_cast<const Bits*>(w.data);
    Packed made{p, nullptr, from, {0, 0, 0}, int(w.n.size()), w.k};
    for (size_t i = 0; i < w.n.size(); ++i) made.n[i] = w.n[i];
    Bits* to = reinterpret_cast<Bits*>(heap_.take(pre::packed_elements(p) * 2));
    const int height = pre::tile_rows(p);
    for (int tile = 0; tile < p.column_tiles; ++tile)
      for (int c = 0; c < p.chunks; ++c)
        for (int r = 0; r < height; ++r) {
          const pre::SourceRow source = pre::source_row(p.kind, p.heads, tile, r);
          const Bits* row =
              from + size_t(pre::packed_row(made.n, source.part, source.row, p.kind == Kind::kGated)) * w.k +
              c * 64;
          for (int e = 0; e < 64; e += 8)
            std::memcpy(to + (size_t(tile * p.chunks + c) * height + r) * 64 + ((e / 8) ^ (r & 7)) * 8,
                        row + e, 16);
        }
    made.data = to;
    packed.push_back(made);
    return to;
  }
  void reference();  // prefix_walk.h

  Sizes s_;
  Heap heap_;
  View input_;
  std::map<const void*, std::vector<View>> raw_;
  std::map<const void*, Values> exact_;
  std::vector<Values> expected_;
  size_t mark_ = 0, peak_ = 0;
};

}  // namespace vla::test::layers

#include "prefix_walk.h"
