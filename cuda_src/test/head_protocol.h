// The persistent head's waiting, played on the host: every block's feeder, loader and two warpgroups as
// coroutines over the same table and the same questions (share_of, arriving, is_busy, ...) as the kernel,
// mbarriers with arrivals and bytes, copies and sums that arrive late and in any order. Finds deadlocks,
// barriers of the wrong phase, and shared memory that is written while it is read or read before what belongs
// there has come.
#pragma once

#include <coroutine>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../cuda/head/layout.h"

namespace vla::test {

namespace protocol {

using namespace cuda::head;

struct Wrong {
  std::string what;
};

struct Mbarrier {
  int count = 1, pending = 1, phase = 0;
  int64_t bytes = 0;
  void check() {
    if (pending < 0) throw Wrong{"a barrier with too many arrivals"};
    if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
  }
  void arrive() { --pending, check(); }
  void expect(int64_t n) { bytes += n, --pending, check(); }
  void complete(int64_t n) { bytes -= n, check(); }
  bool passed(int parity) const { return phase != parity; }
};

// 1 KB of shared memory: what is there, who reads it, what is on its way.
struct Cell {
  int64_t tag = -1;
  int readers = 0, writers = 0;
};

struct Agent {
  struct promise_type {
    std::function<bool()> ready;
    std::exception_ptr error;
    Agent get_return_object() { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
    std::suspend_always initial_suspend() { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { error = std::current_exception(); }
  };
  std::coroutine_handle<promise_type> handle;
};
struct Until {
  std::function<bool()> ready;
  bool await_ready() { return false; }  // always gives way: the scheduler decides
  void await_suspend(std::coroutine_handle<Agent::promise_type> h) { h.promise().ready = ready; }
  void await_resume() {}
};

struct Cta {
  Mbarrier full[kMaxSlots], empty[kMaxSlots], x_full, keys[2], free_x, sums[3];
  std::vector<Cell> memory;  // x's part and what is exchanged
  std::vector<int64_t> slot_tag = std::vector<int64_t>(kMaxSlots, -1);
  int done = 0;  // roles at the end of the kernel
};

class Play {
 public:
  Play(const Table& t, unsigned seed) : t_(t), random_(seed), ctas_(t.ctas), flags_(t.ctas, 0) {
    for (Cta& c : ctas_) {
      c.memory.resize((t.x_bytes + kExchange) / 1024);
      for (Mbarrier& b : c.empty) b.count = b.pending = 4;
      c.free_x.count = c.free_x.pending = kConsumers / 32;
    }
  }

  std::string run() {
    std::vector<Agent> agents;
    for (int i = 0; i < t_.ctas; ++i) {
      agents.push_back(feeder(i)), agents.push_back(loader(i)), agents.push_back(consumer(i, 0)),
          agents.push_back(consumer(i, 1));
    }
    std::string wrong;
    try {
      size_t left = agents.size();
      int idle = 0;
      while (left > 0) {
        bool moved = false;
        const size_t start = random_() % agents.size();
        for (size_t n = 0; n < agents.size(); ++n) {
          const size_t k = (start + n * stride_) % agents.size();
          auto h = agents[k].handle;
          if (h.done() || random_() % 4 == 0) continue;  // some are slower than others
          if (h.promise().ready && !h.promise().ready()) continue;
          h.promise().ready = nullptr;
          h.resume();
          moved = true;
          if (h.promise().error) std::rethrow_exception(h.promise().error);
          if (h.done()) --left;
        }
        if (deliver()) moved = true;
        idle = moved ? 0 : idle + 1;
        if (idle > 50)
          throw Wrong{"deadlock with " + std::to_string(left) + " roles left; barrier at " +
                      std::to_string(counter_ / t_.ctas)};
      }
      if (!late_.empty()) throw Wrong{"copies that arrive after the end"};
    } catch (const Wrong& w) {
      wrong = w.what;
    }
    for (Agent& a : agents) a.handle.destroy();
    return wrong;
  }

