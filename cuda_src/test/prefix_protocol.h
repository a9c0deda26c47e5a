// The persistent prefix's waiting, played on the host: every block's feeder, loader and two warpgroups as
// coroutines over the same table and the same questions (tile_at, stages_of, ...) as the kernel, barriers
// with arrivals and bytes, copies and sums that arrive late and in any order. Finds deadlocks, barriers of
// the wrong phase, slots read before what belongs there has come, and sums that arrive while others are read.
#pragma once

#include <memory>

#include "../cuda/prefix/layout.h"
#include "head_protocol.h"

namespace vla::test {

namespace prefix_protocol {

using namespace cuda::prefix;
using protocol::Agent;
using protocol::Mbarrier;
using protocol::Until;
using protocol::Wrong;

struct Cta {
  Mbarrier full[kMaxSlots], empty[kMaxSlots], sums;
  int64_t weights[kMaxSlots], x[2][kMaxSlots];  // what a slot has, by tag(); x: two halves
  int received = 0;                             // sums of the other block that are there
  bool reading = false;
  int here = 0, turn = 0;  // warpgroups that have met
};

class Play {
 public:
  Play(const Table& t, unsigned seed) : t_(t), random_(seed), ctas_(t.ctas), done_(t.ctas, 0) {
    for (Cta& c : ctas_) {
      for (Mbarrier& b : c.full) b.count = b.pending = 2;
      for (Mbarrier& b : c.empty) b.count = b.pending = kConsumers / 32;
      for (int i = 0; i < kMaxSlots; ++i) c.weights[i] = c.x[0][i] = c.x[1][i] = -1;
    }
  }
  std::string run() {
    std::vector<Agent> agents;
    for (int i = 0; i < t_.ctas; ++i) {
      agents.push_back(filler(i, true)), agents.push_back(filler(i, false)), agents.push_back(consumer(i, 0)),
          agents.push_back(consumer(i, 1));
    }
    std::string wrong;
    try {
      size_t left = agents.size();
      int idle = 0;
      while (left > 0) {
        bool moved = false;
        for (Agent& a : agents) {
          auto h = a.handle;
          if (h.done() || random_() % 4 == 0) continue;  // some are slower than others
          if (h.promise().ready && !h.promise().ready()) continue;
          h.promise().ready = nullptr;
          h.resume();
          moved = true;
          if (h.promise().error) std::rethrow_exception(h.promise().error);
          if (h.done()) --left;
        }
        for (size_t i = 0; i < late_.size();) {
          if (random_() % 3 == 0) {
            ++i;
            continue;
          }
          const auto arrive = std::move(late_[i]);
          late_[i] = std::move(late_.back()), late_.pop_back();
          arrive();
          moved = true;
        }
        idle = moved ? 0 : idle + 1;
        if (idle > 50) throw Wrong{"deadlock with " + std::to_string(left) + " roles left"};
      }
      if (!late_.empty()) throw Wrong{"copies that arrive after the end"};
      for (int d : done_)
        if (d != t_.phase[t_.phases - 1].group + 1) throw Wrong{"a block that is not done with all groups"};
    } catch (const Wrong& w) {
      wrong = w.what;
    }
    for (Agent& a : agents) a.handle.destroy();
    return wrong;
  }

 private:
  static int64_t tag(int phase, int tile, int stage) { return (int64_t(phase) * 10000 + tile) * 100 + stage; }
  // Of a product's x: which rows.
  static int64_t x_tag(const Phase& p, int phase, int tile, const Tile& at, int stage) {
    return tag(phase, is_product(p) ? at.row : tile, stage);
  }
  static Until wait(Mbarrier& b, int parity) {
    return {[&b, parity] { return b.passed(parity); }};
  }
  bool passed(int group) const {
    return std::all_of(done_.begin(), done_.end(), [&](int d) { return d >= group; });
  }
  void report(int cta, int group) {
    if (!passed(group)) throw Wrong{"a block that is done before the group began"};
    if (done_[cta]++ != group) throw Wrong{"a block that is done twice or out of order"};
  }

