// A fork-join pool for one inference: the caller works too, workers sleep when idle, nothing is allocated.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace vla {

class Threads {
 public:
  enum class Bound { kToProcessors, kNowhere };

  // `count` threads in all, the caller of run() being one of them; 0 takes the processors this process may
  // use.
  explicit Threads(int count, Bound bound = Bound::kToProcessors);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(item, thread) for item in [0, items), handed out one by one; returns when all are done. A worker
  // that is late is not waited for: what it would have done, the others do.
  template <typename F>
  void run(int items, const F& f) {
    if (items <= 1 || workers_.empty()) {
      for (int i = 0; i < items; ++i) f(i, 0);
      return;
    }
    start(items, f);
    finish();
  }

  // The two halves of run(): between them the workers work and the caller does something else. `f` must stay
  // until finish(), which returns when all items are done. Either may be called at any time.
  template <typename F>
  void start(int items, const F& f) {
    finish();
    fork(
        items, [](const void* self, int item, int thread) { (*static_cast<const F*>(self))(item, thread); },
        &f);
  }
  void finish();

 private:
  using Call = void (*)(const void*, int, int);

  void fork(int items, Call call, const void* self);
  void work(int thread);
  bool take(int thread);

  std::vector<std::thread> workers_;
  // The work in hand. Written only while no item is open or under way, read only by who has taken an item.
  Call call_ = nullptr;
  const void* self_ = nullptr;
  int items_ = 0;
  alignas(64) std::atomic<int> open_{0};     // items that nobody has taken
  alignas(64) std::atomic<int> pending_{0};  // items that are not done
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace vla
