#include "build.h"

#include <cmath>
#include <cstring>
#include <map>

#include "refused.h"

namespace vla::cuda::head {

namespace {

class Builder {
 public:
  Builder(Table& table, const std::vector<Op>& body, const std::vector<Fact>& facts, const Settings& settings,
          const Memory& memory)
      : t_(table), body_(body), facts_(facts), s_(settings), memory_(memory) {}

  void run(int steps) {
    require(body_.size() >= 2 && body_.size() <= kMaxPhases, "the loop has too many operations");
    require(s_.clusters > 0 && s_.clusters <= kMaxTiles, "the clusters that fit this device");
    const auto* euler = std::get_if<Euler>(&body_.back());
    require(euler != nullptr, "the loop does not end with a step of the actions");
    t_.phases = static_cast<int>(body_.size()), t_.steps = steps;
    t_.ctas = kCluster * s_.clusters;
    t_.m = euler->x.rows, t_.parts = 15;
    for (const Op& op : body_) {
      if (const auto* qkv = std::get_if<Qkv>(&op)) t_.m = qkv->x.rows;
    }
    t_.rows = pad_to(t_.m, 8), t_.first = t_.m - euler->x.rows;
    require(t_.first >= 0, "more actions than rows");
    require(t_.rows <= 8 * kCluster, "more than 64 rows");
    actions_ = euler->x;
    require(actions_.step_bytes == 0 && actions_.cols % 4 == 0 && actions_.cols <= kMaxChunks * kChunk,
            "actions");
    t_.sample = reinterpret_cast<const float*>(actions_.base), t_.ld_sample = static_cast<int>(actions_.ld);
    t_.action_n = actions_.cols;
    joined_at_ = find_joined();
    t_.actions = take<Bits>(size_t(divide_up(actions_.cols, kChunk)) * t_.rows * kChunk);
    for (size_t i = 0; i < body_.size(); ++i) {
      Phase& p = t_.phase[i];
      std::memset(static_cast<void*>(&p), 0, sizeof p);
      p.scale = 1.0f;
      index_ = i;
      std::visit([&](const auto& op) { fill(p, op); }, body_[i]);
    }
    require(std::holds_alternative<Linear>(body_[0]), "the loop does not begin with the actions' projection");
    share_memory();
  }

 private:
  template <typename T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(memory_.take(count * sizeof(T)));
  }
  using Key = std::pair<const std::byte*, int>;
  // The rows of the actions are the last of those of the loop: all have the name of the first row.
  bool is_part(const View& v) const { return t_.first > 0 && v.rows == t_.m - t_.first; }
  Key key(const View& v) const {
    const int64_t before = is_part(v) ? t_.first * v.ld * static_cast<int64_t>(size_of(v.dtype)) : 0;
    return {v.base - before, v.cols};
  }

  Bits* writes(const View& v) {
    require(v.dtype == DType::kBF16 && v.rows == t_.m && v.step_bytes == 0, "an output of another shape");
    return written(v);
  }
  Bits* written(const View& v) {
    Bits*& to = activations_[key(v)];
    if (!to) to = take<Bits>(size_t(divide_up(v.cols, kChunk)) * t_.rows * kChunk);
    return to;
  }
  const Bits* reads(const View& v) {
    require((v.rows == t_.m || is_part(v)) && v.step_bytes == 0, "an input of another shape");
    if (v.base == actions_.base) {
      require(v.dtype == DType::kF32 && v.cols == actions_.cols && v.ld == actions_.ld,
              "a part of the actions");
      return t_.actions;
    }
    const auto found = activations_.find(key(v));
    require(found != activations_.end() && v.dtype == DType::kBF16, "an input that the loop has not written");
    return found->second;
  }
  static Stepped stepped(const View& v) {
    if (!v) return {nullptr, 0};
    require(v.dtype == DType::kF32 && v.step_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(v.base) % 16 == 0,
            "a vector that is not aligned");
    return {reinterpret_cast<const float*>(v.base), v.step_bytes / 4};
  }
  static Stepped number(const View& v) {
    require(v.dtype == DType::kF32 && v.step_bytes % 4 == 0, "a number of another type");
    return {reinterpret_cast<const float*>(v.base), v.step_bytes / 4};
  }

