#include "build.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "../head/refused.h"

namespace vla::cuda::prefix {

namespace {

using head::Refused;
using head::require;
using head::same;

class Builder {
 public:
  Builder(Table& table, const std::vector<Op>& ops, Range range, const Settings& settings,
          const Memory& memory)
      : t_(table), ops_(ops), at_(range.begin), end_(range.end), s_(settings), memory_(memory) {}

  void run() {
    require(at_ < end_, "no layers");
    require(s_.ctas >= kPair && s_.ctas % kPair == 0, "the blocks that this device holds");
    const Qkv& first = std::get<Qkv>(ops_[at_]);
    t_.ctas = s_.ctas, t_.m = first.x.rows, t_.rows = pad_to(t_.m, 8);
    require(t_.m <= kMaxRows, "more rows than the blocks have room for");
    width_ = first.x.cols;
    columns_ = whole(width_, "columns of the hidden state");
    require(columns_ * 4 <= kSquareParts, "more columns than the sums of squares have room for");
    for (const int owned : kOwned.of) {
      t_.owned = owned;
      if (pairs() * kPair <= s_.ctas) break;
    }
    require(pairs() * kPair <= s_.ctas, "more columns of the hidden state than the blocks have room for");
    for (const int keys : kKeys.of) {
      t_.key_rows = keys;
      if (2 * keys >= t_.m) break;
    }
    t_.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(kHead));
    t_.squares = take<float>(size_t(kMaxRows) * kSquareParts);
    x_ = activation(width_);
    prepare(first);
    hidden_ = first.x;
    bool more = true;
    while (more) more = layer();
    require(at_ == end_, "operations that are not of a layer");
    share_memory();
  }

 private:
  template <typename T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(memory_.take(count * sizeof(T)));
  }
  Bits* activation(int cols) { return take<Bits>((size_t(cols / kChunk) * t_.rows + kSpareRows) * kChunk); }
  static int whole(int columns, const char* what) {
    require(columns > 0 && columns % kChunk == 0, std::string(what) + ": no multiple of 64");
    return columns / kChunk;
  }
  int pairs() const { return columns_ * divide_up(t_.m, kPair * t_.owned); }

  Phase& add(Kind kind, bool joins = false) {
    require(t_.phases < kMaxPhases, "more operations than the table has room for");
    if (t_.phases > 0 && !joins) ++group_;
    Phase& p = t_.phase[t_.phases++];
    std::memset(static_cast<void*>(&p), 0, sizeof p);
    p.kind = kind, p.group = group_, p.ctas = s_.ctas, p.split = 1, p.x_rows = t_.rows, p.row_tiles = 1;
    return p;
  }
  // x of `cols` columns from `from`, in tiles of p.rows, and the weight.
  void product(Phase& p, const Bits* from, int cols, const Weight& w) {
    p.x = from, p.chunks = whole(cols, "k");
    require(w.dtype == DType::kBF16 && w.k == cols, "a weight of another type");
    p.w = memory_.pack(p, w);
  }
  template <Sizes kSizes>
  void tile_rows_for(Phase& p) {
    for (const int rows : kSizes.of) {
      p.rows = rows, p.row_tiles = divide_up(t_.m, rows);
      if (tiles_of(p) <= s_.ctas) return;
    }
  }
  void normed(Phase& p, const Norm& norm) {
    require(norm.kind == NormKind::kRms && !norm.bias, "a norm of another kind");
    p.eps = norm.eps, p.mean = 1.0f / static_cast<float>(width_);
  }
  // The norm that reads what `p` writes of the hidden state.
  void next(Phase& p, const Norm& norm) {
    require(norm.kind == NormKind::kRms && !norm.bias, "a norm of another kind");
    require(!norm.weight || (norm.weight.dtype == DType::kF32 && norm.weight.step_bytes == 0),
            "a norm's weight");
    p.next = reinterpret_cast<const float*>(norm.weight.base), p.next_plus = norm.plus;
  }
  static bool plain(const View& v) {
    return v.dtype == DType::kBF16 && v.step_bytes == 0 && v.ld % 2 == 0 &&
           reinterpret_cast<uintptr_t>(v.base) % 4 == 0;
  }
  template <typename T>
  const T& op(const char* what) {
    require(at_ < end_ && std::holds_alternative<T>(ops_[at_]), what);
    return std::get<T>(ops_[at_++]);
  }

