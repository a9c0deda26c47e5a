#include "build.h"

#include <cmath>
#include <cstring>

#include "../head/refused.h"

namespace vla::cuda::vision {

namespace {

using head::Refused;
using head::require;
using head::same;
// bf16 in rows that begin on multiples of four bytes, the same in each iteration.
bool plain(const View& v) {
  return v && v.dtype == DType::kBF16 && v.ld % 2 == 0 && reinterpret_cast<uintptr_t>(v.base) % 4 == 0 &&
         v.step_bytes == 0;
}
const float* floats(const View& v, int columns) {
  if (!v) return nullptr;
  require(v.dtype == DType::kF32 && v.rows == 1 && v.cols == columns && v.step_bytes == 0,
          "a bias or norm of another kind");
  return reinterpret_cast<const float*>(v.base);
}

template <typename S>
class Builder {
 public:
  Builder(Table& table, std::vector<Matrix>& weights, const std::vector<Op>& ops, Range range,
          const Memory& memory)
      : t_(table), weights_(weights), ops_(ops), at_(range.begin), end_(range.end), memory_(memory) {}

  void run(const Settings& settings) {
    const int ctas = settings.ctas;
    const Qkv& first = std::get<Qkv>(ops_[at_]);
    const auto* attention = std::get_if<Attention>(&ops_[at_ + 1]);
    require(ctas >= kPair && ctas % kPair == 0, "the blocks that this device holds");
    require(attention != nullptr, "no attention after q, k and v");
    t_.ctas = ctas, t_.rows = first.x.rows, t_.width = first.x.cols, t_.cameras = attention->batch;
    t_.heads = t_.width / S::kHead;
    require(t_.heads * S::kHead == t_.width && t_.cameras * S::kKeys == t_.rows,
            "heads or pictures of another size");
    require(t_.width % S::kState == 0 && t_.width / S::kState * kPair <= S::kParts, "another width");
    const auto* fc1 = std::get_if<Linear>(&ops_[at_ + 3]);
    require(fc1 != nullptr && fc1->out.cols % 8 == 0, "no product after out");
    t_.mlp = fc1->out.cols;
    t_.row_tiles = divide_up(t_.rows, Of<S>::kRows);
    const int columns[kKinds] = {divide_up(3 * t_.width, S::kQkv), t_.heads, t_.width / S::kState,
                                 divide_up(t_.mlp, S::kFc1), t_.width / S::kState};
    for (int i = 0; i < kKinds; ++i) {
      t_.column_tiles[i] = columns[i];
      t_.chunks[i] = divide_up(i == static_cast<int>(Kind::kFc2) ? t_.mlp : t_.width, kChunk);
    }
    for (const Kind k : {Kind::kQkv, Kind::kOut, Kind::kFc1}) {
      const int tiles = tiles_of(t_, k) * (is_split(k) ? kPair : 1);
      require(!settings.apiece || tiles <= ctas, "more rows than the blocks have tiles for");
    }
    t_.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(S::kHead));
    require(plain(first.x), "a hidden state of another type");
    t_.first = reinterpret_cast<const Bits*>(first.x.base), t_.ld_first = first.x.ld;
    t_.eps = first.norm.eps;
    t_.x = take<Bits>(size_t(t_.rows) * t_.width), t_.a = take<Bits>(size_t(t_.rows) * t_.width);
    t_.h = take<Bits>(size_t(t_.rows) * t_.mlp), t_.qkv = take<Bits>(size_t(t_.rows) * 3 * t_.width);
    t_.state = take<float>(static_cast<size_t>(state_at<S>(tiles_of(t_, Kind::kOut), 0, 0, 0, 0)));
    t_.parts = take<float>(size_t(t_.rows) * S::kParts * 2);
    t_.first_terms = memory_.pair_up(t_.width, of_norm(first.norm));
    hidden_ = first.x;
    while (at_ < end_) layer();
    require(hidden_.ld % 8 == 0 && reinterpret_cast<uintptr_t>(hidden_.base) % 16 == 0,
            "a place that the copy engine cannot reach");
    t_.last = reinterpret_cast<Bits*>(hidden_.base), t_.ld_last = hidden_.ld;
  }

