// The waiting of the persistent vision encoder, played through random schedules: barriers, copies that land
// late, warps that are slow.
#pragma once

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../cuda/vision/layout.h"

namespace vla::test::protocol {

using namespace cuda::vision;

inline int failures = 0;
inline void require(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures < 20) std::printf("FAIL %s\n", what.c_str());
}

struct Barrier {
  int arrivals = 1, pending = 1, phase = 0;
  int64_t bytes = 0;
  void settle() {
    if (pending == 0 && bytes == 0) ++phase, pending = arrivals;
  }
};
struct Action {
  enum What { kWait, kArrive, kExpect, kCopy, kCount, kDone, kMeet, kSend, kCheck, kFree, kTake } what;
  int barrier = 0, parity = 0, phase = 0, value = 0, tag = 0;
};

template <typename S>
class Play {
  static constexpr int kW = 1, kX = 2;  // bytes that stand for a stage's weights and x

 public:
  Play(const Table& t, std::string name, unsigned seed) : t_(t), name_(std::move(name)), random_(seed) {
    const int per_block = 2 * S::kSlots + 2;
    barriers_.resize(size_t(t.ctas) * per_block);
    slots_.resize(size_t(t.ctas) * S::kSlots), rooms_.resize(t.ctas), meets_.resize(t.ctas);
    for (int c = 0; c < t.ctas; ++c)
      for (int s = 0; s < S::kSlots; ++s) set(full(c, s), 2), set(empty(c, s), S::kGroups);
    for (int c = 0; c < t.ctas; ++c) {
      programs_.push_back(feeder(c)), programs_.push_back(loader(c));
      for (int g = 0; g < S::kGroups; ++g) programs_.push_back(consumer(c, g));
    }
  }
  void run() {
    std::vector<size_t> at(programs_.size(), 0);
    std::vector<int> alive(programs_.size());
    for (size_t i = 0; i < alive.size(); ++i) alive[i] = int(i);
    // some are slow for a while: what is rare on a GPU must happen here
    std::vector<int> slow(programs_.size(), 0);
    size_t idle = 0;
    while (!alive.empty() && failures == 0) {
      if (idle > alive.size() * 40 && flying_.empty() && !any_slow(slow)) {
        require(false, name_ + ": nobody can go on");
        for (const int w : alive) {
          const Action& a = programs_[w][at[w]];
          std::printf("  block %d agent %d waits: kind %d, barrier %d (phase %d), parity %d, %d of %d done\n",
                      w / (2 + S::kGroups), w % (2 + S::kGroups), a.what, a.barrier,
                      barriers_[a.barrier].phase, a.parity, a.value, done_);
        }
        return;
      }
      if (!flying_.empty() && random_() % 3 == 0) {
        const size_t i = random_() % flying_.size();
        land(flying_[i]);
        flying_[i] = flying_.back(), flying_.pop_back();
        idle = 0;
        continue;
      }
      const size_t i = random_() % alive.size();
      const int who = alive[i];
      if (slow[who] > 0) {
        --slow[who], idle = 0;
        continue;
      }
      bool moved = false;
      while (at[who] < programs_[who].size() && step(who, programs_[who][at[who]])) {
        ++at[who], moved = true;
        if (random_() % 4 == 0) break;
      }
      idle = moved ? 0 : idle + 1;
      if (moved && random_() % 256 == 0) slow[who] = int(random_() % 64);
      if (at[who] == programs_[who].size()) alive[i] = alive.back(), alive.pop_back();
    }
    for (const Barrier& b : barriers_) require(b.bytes == 0, name_ + ": nothing is left on its way");
  }

 private:
  using Program = std::vector<Action>;
  struct Flight {
    int barrier, bytes, slot, tag;  // slot -1: sums
  };
  struct Slot {
    int tag[2] = {0, 0}, readers = 0;
  };
  struct Room {
    int readers = 0;
  };
  static bool any_slow(const std::vector<int>& slow) {
    return std::any_of(slow.begin(), slow.end(), [](int s) { return s > 0; });
  }
  int full(int cta, int slot) const { return cta * (2 * S::kSlots + 2) + slot; }
  int empty(int cta, int slot) const { return full(cta, S::kSlots + slot); }
  int sums(int cta) const { return full(cta, 2 * S::kSlots); }
  int room(int cta) const { return full(cta, 2 * S::kSlots + 1); }
  void set(int barrier, int arrivals) { barriers_[barrier].arrivals = barriers_[barrier].pending = arrivals; }