  void prepare(const Qkv& first) {
    require(plain(first.x), "a hidden state that is not aligned");
    t_.prefix = reinterpret_cast<const Bits*>(first.x.base), t_.ld_prefix = first.x.ld;
    Phase& p = add(Kind::kPrepare);
    p.rows = t_.owned, p.column_tiles = columns_, p.row_tiles = kPair * divide_up(t_.m, kPair * t_.owned);
    p.out = x_;
    next(p, first.norm);
  }

  // A layer; false after the last, which has keys and values only.
  bool layer() {
    const Qkv& qkv = op<Qkv>("operations that do not begin with q, k and v");
    require(same(qkv.x, hidden_), "q, k and v of something else");
    require(!qkv.q_bias && !qkv.k_bias && !qkv.v_bias && qkv.k && qkv.v && qkv.head_dim == kHead,
            "a projection of other parts");
    require(
        plain(qkv.k) && plain(qkv.v) && qkv.k.cols == qkv.v.cols && qkv.k.rows == t_.m && qkv.v.rows == t_.m,
        "keys that are not aligned");
    const int kv = whole(qkv.k.cols, "keys"), heads = qkv.q ? whole(qkv.q.cols, "queries") : 0;
    if (!t_.k) {
      kv_ = kv;
      t_.k = take<Bits>((size_t(kv) * 2 * t_.key_rows + kSpareRows) * kChunk);
      t_.v = take<Bits>((size_t(kv) * 2 * t_.key_rows + kSpareRows) * kChunk);
      rotation(qkv);
    }
    require(kv == kv_ && same(qkv.rope, rope_) && same(qkv.positions, positions_),
            "layers that are not alike");
    Phase& p = add(Kind::kQkv);
    p.heads[0] = heads, p.heads[1] = kv, p.column_tiles = heads + 2 * kv;
    tile_rows_for<kQkvRows>(p);
    product(p, x_, width_, qkv.w);
    normed(p, qkv.norm);
    p.cache_k = reinterpret_cast<Bits*>(qkv.k.base), p.ld_k = qkv.k.ld;
    p.cache_v = reinterpret_cast<Bits*>(qkv.v.base), p.ld_v = qkv.v.ld;
    if (heads == 0) {
      projections(qkv, 0);
      while (at_ < end_) require(done_.count(at_++) > 0, "operations that are not of a layer");
      return false;
    }
    if (!q_) q_ = activation(qkv.q.cols), a_ = activation(qkv.q.cols), heads_ = heads;
    require(heads == heads_ && heads % kv == 0, "layers that are not alike");
    p.out = q_;
    t_.heads_per_key = heads / kv;

    const Attention& a = op<Attention>("no attention after q, k and v");
    require(same(a.q, qkv.q) && same(a.k, qkv.k) && same(a.v, qkv.v) && a.batch == 1 && a.out_scale == 0.0f,
            "attention to something else");
    blocks(a);
    Phase& attention = add(Kind::kAttention);
    attention.column_tiles = heads, attention.row_tiles = divide_up(t_.m, 64), attention.rows = t_.key_rows;
    attention.x = q_, attention.out = a_, attention.chunks = 1;
    attention.ctas = std::min(s_.ctas, tiles_of(attention));
    projections(qkv, attention.ctas);

    state(a.out, a_, heads, 1);
    const GatedLinear& gated = op<GatedLinear>("no gated product after attention");
    require(same(gated.x, hidden_) && gated.out_scale == 0.0f && gated.out.dtype == DType::kBF16,
            "a gated product of something else");
    require(gated.act != Act::kNone, "a gated product without an activation");
    next(t_.phase[t_.phases - 1], gated.norm);
    const int wide = whole(gated.out.cols, "columns of the gated product");
    if (!h_) h_ = activation(gated.out.cols), wide_ = wide;
    require(wide == wide_, "layers that are not alike");
    Phase& g = add(Kind::kGated);
    g.column_tiles = wide, g.act = static_cast<int>(gated.act), g.out = h_;
    tile_rows_for<kGatedRows>(g);
    product(g, x_, width_, gated.w);
    normed(g, gated.norm);

    state(gated.out, h_, wide, s_.split);
    require(at_ < end_ && std::holds_alternative<Qkv>(ops_[at_]), "no keys after a layer");
    next(t_.phase[t_.phases - 1], std::get<Qkv>(ops_[at_]).norm);
    return true;
  }
  // hidden state + x W^T, the hidden state from here on.
  void state(const View& x, const Bits* from, int chunks, int split) {
    const Linear& o = op<Linear>("no product into the hidden state");
    require(same(o.x, x) && o.residual && same(o.residual, hidden_) && o.residual.rows == t_.m,
            "a residual from afar");
    require(o.norm.kind == NormKind::kNone && !o.bias && !o.gate && o.act == Act::kNone && o.scale == 1.0f &&
                o.out.dtype == DType::kBF16 && o.out.cols == width_ && o.out_scale == 0.0f,
            "a product of another kind into the hidden state");
    Phase& p = add(Kind::kLinear);
    p.split = chunks >= 4 ? split : 1;
    p.rows = t_.owned * p.split, p.column_tiles = columns_;
    p.row_tiles = kPair * divide_up(t_.m, kPair * t_.owned) / p.split;
    p.out = x_;
    product(p, from, chunks * kChunk, o.w);
    hidden_ = o.out;
  }