 private:
  template <typename T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(memory_.take(count * sizeof(T)));
  }
  template <typename T>
  const T& op(const char* missing) {
    require(at_ < end_ && std::holds_alternative<T>(ops_[at_]), missing);
    return std::get<T>(ops_[at_++]);
  }
  Folded of_norm(const Norm& norm) const {
    require(norm.kind == NormKind::kLayer && norm.eps == t_.eps, "a norm of another kind");
    Folded f;
    f.gamma = floats(norm.weight, t_.width), f.beta = floats(norm.bias, t_.width), f.plus = norm.plus;
    require(f.gamma != nullptr, "a norm without a weight");
    return f;
  }
  const Matrix& matrix(const Weight& w, int parts, int n, int k) {
    require(w.dtype == DType::kBF16 && w.packing == Packing::kStacked && w.n == std::vector<int>(parts, n) &&
                w.k == k,
            "a weight of another kind");
    return weights_.emplace_back(Matrix{static_cast<const Bits*>(w.data), parts * n, k, head::pad_to(k, 8)});
  }
  void linear(const Linear& o, const View& x, bool normed) {
    require(same(o.x, x) && !o.gate && o.scale == 1.0f && o.x_scale == 0.0f && o.out_scale == 0.0f &&
                o.bias && plain(o.out) && o.out.rows == t_.rows,
            "a product of another kind");
    if (normed) {
      require(!o.residual && o.act == Act::kGeluTanh && o.out.cols == t_.mlp, "fc1 of another kind");
      return;
    }
    require(o.norm.kind == NormKind::kNone && o.act == Act::kNone && same(o.residual, hidden_) &&
                o.out.cols == t_.width,
            "a product of another kind into the hidden state");
  }
  // (bias, gamma of the norm that reads what the product writes)
  const Term* ends(const Linear& o, const Norm* next) {
    Folded f = next ? of_norm(*next) : Folded{};
    f.beta = nullptr, f.bias[0] = floats(o.bias, t_.width), f.part = t_.width;
    return memory_.pair_up(t_.width, f);
  }

  void layer() {
    require(t_.layers < kMaxLayers, "more layers than the table has room for");
    Layer& its = t_.layer[t_.layers++];
    const Qkv& qkv = op<Qkv>("no q, k and v");
    require(same(qkv.x, hidden_) && qkv.q && qkv.k && qkv.v && !qkv.rope && qkv.x_scale == 0.0f &&
                qkv.head_dim == S::kHead,
            "q, k and v of another kind");
    const Matrix w = matrix(qkv.w, 3, t_.width, t_.width);
    Folded f = of_norm(qkv.norm);
    f.bias[0] = floats(qkv.q_bias, t_.width), f.bias[1] = floats(qkv.k_bias, t_.width);
    f.bias[2] = floats(qkv.v_bias, t_.width), f.part = t_.width;
    its.terms[0] = memory_.fold(w, f);

    const Attention& a = op<Attention>("no attention after q, k and v");
    require(same(a.q, qkv.q) && same(a.k, qkv.k) && same(a.v, qkv.v) && a.batch == t_.cameras && !a.q_block &&
                !a.k_block && !a.int8 && a.head_dim == S::kHead && a.out_scale == 0.0f &&
                a.out.cols == t_.width,
            "attention of another kind");

    const Linear& out = op<Linear>("no product after attention");
    linear(out, a.out, false);
    matrix(out.w, 1, t_.width, t_.width);
    hidden_ = out.out;

    const Linear& fc1 = op<Linear>("no product after out");
    linear(fc1, hidden_, true);
    const Matrix wide = matrix(fc1.w, 1, t_.mlp, t_.width);
    its.terms[1] = ends(out, &fc1.norm);
    Folded g = of_norm(fc1.norm);
    g.bias[0] = floats(fc1.bias, t_.mlp), g.part = t_.mlp;
    its.terms[2] = memory_.fold(wide, g);

    const Linear& fc2 = op<Linear>("no product after fc1");
    linear(fc2, fc1.out, false);
    matrix(fc2.w, 1, t_.width, t_.mlp);
    hidden_ = fc2.out;
    its.terms[3] = ends(fc2, at_ < end_ ? &std::get<Qkv>(ops_[at_]).norm : nullptr);
  }

  Table& t_;
  std::vector<Matrix>& weights_;
  const std::vector<Op>& ops_;
  size_t at_, end_;
  const Memory& memory_;
  View hidden_;
};

// Whether a layer of the encoder begins at ops[i].
bool is_layer(const std::vector<Op>& ops, size_t i) {
  if (i + kKinds > ops.size()) return false;
  const auto* qkv = std::get_if<Qkv>(&ops[i]);
  if (!qkv || qkv->norm.kind != NormKind::kLayer || !std::holds_alternative<Attention>(ops[i + 1]))
    return false;
  for (size_t j = i + 2; j < i + kKinds; ++j) {
    if (!std::holds_alternative<Linear>(ops[j])) return false;
  }
  return true;
}

}  // namespace

Range find_layers(const std::vector<Op>& ops) {
  Range r;
  while (r.begin < ops.size() && !is_layer(ops, r.begin)) ++r.begin;
  for (r.end = r.begin; is_layer(ops, r.end);) r.end += kKinds;
  return r;
}

std::string build(Table& table, std::vector<Matrix>& weights, const std::vector<Op>& ops, Range range,
                  const Settings& settings, const Memory& memory) {
  if (range.begin >= range.end) return "no layers";
  const auto with = [&]<typename S>(Shape shape, S) -> std::string {
    std::memset(static_cast<void*>(&table), 0, sizeof table);
    weights.clear();
    table.shape = shape;
    try {
      Builder<S>(table, weights, ops, range, memory).run(settings);
    } catch (const Refused& refused) {
      return refused.why;
    }
    return {};
  };
  const std::string why = with(Shape::kPi, Pi{});
  return why.empty() ? why : with(Shape::kPi3, Pi3{});
}

}  // namespace vla::cuda::vision