 private:
  // ---- what arrives late
  struct Late {
    int cta, first, last;  // cells of x's part; first < 0: the weight ring
    int64_t tag;
    Mbarrier* barrier;
    int64_t bytes;
    int rounds = 0;  // before it may arrive
  };
  void send(int cta, int at, int bytes, int64_t tag, Mbarrier& barrier) {
    Late l{cta, at / 1024, (at + bytes - 1) / 1024, tag, &barrier, bytes};
    if (at + bytes > t_.x_bytes + kExchange) throw Wrong{"a copy past the end of x's part"};
    for (int i = l.first; i <= l.last; ++i) {
      Cell& c = ctas_[cta].memory[i];
      if (c.readers > 0) throw Wrong{"a copy over what is being read, tag " + std::to_string(tag)};
      ++c.writers;
    }
    late_.push_back(l);
  }
  bool deliver() {
    bool any = false;
    for (size_t i = 0; i < late_.size();) {
      if (late_[i].rounds > 0) any = true;
      if (late_[i].rounds-- > 0 || random_() % 3 == 0) {
        ++i;
        continue;
      }
      const Late l = late_[i];
      late_[i] = late_.back(), late_.pop_back();
      for (int c = l.first; l.first >= 0 && c <= l.last; ++c) {
        Cell& cell = ctas_[l.cta].memory[c];
        --cell.writers, cell.tag = l.tag;
      }
      l.barrier->complete(l.bytes);
      any = true;
    }
    return any;
  }
  void begin_read(int cta, int at, int bytes, int64_t tag) {
    for (int i = at / 1024; i <= (at + bytes - 1) / 1024; ++i) {
      Cell& c = ctas_[cta].memory[i];
      if (c.writers > 0) throw Wrong{"reading what is still on its way, tag " + std::to_string(tag)};
      if (c.tag != tag)
        throw Wrong{"reading tag " + std::to_string(c.tag) + " where " + std::to_string(tag) + " should be"};
      ++c.readers;
    }
  }
  void end_read(int cta, int at, int bytes) {
    for (int i = at / 1024; i <= (at + bytes - 1) / 1024; ++i) --ctas_[cta].memory[i].readers;
  }
  // joined: the phase before is done, too; it is in the counter already.
  void report(int cta, int g, bool joined = false) {
    if (!passed(g - joined)) throw Wrong{"a block that is done before the phase began"};
    if (flags_[cta] != g - joined) throw Wrong{"a block that is done twice or out of order"};
    ++counter_, flags_[cta] = g + 1;
  }
  bool passed(int g) const {
    if (counter_ < int64_t(g) * t_.ctas) return false;
    for (int f : flags_)
      if (f < g) throw Wrong{"the counter is ahead of a block"};
    return true;
  }
  Until until(std::function<bool()> f) { return {std::move(f)}; }
  Until wait(Mbarrier& b, int parity) {
    return {[&b, parity] { return b.passed(parity); }};
  }

  // ---- roles, as in block.cuh, spread.cuh, joined.cuh, split.cuh and attention.cuh
  Agent feeder(int cta) {
    Cta& me = ctas_[cta];
    int slot = 0, parity = 0, keys_parity = 0;
    for (int step = 0; step < t_.steps; ++step)
      for (int i = 0; i < t_.phases; ++i) {
        const Phase& p = t_.phase[i];
        const Share s = share_of(p, cta);
        if (p.kind == Kind::kAttention && !p.joined && is_busy(p, cta, t_.rows)) {
          co_await wait(me.keys[0], keys_parity);
          keys_parity ^= 1;
        }
        for (int c = s.first; c < s.last; c += p.stage_chunks) {
          const int bytes = std::min(p.stage_chunks, s.last - c) * p.tile_rows * kChunkBytes;
          if (bytes > t_.stage) throw Wrong{"a stage that is larger than a slot"};
          co_await wait(me.empty[slot], parity ^ 1);
          me.full[slot].expect(bytes);
          me.slot_tag[slot] = (int64_t(step) * t_.phases + i) * 100 + c;
          // now and then one is overtaken by all that are asked for after it
          late_.push_back(
              {cta, -1, -1, 0, &me.full[slot], bytes, random_() % 16 == 0 ? int(random_() % 64) : 0});
          if (++slot == t_.slots) slot = 0, parity ^= 1;
        }
      }
    ++me.done;
  }
  int64_t tag(int g, int what) const { return int64_t(g) * 1000 + what; }