  // The products of these keys and values that come after the layers, beside what the blocks before
  // `first_cta` do.
  void projections(const Qkv& qkv, int first_cta) {
    std::vector<size_t> found;
    for (size_t i = at_; i < end_; ++i) {
      const auto* o = std::get_if<Linear>(&ops_[i]);
      if (o && done_.count(i) == 0 && (same(o->x, qkv.k) || same(o->x, qkv.v))) found.push_back(i);
    }
    if (found.empty()) return;
    const int each = (s_.ctas - first_cta) / static_cast<int>(found.size());
    require(each > 0, "more heads than blocks");
    for (size_t n = 0; n < found.size(); ++n) {
      const Linear& o = std::get<Linear>(ops_[found[n]]);
      require(o.norm.kind == NormKind::kNone && !o.bias && !o.gate && !o.residual && o.act == Act::kNone &&
                  o.scale == 1.0f && plain(o.out) && o.out_scale == 0.0f,
              "a product of another kind of keys or values");
      Phase& p = add(Kind::kProject, first_cta > 0 || n > 0);
      p.first_cta = first_cta + static_cast<int>(n) * each, p.ctas = each;
      p.rows = t_.owned, p.row_tiles = divide_up(t_.m, t_.owned), p.column_tiles = whole(o.out.cols, "keys");
      p.x_rows = 2 * t_.key_rows;
      p.out = reinterpret_cast<Bits*>(o.out.base), p.ld_out = o.out.ld;
      product(p, same(o.x, qkv.k) ? t_.k : t_.v, o.x.cols, o.w);
      done_[found[n]] = true;
    }
  }

  void rotation(const Qkv& qkv) {
    rope_ = qkv.rope, positions_ = qkv.positions;
    if (!rope_) return;
    require(rope_.step_bytes == 0 && positions_.step_bytes == 0 && rope_.dtype == DType::kF32,
            "a rotary table");
    t_.rope = reinterpret_cast<const float*>(rope_.base), t_.ld_rope = rope_.ld, t_.rope_rows = rope_.rows;
    t_.positions = reinterpret_cast<const int*>(positions_.base), t_.ld_positions = positions_.ld;
  }
  void blocks(const Attention& a) {
    if (!seen_) q_block_ = a.q_block, k_block_ = a.k_block, seen_ = true;
    require(same(a.q_block, q_block_) && same(a.k_block, k_block_), "layers that are not alike");
    t_.q_block = reinterpret_cast<const int*>(q_block_.base), t_.ld_q_block = q_block_.ld;
    t_.k_block = reinterpret_cast<const int*>(k_block_.base), t_.ld_k_block = k_block_.ld;
  }