  // feed() or load(): the lanes of a batch in any order.
  Agent filler(int cta, bool weights) {
    Cta& me = ctas_[cta];
    Ring ring;
    bool busy = false;
    for (int i = 0; i < t_.phases; ++i) {
      const Phase& p = t_.phase[i];
      const auto ready = [&](int s) {
        return me.empty[s % t_.slots].passed(ring.parity(s % t_.slots, s / t_.slots) ^ 1);
      };
      const auto slot_of = [&](int s) { return s % t_.slots; };
      int tile = first_tile(p, cta), first = 0;
      // the loader has asked for room before the barrier, and copies after it
      if (!weights && tile < tiles_of(p)) {
        const Tile at = tile_at(p, tile, cta);
        for (; first < std::min(t_.slots, stages_of(p, at)); ++first) {
          co_await Until{[&] { return ready(first); }};
          me.full[slot_of(first)].expect(bytes_of(p, at, first, weights));
        }
      }
      if (!weights && (i == 0 || t_.phase[i - 1].group != p.group)) {
        busy = false;
        co_await Until{[this, &p] { return passed(p.group); }};
      }
      busy |= takes_part(p, cta);
      for (int s = 0; s < first; ++s) {
        if (shares_x(p, cta)) {
          copy_both(cta, i, p, tile_at(p, tile, cta), s);
        } else {
          copy(me, i, p, tile, tile_at(p, tile, cta), s, slot_of(s), weights);
        }
      }
      for (; tile < tiles_of(p); tile += p.ctas, first = 0) {
        const Tile at = tile_at(p, tile, cta);
        const int stages = stages_of(p, at);
        for (; first < stages; first += t_.slots) {
          std::vector<int> left;
          for (int s = first; s < std::min(first + t_.slots, stages); ++s) left.push_back(s);
          while (!left.empty()) {
            co_await Until{[&] { return std::any_of(left.begin(), left.end(), ready); }};
            const size_t start = random_() % left.size();
            for (size_t n = 0; n < left.size(); ++n) {
              const size_t k = (start + n) % left.size();
              if (!ready(left[k])) continue;
              const int its = slot_of(left[k]);
              if (weights && !is_product(p)) {
                me.weights[its] = tag(i, tile, left[k]);
                me.full[its].arrive();
              } else {
                me.full[its].expect(bytes_of(p, at, left[k], weights));
                copy(me, i, p, tile, at, left[k], its, weights);
              }
              left.erase(left.begin() + k);
              break;
            }
          }
        }
        ring.use(stages, t_.slots);
      }
      const bool last = i + 1 == t_.phases || t_.phase[i + 1].group != p.group;
      if (!weights && last && !busy) report(cta, p.group);
    }
  }
  int bytes_of(const Phase& p, const Tile& at, int stage, bool weights) const {
    const int chunks = p.kind != Kind::kAttention ? chunks_of_stage(p, at, stage) : stage == 0 ? 1 : 2;
    const int rows = weights                      ? tile_rows(p)
                     : p.kind != Kind::kAttention ? p.rows
                     : stage == 0                 ? 64
                                                  : t_.key_rows;
    const int bytes = chunks * rows * kChunkBytes;
    const int most = p.kind == Kind::kAttention ? t_.slot : weights ? x_in_slot(p) : t_.slot - x_in_slot(p);
    if (bytes <= 0 || bytes > most) throw Wrong{"a stage of " + std::to_string(bytes) + " bytes"};
    return bytes;
  }
  void copy(Cta& me, int phase, const Phase& p, int tile, const Tile& at, int stage, int slot, bool weights) {
    const int bytes = bytes_of(p, at, stage, weights);
    late_.push_back([=, &me, &p] {
      if (weights) {
        me.weights[slot] = tag(phase, tile, stage);
      } else {
        me.x[0][slot] = me.x[1][slot] = x_tag(p, phase, tile, at, stage);
      }
      me.full[slot].complete(bytes);
    });
  }
  // This block's half of the rows, in both blocks of the pair.
  void copy_both(int cta, int phase, const Phase& p, const Tile& at, int stage) {
    const int rank = cta % kPair, rows = rank == 0 ? half_rows(p.rows) : p.rows - half_rows(p.rows);
    for (const int to : {cta, cta ^ 1}) {
      const int tile = first_tile(p, to), bytes = chunks_of_stage(p, at, stage) * rows * kChunkBytes;
      late_.push_back([=, this, &p] {
        Cta& its = ctas_[to];
        its.x[rank][stage] = x_tag(p, phase, tile, at, stage);
        its.full[stage].complete(bytes);
      });
    }
  }