  Agent loader(int cta) {
    Cta& me = ctas_[cta];
    const int C = kCluster, rank = cta % C, first = cta - rank, R = t_.rows;
    int free_parity = 0;
    for (int step = 0; step < t_.steps; ++step)
      for (int i = 0; i < t_.phases; ++i) {
        const int g = 1 + step * t_.phases + i;
        const Phase& p = t_.phase[i];
        const bool busy = is_busy(p, cta, R);
        if (p.joined && p.kind == Kind::kAttention) continue;
        if (p.joined && busy) {
          const AttentionPart& a = t_.phase[i + 1].attention;
          const int each = key_rows(a) * kChunkBytes, bytes = a.prefix_rows * kChunkBytes;
          me.keys[0].expect(2 * bytes);
          for (int c = 0; c < 2; ++c) send(cta, a.at + c * each, bytes, tag(g + 1, 400), me.keys[0]);
          me.keys[1].expect(joined_received(a, R));
        }
        const auto spread = [&](int to, int chunks, int rows, bool one) {
          const int pieces = pieces_of(rows);
          for (int n = rank; n < chunks * pieces; n += C) {
            const int c = n / pieces, part = n % pieces,
                      at = to + (c * rows + piece_first(rows, part)) * kChunkBytes;
            for (int k = first; k < first + C; ++k)
              send(k, at, piece_rows(rows, part) * kChunkBytes, tag(g, one ? 500 : c),
                   one ? ctas_[k].keys[1] : ctas_[k].x_full);
          }
        };
        if (p.kind == Kind::kAttention) {
          const AttentionPart& a = p.attention;
          const int copied = p.chunks + a.columns, each = key_rows(a) * kChunkBytes;
          if (busy) {
            if (is_busy(t_.phase[i - 1], cta, R)) {
              co_await wait(me.free_x, free_parity);
              free_parity ^= 1;
            }
            me.keys[0].expect(copied * a.prefix_rows * kChunkBytes);
            for (int c = 0; c < copied && a.prefix_rows; ++c)
              send(cta, a.at + c * each, a.prefix_rows * kChunkBytes, tag(g, 400), me.keys[0]);
          }
          co_await until([this, g] { return passed(g); });
          if (busy) {
            const int rows = p.stack.rows;
            me.keys[1].expect(copied * a.fresh_rows * kChunkBytes + p.chunks * rows * kChunkBytes);
            spread(a.at + queries_at(p), p.chunks, rows, true);
            for (int c = 0; c < copied && a.fresh_rows; ++c)
              send(cta, a.at + c * each + a.prefix_rows * kChunkBytes, a.fresh_rows * kChunkBytes,
                   tag(g, 401), me.keys[1]);
          }
        } else {
          co_await until([this, g] { return passed(g); });
          const int slots = arriving(p, cta);
          if (slots > 0) me.x_full.expect(slots * R * kChunkBytes);
          if (slots > 0 && is_spread(p)) {
            spread(0, slots, R, false);
          } else {
            for (int c = 0; c < slots; ++c)
              send(cta, c * R * kChunkBytes, R * kChunkBytes, tag(g, c), me.x_full);
          }
        }
        if (!busy) {
          counter_ += p.joined;
          report(cta, g + p.joined, p.joined);
        }
      }
    ++me.done;
  }

  // What is exchanged is written and read within a phase: by whom is a tag.
  void mark(int cta, int at, int bytes, int64_t tag) {
    for (int i = at / 1024; i <= (at + bytes - 1) / 1024; ++i) {
      Cell& c = ctas_[cta].memory[i];
      if (c.readers > 0 || c.writers > 0) throw Wrong{"writing what is in use, tag " + std::to_string(tag)};
      c.tag = tag;
    }
  }
  // Both warpgroups (or `count`) have come.
  struct Meeting {
    int here = 0, turn = 0;
  };
  Until meet(int cta, int count) {
    Meeting& m = meetings_[cta];
    const int turn = m.turn;
    if (++m.here == count) m.here = 0, ++m.turn;
    return until([&m, turn] { return m.turn != turn; });
  }