  static int chunks_of(const Phase& p) { return divide_up(p.chunks, p.split); }  // of a block
  // Two chunks a stage where a slot of the least size has room for them, or three: a stage costs its waits.
  void share_memory() {
    t_.exchange = kLeastExchange;
    t_.slot = std::max(s_.slot, 2 * t_.key_rows * kChunkBytes);  // a stage of attention
    const auto bytes = [](const Phase& p, int chunks) {
      return chunks * (tile_rows(p) + p.rows) * kChunkBytes;
    };
    for (int i = 0; i < t_.phases; ++i) {
      const Phase& p = t_.phase[i];
      if (!is_product(p)) continue;
      t_.slot = std::max(t_.slot, bytes(p, p.kind == Kind::kGated || chunks_of(p) < 4 ? 1 : 2));
      const int units =
          p.rows / 8 / p.split;  // handed over within the block, and received from two warpgroups
      if (p.kind != Kind::kGated)
        t_.exchange = std::max(t_.exchange, units * (p.split == kPair ? 3 : 1) * kUnitBytes);
    }
    t_.slot = pad_to(t_.slot, 1024);
    for (int i = 0; i < t_.phases; ++i) {
      Phase& p = t_.phase[i];
      if (!is_product(p)) continue;
      p.stage_chunks = 1;
      while (p.stage_chunks < 4 && 2 * (p.stage_chunks + 1) <= chunks_of(p) + 1 &&
             bytes(p, p.stage_chunks + 1) <= t_.slot)
        ++p.stage_chunks;
      require(divide_up(chunks_of(p), p.stage_chunks) <= kMaxStages, "k is too long");
    }
    t_.slots = std::min(s_.max_slots, kMaxSlots);
    while (t_.slots > 0 && shared_bytes(t_) > kSharedOfBlock) --t_.slots;
    require(t_.slots > kStages, "no room for a head's keys");  // all of a tile of attention at once
  }

  Table& t_;
  const std::vector<Op>& ops_;
  size_t at_, end_;
  const Settings& s_;
  const Memory& memory_;
  std::map<size_t, bool> done_;  // projections: they come after the layers
  View hidden_, rope_, positions_, q_block_, k_block_;
  bool seen_ = false;
  Bits *x_ = nullptr, *q_ = nullptr, *a_ = nullptr, *h_ = nullptr;
  int width_ = 0, columns_ = 0, heads_ = 0, kv_ = 0, wide_ = 0, group_ = 0;
};

}  // namespace

Range find_layers(const std::vector<Op>& ops) {
  Range r;
  while (r.begin < ops.size()) {
    const auto* qkv = std::get_if<Qkv>(&ops[r.begin]);
    if (qkv && qkv->norm.kind == NormKind::kRms) break;
    ++r.begin;
  }
  std::vector<const std::byte*> keys;
  size_t i = r.begin;
  for (; i < ops.size(); ++i) {
    const auto* qkv = std::get_if<Qkv>(&ops[i]);
    if (!qkv) continue;
    keys.push_back(qkv->k.base), keys.push_back(qkv->v.base);
    if (!qkv->q) break;
  }
  for (r.end = std::min(i + 1, ops.size()); r.end < ops.size(); ++r.end) {
    const auto* linear = std::get_if<Linear>(&ops[r.end]);
    if (!linear || std::find(keys.begin(), keys.end(), linear->x.base) == keys.end()) break;
  }
  return r;
}

std::string build(Table& table, const std::vector<Op>& ops, Range range, const Settings& settings,
                  const Memory& memory) {
  std::memset(static_cast<void*>(&table), 0, sizeof table);
  try {
    Builder(table, ops, range, settings, memory).run();
  } catch (const Refused& refused) {
    return refused.why;
  }
  return {};
}

}  // namespace vla::cuda::prefix