  Agent consumer(int cta, int group) {
    Cta& me = ctas_[cta];
    Ring ring;
    int sums_parity = 0;
    const auto here = [&](int its, int phase, int tile, int stage) {
      const Phase& p = t_.phase[phase];
      const int64_t x = x_tag(p, phase, tile, tile_at(p, tile, cta), stage);
      if (me.weights[its] != tag(phase, tile, stage) || me.x[0][its] != x || me.x[1][its] != x)
        throw Wrong{"a slot that has something else, phase " + std::to_string(phase)};
    };
    const auto meet = [&] {
      const int turn = me.turn;
      if (++me.here == 2) me.here = 0, ++me.turn;
      return Until{[&me, turn] { return me.turn != turn; }};
    };
    for (int i = 0; i < t_.phases; ++i) {
      const Phase& p = t_.phase[i];
      if (!takes_part(p, cta)) continue;
      for (int tile = first_tile(p, cta); tile < tiles_of(p); tile += p.ctas) {
        const Tile at = tile_at(p, tile, cta);
        const int stages = stages_of(p, at);
        std::vector<int> mine;  // stages that this warpgroup waits for
        for (int s = 0; s < stages; ++s)
          if (p.kind != Kind::kAttention || s == 0 || s - 1 == group) mine.push_back(s);
        if (p.split == kPair && group == 0) me.sums.expect(2);
        for (const int s : mine) {
          const int its = s % t_.slots;
          co_await wait(me.full[its], ring.parity(its, s / t_.slots));
          here(its, i, tile, s);
          co_await Until{[] { return true; }};  // the products take their time
          here(its, i, tile, s);
          const bool both = p.kind != Kind::kAttention || s == 0;
          for (int n = 0; n < (both ? 4 : 8); ++n) me.empty[its].arrive();
        }
        ring.use(stages, t_.slots);
        if (p.split == kPair) {
          Cta& other = ctas_[cta ^ 1];
          late_.push_back([&other] {
            if (other.reading) throw Wrong{"sums that arrive while others are read"};
            ++other.received, other.sums.complete(1);
          });
        }
        co_await meet();
        if (p.split == kPair) {
          co_await wait(me.sums, sums_parity);
          sums_parity ^= 1;
          if (me.received != 2) throw Wrong{"sums that have not come"};
          me.reading = true;
          co_await meet();
          if (group == 0) me.reading = false, me.received = 0;
        }
        co_await meet();
      }
      if (group == 0) report(cta, p.group);
    }
  }

  const Table& t_;
  std::mt19937 random_;
  std::vector<Cta> ctas_;
  std::vector<int> done_;  // groups, of each block
  std::vector<std::function<void()>> late_;
};

}  // namespace prefix_protocol

// What is wrong with a table's protocol ("" if nothing), by `schedules` random schedules.
inline std::string play_prefix(const cuda::prefix::Table& t, int schedules) {
  for (int seed = 0; seed < schedules; ++seed) {
    const std::string wrong = prefix_protocol::Play(t, 100 + seed).run();
    if (!wrong.empty()) return wrong;
  }
  return {};
}

}  // namespace vla::test