  Agent consumer(int cta, int group) {
    Cta& me = ctas_[cta];
    const int C = kCluster, rank = cta % C, R = t_.rows, first = cta - rank;
    int slot = 0, parity = 0, sums_parity = 0, split_parity = 0, keys_parity = 0;
    int x_parity = 0;
    const auto skip = [&](int& s, int& its, int count) {
      for (s += count; s >= t_.slots; s -= t_.slots) its ^= 1;
    };
    if (group == 0) report(cta, 0);
    // What this group sends to the owners of rows. (Cells are coarser than that: the sources share the
    // `width` bytes, the tag is the phase's.)
    const auto receive = [&](int g, int at, int rows, int64_t bytes, int which, int width) {
      for (int owner = 0; owner * 8 < rows; ++owner) {
        send(first + owner, at / 1024 * 1024, width, tag(g, 900 + which), ctas_[first + owner].sums[which]);
        late_.back().bytes = bytes;
      }
    };
    for (int step = 0; step < t_.steps; ++step)
      for (int i = 0; i < t_.phases; ++i) {
        const Phase& p = t_.phase[i];
        const int g = 1 + step * t_.phases + i;
        const bool frees = p.kind == Kind::kQkv && !p.joined && is_busy(t_.phase[i + 1], cta, R);
        if (!is_busy(p, cta, R)) continue;
        const bool owner = owns(R, rank);
        if (p.kind == Kind::kAttention) {
          if (group > 0) continue;
          const AttentionPart& a = p.attention;
          const HeadTask task = head_task(p, t_.m, cta / C);
          const int bytes = 8 * (a.columns * kChunk * 2 + 8);  // from each block to each owner
          const int rows = p.stack.rows, exchange = t_.x_bytes, width = C * 8 * a.columns * kChunk * 2;
          const bool its = owns(task.rows, rank);
          if (its) me.sums[0].expect(C * bytes);
          co_await wait(me.keys[0], keys_parity);
          co_await wait(me.keys[1], keys_parity);
          keys_parity ^= 1;
          const int each = key_rows(a) * kChunkBytes, old = a.prefix_rows * kChunkBytes,
                    fresh = a.fresh_rows * kChunkBytes;
          for (int c = 0; c < p.chunks + a.columns; ++c) {
            begin_read(cta, a.at + c * each, old, tag(g, 400));
            if (fresh) begin_read(cta, a.at + c * each + old, fresh, tag(g, 401));
          }
          begin_read(cta, a.at + queries_at(p), p.chunks * rows * kChunkBytes, tag(g, 500));
          co_await until([] { return true; });
          for (int c = 0; c < p.chunks + a.columns; ++c) {
            end_read(cta, a.at + c * each, old);
            if (fresh) end_read(cta, a.at + c * each + old, fresh);
          }
          end_read(cta, a.at + queries_at(p), p.chunks * rows * kChunkBytes);
          receive(g, exchange, task.rows, bytes, 0, width);
          if (its) {
            co_await wait(me.sums[0], sums_parity);
            sums_parity ^= 1;
            begin_read(cta, exchange / 1024 * 1024, width, tag(g, 900));
            co_await until([] { return true; });
            end_read(cta, exchange / 1024 * 1024, width);
          }
          report(cta, g, p.joined);
          continue;
        }
        const Share s = share_of(p, cta);
        const int arrive = arriving(p, cta), stages = divide_up(s.count(), p.stage_chunks);
        int at = slot, its = parity;
        const int turns = is_split(p) || p.joined ? 1 : 2;  // warpgroups that multiply
        if (turns == 2) skip(at, its, group);
        skip(slot, parity, stages);
        if (is_split(p) && owner && group == 0) me.sums[2].expect(int64_t(senders(p)) * 8 * p.tile_rows * 4);
        if (arrive > 0) {
          co_await wait(me.x_full, x_parity);
          x_parity ^= 1;
        }
        int before = -1;
        std::vector<int> read;
        for (int stage = group; stage < (group < turns ? stages : 0); stage += turns) {
          if (before >= 0 && !me.full[at].passed(its)) {  // the slot goes back before a wait
            for (int k = 0; k < 4; ++k) me.empty[before].arrive();
            before = -1;
          }
          co_await wait(me.full[at], its);
          const int from = stage * p.stage_chunks;
          if (me.slot_tag[at] != (int64_t(step) * t_.phases + i) * 100 + s.first + from)
            throw Wrong{"weights of another stage"};
          for (int x = from; x < std::min(from + p.stage_chunks, s.count()); ++x) {
            begin_read(cta, x * R * kChunkBytes, R * kChunkBytes, tag(g, x));
            read.push_back(x);
          }
          if (before >= 0)
            for (int k = 0; k < 4; ++k) me.empty[before].arrive();
          before = at;
          skip(at, its, turns);
        }
        if (before >= 0)
          for (int k = 0; k < 4; ++k) me.empty[before].arrive();
        for (const int x : read) end_read(cta, x * R * kChunkBytes, R * kChunkBytes);
        for (int k = 0; frees && k < 4; ++k) me.free_x.arrive();
        if (p.joined) {  // queries to all, keys and values to the block that has their rows
          if (group > 0) continue;
          const AttentionPart& a = t_.phase[i + 1].attention;
          const int fresh = a.fresh_rows * kChunkBytes, each = key_rows(a) * kChunkBytes;
          for (int k = first; k < first + C; ++k) {
            send(k, a.at + queries_at(t_.phase[i + 1]), R * kChunkBytes, tag(g + 1, 500), ctas_[k].keys[1]);
            late_.back().bytes = R * kChunkBytes / C;
            for (int c = 0; fresh && c < 2; ++c) {
              send(k, a.at + c * each + each - fresh, fresh, tag(g + 1, 401), ctas_[k].keys[1]);
              late_.back().bytes = fresh / C;
            }
          }
          ++counter_;
          continue;
        }
        if (s.count() > 0 && !is_split(p)) {
          // each writes for the other: both tags are this phase's
          const int bytes = kConsumers * p.tile_rows;
          mark(cta, t_.x_bytes, bytes, tag(g, 800));
          co_await meet(cta, 2);
          begin_read(cta, t_.x_bytes, bytes, tag(g, 800));
          co_await until([] { return true; });
          end_read(cta, t_.x_bytes, bytes);
        }
        if (s.count() > 0 && is_split(p) && group == 0)
          receive(g, receive_at(t_), R, 8 * p.tile_rows * 4, 2, 1);
        if (is_split(p) && owner) {
          co_await wait(me.sums[2], split_parity);
          split_parity ^= 1;
          begin_read(cta, receive_at(t_), 1, tag(g, 902));
          co_await until([] { return true; });
          end_read(cta, receive_at(t_), 1);
        }
        co_await meet(cta, 2);
        if (group == 0) report(cta, g);
      }
    ++me.done;
  }

  const Table& t_;
  std::mt19937 random_;
  std::vector<Cta> ctas_;
  std::vector<int> flags_;
  std::vector<Meeting> meetings_ = std::vector<Meeting>(1024);
  std::vector<Late> late_;
  int64_t counter_ = 0;
  size_t stride_ = 1;
};

}  // namespace protocol

// "" where all of `seeds` schedules come to their end, else what went wrong first.
inline std::string play(const cuda::head::Table& t, int seeds) {
  for (int seed = 1; seed <= seeds; ++seed) {
    const std::string wrong = protocol::Play(t, static_cast<unsigned>(seed)).run();
    if (!wrong.empty()) return "schedule " + std::to_string(seed) + ": " + wrong;
  }
  return {};
}

}  // namespace vla::test