  // x, its norm and W; tile_rows and tiles follow from n.
  void product(Phase& p, const View& x, const Norm& norm) {
    p.x = reads(x), p.mean = 1.0f / static_cast<float>(x.cols), p.chunks = divide_up(x.cols, kChunk);
    if (norm.kind == NormKind::kNone) return;
    require(norm.kind == NormKind::kRms, "a layer norm");
    const auto found = squares_.find(key(x));
    require(found != squares_.end(), "a norm of what no linear operation has written");
    p.normed = 1, p.eps = norm.eps, p.squares_in = found->second;
    if (norm.bias) {
      require(facts_[index_].shift != nullptr, "a norm whose bias changes");
      p.shift = {facts_[index_].shift, facts_[index_].shift_stride};
      require(p.shift.stride % 4 == 0 && reinterpret_cast<uintptr_t>(p.shift.p) % 16 == 0,
              "a table that is not aligned");
    }
  }
  void spread(Phase& p) {
    p.units = units_of(p);
    const int units = p.units, each = std::max(divide_up(units, t_.ctas), s_.min_units);
    require(each <= (p.kind == Kind::kQkv ? kMostQkvUnits : kMostUnits),
            "more columns than the blocks have room for");
    p.tile_rows = 16 * each, p.tiles = divide_up(units, each);
    x_chunks_ = std::max(x_chunks_, p.chunks);
    stages(p);
  }
  void split(Phase& p) {
    require(p.n % 4 == 0, "columns are no multiple of 4");
    p.tile_rows = divide_up(p.n, 64) <= s_.clusters ? 64 : kWide, p.tiles = divide_up(p.n, p.tile_rows);
    p.each = divide_up(p.chunks, kCluster);
    require(p.tiles <= s_.clusters, "more columns than the clusters have room for");
    split_chunks_ = std::max(split_chunks_, p.each);
    stages(p);
  }
  int chunks_of(const Phase& p) const { return is_spread(p) ? p.chunks : p.each; }  // of a block
  void stages(Phase& p) {
    require(chunks_of(p) <= kMaxChunks, "k is too long");  // the feeder has a lane a stage
    widest_ = std::max(widest_, p.tile_rows * kChunkBytes);
  }

  void fill(Phase& p, const Linear& op) {
    p.kind = Kind::kLinear, p.n = op.out.cols, p.act = static_cast<int>(op.act), p.scale = op.scale;
    product(p, op.x, op.norm);
    if (is_part(op.out)) {
      require(op.out.dtype == DType::kBF16 && op.out.step_bytes == 0 && !op.residual, "a part of the rows");
      p.out = written(op.out);
    } else {
      p.out = writes(op.out);
    }
    p.bias = stepped(op.bias), p.gate = stepped(op.gate);
    if (op.residual) {
      // in registers, where the linear operation before this one has left it
      require(stream_ == key(op.residual) && op.residual.rows == t_.m && op.residual.cols == p.n,
              "a residual from afar");
      p.residual = 1;
    }
    stream_ = key(op.out);
    split(p);
    if (find_reader(p, op.out) && is_part(op.out)) {
      // what is read of the rows before stands there already, and begins their hidden state
      p.linear.fixed = reinterpret_cast<const Bits*>(key(op.out).first);
      p.linear.ld_fixed = static_cast<int>(op.out.ld);
      require(op.out.ld % 4 == 0 && reinterpret_cast<uintptr_t>(p.linear.fixed) % 8 == 0,
              "rows that are not aligned");
    }
    p.w = memory_.pack(p, op.w);
  }
  // The norm of what reads `out` goes into what is written; its rows' sums of squares are left for it. True
  // where all rows of the loop are read.
  bool find_reader(Phase& p, const View& out) {
    int plain = 0;
    bool whole = false;
    const Norm* found = nullptr;
    for (size_t i = index_ + 1; i < body_.size(); ++i) {
      bool overwritten = false;
      std::visit(
          [&](const auto& op) {
            const View* x = nullptr;
            if constexpr (requires { op.h; }) {
              x = &op.h;
            } else if constexpr (requires { op.x; }) {
              x = &op.x;
            }
            if constexpr (requires { op.norm; }) {
              if (x && key(*x) == key(out)) {
                whole |= x->rows == t_.m;
                if (op.norm.kind == NormKind::kNone) ++plain;
                if (op.norm.kind == NormKind::kRms) {
                  require(!found, "two norms of the same rows");
                  found = &op.norm;
                }
              }
            }
            if constexpr (requires { op.out; }) overwritten = key(op.out).first == key(out).first;
          },
          body_[i]);
      if (overwritten) break;
    }
    require(!(plain && found), "rows that are read with and without a norm");
    if (!found) return whole;
    p.next = stepped(found->weight), p.next_plus = found->plus;
    float*& squares = squares_[key(out)];
    if (!squares) squares = take<float>(size_t(64) * kSquareParts);
    p.squares_out = squares;
    return whole;
  }

