#include "cpu/threads.h"

#include <system_error>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vla {
namespace {

// Operations of one inference follow each other within microseconds: a worker looks for the next one this
// many times (about 20 us) before it sleeps, so that between inferences no processor is kept busy.
constexpr int kLooks = 500;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::vector<int> allowed_processors() {
  std::vector<int> list;
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &set)) list.push_back(i);
    }
  }
#endif
  if (list.empty()) {
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) list.push_back(static_cast<int>(i));
  }
  return list;
}

void pin(std::thread& thread, int processor) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // best effort: a wish, not a need
#else
  (void)thread;
  (void)processor;
#endif
}

}  // namespace

Threads::Threads(int count, Bound bound) {
  const std::vector<int> processors = allowed_processors();
  if (count <= 0) count = static_cast<int>(processors.size());
  workers_.reserve(count > 1 ? count - 1 : 0);
  for (int i = 1; i < count; ++i) {
    try {
      workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {
      return;  // the process may not have more: those that there are do all the work
    }
    // The first processor is left to the caller and to the control thread of the robot.
    if (bound == Bound::kToProcessors) pin(workers_.back(), processors[i % processors.size()]);
  }
}

Threads::~Threads() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// Takes one item and does it; false where none is open. Whoever takes an item has seen the work it belongs
// to: fork() opened it after writing that, and writes the next only when all items are done.
bool Threads::take(int thread) {
  int open = open_.load(std::memory_order_acquire);
  do {
    if (open <= 0) return false;
  } while (
      !open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire));
  call_(self_, items_ - open, thread);
  if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1 && thread != 0) pending_.notify_one();
  return true;
}

void Threads::fork(int items, Call call, const void* self) {
  call_ = call;
  self_ = self;
  items_ = items;
  pending_.store(items, std::memory_order_relaxed);
  open_.store(items, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
}

void Threads::finish() {
  while (take(0)) {
  }
  for (int looks = 0, left; (left = pending_.load(std::memory_order_acquire)) != 0;) {
    if (++looks < kLooks) {
      relax();
    } else {
      pending_.wait(left, std::memory_order_acquire);
    }
  }
}

void Threads::work(int thread) {
  for (;;) {
    const uint32_t seen = epoch_.load(std::memory_order_acquire);
    if (stop_) return;  // set before the epoch moved for the last time, so whoever has seen that sees this
    while (take(thread)) {
    }
    for (int looks = 0; epoch_.load(std::memory_order_acquire) == seen; ++looks) {
      if (looks < kLooks) {
        relax();
      } else {
        epoch_.wait(seen, std::memory_order_acquire);
      }
    }
  }
}

}  // namespace vla