  // f(kind, number of the phase, tile, its stages) for each tile of a block, in order.
  template <typename F>
  void each_tile(int cta, const F& f) const {
    for (int layer = 0; layer < t_.layers; ++layer)
      for (int i = 0; i < kKinds; ++i) {
        const Kind kind = static_cast<Kind>(i);
        for (int tile = first_tile(kind, cta); tile < tiles_of(t_, kind); tile += tile_step(t_, kind))
          f(kind, layer, tile, stages_of(kind, tile_at(t_, kind, tile, cta)));
      }
  }
  static int tag_of(int layer, Kind kind, int tile, int stage) {
    return ((layer * kKinds + static_cast<int>(kind) + 1) * 4096 + tile) * 256 + stage;
  }
  Program feeder(int cta) const {
    Program p;
    Place at;
    int use = 0;
    each_tile(cta, [&](Kind kind, int layer, int tile, int stages) {
      for (int s = 0; s < stages; ++s, at.next<S>(), ++use) {
        p.push_back({Action::kWait, empty(cta, at.slot), at.parity ^ 1, use / S::kSlots - 1});
        if (kind == Kind::kAttention) {
          p.push_back({Action::kArrive, full(cta, at.slot)});
        } else {
          p.push_back({Action::kExpect, full(cta, at.slot), 0, 0, kW});
          p.push_back({Action::kCopy, full(cta, at.slot), 0, 0, kW, tag_of(layer, kind, tile, s)});
        }
      }
    });
    return p;
  }
  Program loader(int cta) const {
    Program p;
    Place at;
    int use = 0;
    each_tile(cta, [&](Kind kind, int layer, int tile, int stages) {
      const auto room = [&](const Place& place, int its) {
        p.push_back({Action::kWait, empty(cta, place.slot), place.parity ^ 1, its / S::kSlots - 1});
        p.push_back({Action::kExpect, full(cta, place.slot), 0, 0, kX});
      };
      const auto fill = [&](int s) {
        p.push_back({Action::kCopy, full(cta, at.slot), 0, 0, kX, tag_of(layer, kind, tile, s)});
      };
      int s = 0;
      if (tile == first_tile(kind, cta)) {
        const int early = std::min(stages, S::kSlots);
        Place ahead = at;
        for (int e = 0; e < early; ++e, ahead.next<S>()) room(ahead, use + e);
        p.push_back(
            {Action::kCount, 0, 0, 0, done_before(t_, layer, kind), layer * kKinds + static_cast<int>(kind)});
        for (; s < early; ++s, at.next<S>(), ++use) fill(s);
      }
      for (; s < stages; ++s, at.next<S>(), ++use) room(at, use), fill(s);
    });
    return p;
  }
  Program consumer(int cta, int group) const {
    Program p;
    Place at;
    int use = 0, exchanges = 0, phase = 0;
    const auto meet = [&] { p.push_back({Action::kMeet, cta}); };
    const auto done = [&](int number) {
      if (group == 0) p.push_back({Action::kDone, 0, 0, number});
    };
    for (int tile = first_tile(Kind::kPrepare, cta); tile < tiles_of(t_, Kind::kPrepare);
         tile += tile_step(t_, Kind::kPrepare))
      meet(), meet();
    if (first_tile(Kind::kPrepare, cta) < tiles_of(t_, Kind::kPrepare)) done(0);
    each_tile(cta, [&](Kind kind, int layer, int tile, int stages) {
      phase = 1 + layer * kKinds + static_cast<int>(kind);
      const bool split = is_split(kind);
      const bool attends = kind == Kind::kAttention;
      if (split && group == 0) p.push_back({Action::kExpect, sums(cta), 0, 0, S::kGroups});
      const Place first = at;
      const auto free = [&](Place place, int count) {
        for (int s = 0; s < count; ++s, place.next<S>()) p.push_back({Action::kFree, empty(cta, place.slot)});
      };
      for (int s = 0; s < stages; ++s, ++use) {
        p.push_back({Action::kWait, full(cta, at.slot), at.parity, use / S::kSlots});
        p.push_back({Action::kCheck, full(cta, at.slot), attends, 0, 0, tag_of(layer, kind, tile, s)});
        const Place here = at;
        at.next<S>();
        if (!attends) {
          free(here, 1);
        } else if (s == 2) {  // the queries and keys
          free(first, 3);
        } else if (s + 1 == stages) {
          Place rest = first;
          for (int r = 0; r < 3; ++r) rest.next<S>();
          free(rest, 2);
        }
      }
      if (split) {
        if (exchanges > 0) p.push_back({Action::kWait, room(cta), (exchanges & 1) ^ 1, exchanges - 1});
        p.push_back({Action::kSend, sums(cta ^ 1), 0, 0, cta ^ 1});
        meet();
        p.push_back({Action::kWait, sums(cta), exchanges & 1, exchanges});
        p.push_back({Action::kTake, 0, 0, 0, cta});
        ++exchanges;
      } else {
        meet();
      }
      meet();  // the end of a tile
      if (split && group == 0) p.push_back({Action::kArrive, room(cta ^ 1)});
      if (tile + tile_step(t_, kind) >= tiles_of(t_, kind)) done(phase);
    });
    return p;
  }