  void fill(Phase& p, const GatedLinear& op) {
    p.kind = Kind::kGated, p.n = op.out.cols, p.act = static_cast<int>(op.act);
    require(p.n % 8 == 0, "a gated product of columns that are no multiple of 8");
    product(p, op.x, op.norm);
    p.out = writes(op.out);
    spread(p);
    p.w = memory_.pack(p, op.w);
  }

  void fill(Phase& p, const Qkv& op) {
    p.kind = Kind::kQkv, p.n = op.q.cols, p.head_dim = op.head_dim;
    require(op.q && !op.q_bias && !op.k_bias && !op.v_bias, "a projection of other parts");
    require(bool(op.k) == bool(op.v), "keys without values");
    require(op.head_dim == 64 || op.head_dim == 128 || op.head_dim == 256,
            "heads of " + std::to_string(op.head_dim));
    while (1 << p.head_shift < op.head_dim) ++p.head_shift;
    const auto* a = index_ + 1 < body_.size() ? std::get_if<Attention>(&body_[index_ + 1]) : nullptr;
    require(a && key(a->q) == key(op.q), "queries that the next operation does not read");
    product(p, op.x, op.norm);
    require(op.q.dtype == DType::kBF16 && op.q.rows == t_.m && op.q.step_bytes == 0,
            "queries of another shape");
    p.stack = arrange(*a).stack;
    p.joined = joined_at_ > 0;
    if (!p.joined) {
      Bits*& queries = queries_[query_elements(p)];
      if (!queries) queries = take<Bits>(query_elements(p));
      p.out = queries;
    }
    QkvPart& q = p.qkv;
    q.units[0] = op.q.cols / 16, q.units[1] = op.k ? op.k.cols / 16 : 0,
    q.units[2] = op.v ? op.v.cols / 16 : 0;
    if (op.rope) {
      require(op.rope.step_bytes == 0 && op.positions.step_bytes == 0 && op.rope.ld % 2 == 0 &&
                  reinterpret_cast<uintptr_t>(op.rope.base) % 8 == 0,
              "a rotary table that moves");
      q.rope = reinterpret_cast<const float*>(op.rope.base), q.ld_rope = static_cast<int>(op.rope.ld);
      q.positions = reinterpret_cast<const int*>(op.positions.base),
      q.ld_positions = static_cast<int>(op.positions.ld), q.rope_rows = op.rope.rows;
    }
    if (op.k) {
      const size_t count = size_t(op.k.cols) * kCluster * kFreshRows;
      require(op.v.cols == op.k.cols, "values of another width");
      for (Bits** to : {&q.fresh_k, &q.fresh_v}) {
        Bits*& shared = fresh_[{count, to == &q.fresh_k}];
        if (!shared) shared = take<Bits>(count);
        *to = shared;
      }
    }
    if (p.joined) {
      p.units = units_of(p), p.tile_rows = kJoinedColumns * (op.k ? 3 : 1);
      p.tiles = op.q.cols / kChunk * kCluster;
      x_chunks_ = std::max(x_chunks_, p.chunks);
      stages(p);
    } else {
      spread(p);
    }
    p.w = memory_.pack(p, op.w);
  }

