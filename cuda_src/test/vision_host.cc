// The persistent vision encoder without a GPU: what its tables hold, that its blocks' tiles cover everything
// once, and its waiting, played through random schedules: each wait must end with the phase that it is meant
// for, nothing may be overwritten before it has been read or read before it is there, and all must end.
//   vision_host [quick]
//   g++ -std=c++20 -O2 -I cuda_src cuda_src/test/vision_host.cc cuda_src/cuda/vision/build.cc
#include <array>
#include <cstring>
#include <functional>
#include <set>

#include "../cuda/vision/build.h"
#include "vision_protocol.h"

namespace vla::test {
namespace {

using namespace cuda::vision;
using protocol::failures;
using protocol::Play;
using protocol::require;

struct Sizes {
  const char* name;
  int layers, cameras, keys, heads, head_dim, mlp, ctas;
  bool apiece = false;
};

// Operations whose memory is never touched: places only.
struct Case {
  std::vector<Op> ops;
  std::vector<Matrix> weights;
  Table table;
  std::byte* next = reinterpret_cast<std::byte*>(size_t{1} << 20);
  std::byte* take(size_t bytes) {
    std::byte* p = next;
    next += (bytes + 255) / 256 * 256;
    return p;
  }
  View matrix(int rows, int cols, DType type = DType::kBF16) {
    return {take(size_t(rows) * cols * size_of(type)), rows, cols, cols, 0, type};
  }
  Norm norm(int n) {
    Norm its;
    its.kind = NormKind::kLayer, its.eps = 1e-6f, its.weight = matrix(1, n, DType::kF32),
    its.bias = matrix(1, n, DType::kF32);
    return its;
  }
  Weight weight(const std::vector<int>& n, int k) {
    return {take(size_t(k) * n.size() * n[0] * 2), DType::kBF16, Packing::kStacked, k, n};
  }
  explicit Case(const Sizes& s) {
    const int m = s.cameras * s.keys, n = s.heads * s.head_dim;
    View state = matrix(m, n);
    for (int i = 0; i < s.layers; ++i) {
      Qkv qkv;
      qkv.x = state, qkv.q = matrix(m, n), qkv.k = matrix(m, n), qkv.v = matrix(m, n),
      qkv.head_dim = s.head_dim;
      qkv.norm = norm(n), qkv.q_bias = qkv.k_bias = qkv.v_bias = matrix(1, n, DType::kF32),
      qkv.w = weight({n, n, n}, n);
      Attention a;
      a.q = qkv.q, a.k = qkv.k, a.v = qkv.v, a.out = matrix(m, n), a.head_dim = s.head_dim,
      a.batch = s.cameras;
      Linear o, fc1, fc2;
      o.x = a.out, o.out = matrix(m, n), o.residual = state, o.bias = matrix(1, n, DType::kF32),
      o.w = weight({n}, n);
      fc1.x = o.out, fc1.out = matrix(m, s.mlp), fc1.bias = matrix(1, s.mlp, DType::kF32), fc1.norm = norm(n);
      fc1.act = Act::kGeluTanh, fc1.w = weight({s.mlp}, n);
      fc2.x = fc1.out, fc2.out = state = matrix(m, n), fc2.residual = o.out,
      fc2.bias = matrix(1, n, DType::kF32);
      fc2.w = weight({n}, s.mlp);
      for (const Op& op : std::initializer_list<Op>{qkv, a, o, fc1, fc2}) ops.push_back(op);
    }
  }
  std::string make(int ctas, bool apiece = false) {
    const Memory memory{
        [this](size_t bytes) { return take(bytes); },
        [this](const Matrix& w, const Folded&) { return reinterpret_cast<const Term*>(take(w.n * 8)); },
        [this](int n, const Folded&) { return reinterpret_cast<const Term*>(take(n * 8)); }};
    return build(table, weights, ops, find_layers(ops), {ctas, apiece}, memory);
  }
};

// Every row, column and chunk of k of each phase belongs to one block, and the hidden state to the same ones
// always.
template <typename S>
void cover(const Table& t, const std::string& name) {
  for (const Kind k : {Kind::kPrepare, Kind::kQkv, Kind::kAttention, Kind::kOut, Kind::kFc1, Kind::kFc2}) {
    std::map<std::array<int, 3>, int> seen;
    int busy = 0;
    for (int cta = 0; cta < t.ctas; ++cta) {
      busy += first_tile(k, cta) < tiles_of(t, k);
      for (int tile = first_tile(k, cta); tile < tiles_of(t, k); tile += tile_step(t, k)) {
        if (k == Kind::kAttention) {
          ++seen[{tile, 0, 0}];
          continue;
        }
        const Tile at = tile_at(t, k, tile, cta);
        for (int c = 0; c < (k == Kind::kPrepare ? 1 : at.count); ++c)
          ++seen[{at.row, at.column, k == Kind::kPrepare ? cta % kPair : at.first + c}];
      }
    }
    const int each = k == Kind::kAttention ? 1 : k == Kind::kPrepare ? kPair : t.chunks[kind_index(k)];
    require(static_cast<int>(seen.size()) == tiles_of(t, k) * each, name + ": all of a phase");
    for (const auto& [place, count] : seen) require(count == 1, name + ": each once");
    require(busy == busy_blocks(t, k), name + ": blocks with a part");
  }
  require(t.row_tiles * Of<S>::kRows >= t.rows && t.column_tiles[0] * S::kQkv >= 3 * t.width &&
              t.column_tiles[3] * S::kFc1 >= t.mlp && t.column_tiles[2] * S::kState == t.width &&
              t.chunks[4] * kChunk >= t.mlp,
          name + ": tiles as far as the matrices reach");
  std::set<int64_t> places;
  for (int tile = 0; tile < tiles_of(t, Kind::kOut); ++tile)
    for (int i = 0; i < kPair * S::kGroups * Of<S>::kOwned; ++i)
      places.insert(state_at<S>(tile, i % 2, i / 2 % S::kGroups, i / 2 / S::kGroups, 0));
  require(static_cast<int>(places.size()) == tiles_of(t, Kind::kOut) * kPair * S::kGroups * Of<S>::kOwned,
          name + ": the hidden state's places are apart");
}

void refusals() {
  const Sizes s{"refused", 2, 2, 256, 4, 72, 400, 64};
  const auto refused = [&](const char* what, const std::function<void(Case&)>& change) {
    Case c(s);
    change(c);
    require(!c.make(s.ctas, true).empty(), std::string("refuses ") + what);
  };
  Case fine(s);
  require(fine.make(s.ctas, true).empty(), "an encoder as it should be");
  refused("another eps", [](Case& c) { std::get<Linear>(c.ops[3]).norm.eps = 1e-5f; });
  refused("another activation", [](Case& c) { std::get<Linear>(c.ops[8]).act = Act::kSilu; });
  refused("an E4M3 out", [](Case& c) { std::get<Linear>(c.ops[4]).out_scale = 1.0f; });
  refused("E4M3 weights", [](Case& c) { std::get<Linear>(c.ops[3]).w.dtype = DType::kE4M3; });
  refused("a residual from afar",
          [](Case& c) { std::get<Linear>(c.ops[7]).residual = std::get<Qkv>(c.ops[0]).x; });
  refused("a mask", [](Case& c) { std::get<Attention>(c.ops[1]).q_block = std::get<Qkv>(c.ops[0]).q; });
  refused("a rotation", [](Case& c) { std::get<Qkv>(c.ops[5]).rope = std::get<Qkv>(c.ops[0]).q; });
  refused("more rows than blocks have tiles for",
          [&](Case& c) { c = Case({"", 1, 4, 256, 16, 72, 4304, 132}); });
  refused("an odd number of blocks", [](Case& c) { c.ops.resize(5), std::get<Qkv>(c.ops[0]).head_dim = 64; });
}

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  using namespace vla::test;
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  const Sizes sizes[] = {{"tiny", 2, 1, 256, 2, 72, 200, 8},
                         {"tiny, few blocks", 2, 2, 256, 4, 72, 400, 4},
                         {"two tiles a pair", 2, 3, 256, 4, 72, 648, 8},
                         {"2 cameras", 1, 2, 256, 16, 72, 4304, 132},
                         {"1 camera", 1, 1, 256, 16, 72, 4304, 132},
                         {"3 cameras", 1, 3, 256, 16, 72, 4304, 132},
                         {"3 cameras, apiece", 1, 3, 256, 16, 72, 4304, 132, true}};
  for (const Sizes& s : sizes) {
    Case c(s);
    const std::string why = c.make(s.ctas, s.apiece);
    require(why.empty(), std::string(s.name) + ": " + why);
    if (!why.empty()) continue;
    const int plays = s.ctas > 100 ? (quick ? 1 : 4) : (quick ? 20 : 200);
    const auto check = [&]<typename S>(S) {
      cover<S>(c.table, s.name);
      for (int i = 0; i < plays && failures == 0; ++i) Play<S>(c.table, s.name, unsigned(i)).run();
    };
    with_shape(c.table.shape, check);
  }
  refusals();
  std::printf("vision_host: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