  void land(const Flight& f) {
    if (f.slot >= 0) slots_[f.slot].tag[f.bytes == kW ? 0 : 1] = f.tag;
    barriers_[f.barrier].bytes -= f.bytes;
    barriers_[f.barrier].settle();
  }
  int slot_of(int barrier) const {
    const int per = 2 * S::kSlots + 2;
    return barrier / per * S::kSlots + barrier % per % S::kSlots;
  }
  bool step(int who, const Action& a) {
    switch (a.what) {
      case Action::kWait: {
        Barrier& b = barriers_[a.barrier];
        if ((b.phase & 1) == a.parity) return false;
        require(b.phase == a.phase + 1, name_ + ": a wait ends with another phase than its own");
        return true;
      }
      case Action::kExpect:
        barriers_[a.barrier].bytes += a.value;
        [[fallthrough]];
      case Action::kArrive:
        require(barriers_[a.barrier].pending > 0, name_ + ": an arrival too many");
        --barriers_[a.barrier].pending;
        barriers_[a.barrier].settle();
        return true;
      case Action::kCopy: {
        Slot& s = slots_[slot_of(a.barrier)];
        require(s.readers == 0, name_ + ": a slot is filled while it is read");
        flying_.push_back({a.barrier, a.value, slot_of(a.barrier), a.tag});
        return true;
      }
      case Action::kCount:
        if (done_ < a.value) return false;
        for (int i = 0; i <= a.tag; ++i)
          require(ended_[i] == want(i), name_ + ": a phase begins before its time");
        return true;
      case Action::kDone:
        ++done_, ++ended_[a.phase];
        return true;
      case Action::kMeet: {
        auto& m = meets_[a.barrier];
        if (m.in.count(who)) {  // came before: has everyone?
          if (m.out.count(who) == 0) return false;
          m.in.erase(who), m.out.erase(who);
          return true;
        }
        m.in.insert(who);
        if (m.in.size() == S::kGroups && m.out.empty()) m.out = m.in;
        if (m.out.count(who) == 0) return false;
        m.in.erase(who), m.out.erase(who);
        return true;
      }
      case Action::kSend:
        require(rooms_[a.value].readers < S::kGroups,
                name_ + ": sums arrive before those before have been read");
        ++rooms_[a.value].readers;
        flying_.push_back({a.barrier, 1, -1, 0});
        return true;
      case Action::kTake:
        --rooms_[a.value].readers;
        return true;
      case Action::kCheck: {
        Slot& s = slots_[slot_of(a.barrier)];
        require((s.tag[1] == a.tag && (a.parity || s.tag[0] == a.tag)),
                name_ + ": a stage has what belongs to it");
        ++s.readers;
        return true;
      }
      case Action::kFree: {
        --slots_[slot_of(a.barrier)].readers;
        --barriers_[a.barrier].pending;
        barriers_[a.barrier].settle();
        return true;
      }
    }
    return false;
  }
  int want(int phase) const {  // blocks that end phase `phase`; 0: prepare
    return busy_blocks(t_, phase == 0 ? Kind::kPrepare : static_cast<Kind>((phase - 1) % kKinds));
  }

  struct Meeting {
    std::set<int> in, out;
  };
  const Table& t_;
  std::string name_;
  std::mt19937 random_;
  std::vector<Barrier> barriers_;
  std::vector<Slot> slots_;
  std::vector<Room> rooms_;
  std::vector<Meeting> meets_;
  std::vector<Program> programs_;
  std::vector<Flight> flying_;
  std::map<int, int> ended_;
  int done_ = 0;
};

}  // namespace vla::test::protocol