  // How the heads are given to the clusters: each by itself, or stacked where a cluster then has fewer
  // columns of the output (eight heads of 50 rows over one key head are seven tiles of rows). columns 0: in
  // no way.
  struct Arrangement {
    Stack stack;
    int columns;
  };
  Arrangement arrange(const Attention& op) const {
    const int chunks = op.head_dim / kChunk, heads = op.q.cols / op.head_dim, per_key = op.q.cols / op.k.cols;
    Arrangement best{{1, 1, t_.rows}, 0};
    for (const int stacked : {1, per_key}) {
      const int rows = stacked * t_.m, tiles = divide_up(rows, kQueryRows),
                parts = heads / stacked * tiles * chunks;
      int columns = 1;
      while (columns < kMostColumns && parts > columns * s_.clusters) columns *= 2;
      if (chunks % columns != 0 || parts > columns * s_.clusters) continue;
      if (best.columns == 0 || columns < best.columns)
        best = {{stacked, tiles, std::min(pad_to(rows, 8), kQueryRows)}, columns};
    }
    return best;
  }

  // Rows of keys of the prefix that a block has, with `fresh` rows of the loop's keys behind them as many as
  // the kernel is made for; 0: there is no room.
  static int prefix_rows(int prefix, int fresh) {
    const int rows = pad_to(divide_up(prefix, kCluster), 8) + fresh;
    for (int i = 0; rows <= kMaxKeys; ++i)
      if (key_rows_made(i) >= rows) return key_rows_made(i) - fresh;
    return 0;
  }
  // Where in the exchange each qkv joined to its attention (layout.h) has its keys, values and queries; 0:
  // they are phases of their own. What is joined saves a wait between all blocks, some kSaved cycles (docs:
  // performance.md). It costs the columns of k and v that are computed by more than one cluster: a product of
  // 16 of k takes as long for 8 columns as for 64, so what counts are their weights, kBytesPerCycle of a
  // block.
  static constexpr int kSaved = 2000, kBytesPerCycle = 16;
  int find_joined() const {
    if (!s_.joins) return 0;
    int before = kCluster * 8 * kChunk * 2, bytes = 0, gained = 0;  // before: what attention is sent
    for (size_t i = 0; i < body_.size(); ++i) {
      if (const auto* g = std::get_if<GatedLinear>(&body_[i])) {
        const int units = std::max(divide_up(g->out.cols / 8, t_.ctas), s_.min_units);
        before = std::max(before, kConsumers * 16 * units);  // what its warpgroups exchange
      }
      const auto* a = std::get_if<Attention>(&body_[i]);
      if (!a) continue;
      const auto* q = i > 0 ? std::get_if<Qkv>(&body_[i - 1]) : nullptr;
      const int heads = a->q.cols / kChunk, fresh = q && q->k ? kFreshRows : 0;
      if (i >= 2 && std::holds_alternative<Attention>(body_[i - 2])) return 0;  // two pairs, no phase between
      if (!q || a->head_dim != kChunk || heads > s_.clusters || arrange(*a).stack.heads != 1) return 0;
      if (a->k.cols % kChunk != 0 || heads % (a->k.cols / kChunk) != 0) return 0;
      const int keys = prefix_rows(a->k.rows - (fresh ? t_.m : 0), fresh) + fresh;
      if (keys == fresh || keys > kJoinedKeys) return 0;
      bytes = std::max(bytes, (2 * keys + t_.rows) * kChunkBytes);
      const int columns = q->q.cols + (q->k ? 2 * q->k.cols : 0),
                apart = 16 * std::max(divide_up(columns / 16, t_.ctas), s_.min_units),
                together = kJoinedColumns * (q->k ? 3 : 1);
      gained += kSaved - (together - apart) * pad_to(q->x.cols, kChunk) * 2 / kBytesPerCycle;
    }
    before = pad_to(before, 1024);
    return gained > 0 && before + bytes <= receive_stats(0, 0) ? before : 0;
  }

  void fill(Phase& p, const Attention& op) {
    p.kind = Kind::kAttention, p.n = op.q.cols, p.head_dim = op.head_dim, p.chunks = op.head_dim / kChunk;
    p.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(op.head_dim));
    const auto* qkv = index_ > 0 ? std::get_if<Qkv>(&body_[index_ - 1]) : nullptr;
    require(qkv && key(qkv->q) == key(op.q) && op.batch == 1,
            "attention of queries that are not just projected");
    const Arrangement arrangement = arrange(op);
    require(arrangement.columns > 0, "more heads than clusters");
    p.stack = arrangement.stack;
    p.x = t_.phase[index_ - 1].out, p.out = writes(op.out), p.joined = joined_at_ > 0;
    AttentionPart& a = p.attention;
    for (const View* v : {&op.k, &op.v}) {
      require(v->dtype == DType::kBF16 && v->step_bytes == 0 && v->ld % 8 == 0 &&
                  reinterpret_cast<uintptr_t>(v->base) % 16 == 0 && v->cols == op.k.cols,
              "keys that are not aligned");
    }
    const QkvPart& written = t_.phase[index_ - 1].qkv;
    a.fresh = qkv->k ? t_.m : 0, a.prefix = op.k.rows - a.fresh;
    require(a.prefix >= 0 && facts_[index_].stable_keys >= a.prefix, "keys that the loop changes");
    if (a.fresh > 0) {
      const auto row = [&](const View& v) { return v.base + static_cast<int64_t>(a.prefix) * v.ld * 2; };
      require(row(op.k) == qkv->k.base && row(op.v) == qkv->v.base && qkv->k.ld == op.k.ld &&
                  qkv->v.ld == op.v.ld,
              "keys that are not the last ones");
      a.fresh_k = written.fresh_k, a.fresh_v = written.fresh_v, a.fresh_rows = kFreshRows;
    }
    a.k = reinterpret_cast<const Bits*>(op.k.base), a.v = reinterpret_cast<const Bits*>(op.v.base);
    a.ld_k = static_cast<int>(op.k.ld), a.ld_v = static_cast<int>(op.v.ld);
    if (op.q_block) {
      a.q_block = reinterpret_cast<const int*>(op.q_block.base),
      a.k_block = reinterpret_cast<const int*>(op.k_block.base);
      a.ld_q_block = static_cast<int>(op.q_block.ld), a.ld_k_block = static_cast<int>(op.k_block.ld);
    }
    a.kv_heads = op.k.cols / op.head_dim;
    const int stacks = op.q.cols / op.head_dim / p.stack.heads;
    a.stacks_per_key = stacks / a.kv_heads;
    a.prefix_rows = prefix_rows(a.prefix, a.fresh_rows);
    require(a.prefix_rows > 0, "more keys than a block has room for");
    a.columns = arrangement.columns, p.tiles = stacks * p.stack.tiles * p.chunks / a.columns;
    const size_t count = size_t(op.k.cols) * kCluster * a.prefix_rows;
    a.packed_k = take<Bits>(count), a.packed_v = take<Bits>(count);
    if (!p.joined) keys_bytes_ = std::max(keys_bytes_, queries_at(p) + p.chunks * p.stack.rows * kChunkBytes);
  }

  void fill(Phase& p, const Euler& op) {
    require(index_ + 1 == body_.size(), "a step of the actions before the end of the loop");
    p.kind = Kind::kEuler, p.n = op.x.cols;
    product(p, op.h, op.norm);
    p.out = t_.actions, p.bias = stepped(op.bias);
    EulerPart& e = p.euler;
    for (const View* v : {&op.x, &op.previous, &op.weight})
      require(v->step_bytes == 0, "a sample that moves");
    e.sample = reinterpret_cast<float*>(op.x.base), e.ld_sample = static_cast<int>(op.x.ld);
    e.previous = reinterpret_cast<const float*>(op.previous.base),
    e.ld_previous = static_cast<int>(op.previous.ld);
    e.weight = reinterpret_cast<const float*>(op.weight.base), e.ld_weight = static_cast<int>(op.weight.ld);
    e.gain = number(op.gain), e.time = number(op.time), e.dt = op.dt;
    split(p);
    p.w = memory_.pack(p, op.w);
  }

  template <typename O>
  void fill(Phase&, const O&) {
    throw Refused{"an operation that is not of an action head"};
  }

  void share_memory() {
    const int row = t_.rows * kChunkBytes;
    t_.x_bytes = pad_to(std::max({x_chunks_ * row, split_chunks_ * row + kSumBytes, keys_bytes_}), 1024);
    const int ring = kSharedOfBlock - t_.x_bytes - kExchange - kRest;
    // A stage costs its waits: two chunks are better than one, but not where the ring then holds few.
    // (Measured on an H200: SmolVLA 3.28 ms with 13 slots of 8 KB, 3.09 with 6 of 16; pi0.5 5.33 with 8 of
    // 10, 6.70 with 4 of 20.)
    t_.stage = s_.stage > 0 ? std::max(s_.stage, widest_) : ring / (2 * widest_) >= 6 ? 2 * widest_ : widest_;
    // Even: two warpgroups take stages in turn, and a slot must stay with one of them while a phase lasts.
    // Else it might wait for its stage while the other's before it is still on its way, and parities know no
    // more.
    t_.slots = std::min(ring / t_.stage, std::min(s_.max_slots, kMaxSlots)) / 2 * 2;
    for (int i = 0; i < t_.phases; ++i) {
      Phase& p = t_.phase[i];
      if (p.kind == Kind::kAttention && p.joined) p.attention.at = t_.x_bytes + joined_at_;
      if (p.kind == Kind::kAttention) continue;
      const int count = chunks_of(p);
      int stages = divide_up(count, t_.stage / (p.tile_rows * kChunkBytes));
      if (is_spread(p) && !p.joined && count > 1) stages = pad_to(stages, 2);  // as many for both warpgroups
      p.stage_chunks = divide_up(count, stages);
    }
    require(t_.slots >= 4, "no room for weights beside x and the keys");
  }

  Table& t_;
  const std::vector<Op>& body_;
  const std::vector<Fact>& facts_;
  const Settings& s_;
  const Memory& memory_;
  size_t index_ = 0;
  View actions_;
  Key stream_{nullptr, 0};
  std::map<Key, Bits*> activations_;
  std::map<size_t, Bits*> queries_;  // by their number: each is read by the operation after
  std::map<Key, float*> squares_;
  std::map<std::pair<size_t, bool>, Bits*> fresh_;
  int x_chunks_ = 0, split_chunks_ = 0, keys_bytes_ = 0;
  int joined_at_ = 0;  // see find_joined()
  int widest_ = 0;     // bytes of the widest chunk of weights
};

}  // namespace

std::string build(Table& table, const std::vector<Op>& body, int steps, const std::vector<Fact>& facts,
                  const Settings& settings, const Memory& memory) {
  try {
    Builder(table, body, facts, settings, memory).run(steps);
  } catch (const Refused& refused) {
    return refused.why;
  }
  return {};
}

}  // namespace vla::cuda::head
