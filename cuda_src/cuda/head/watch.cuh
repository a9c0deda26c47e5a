// Waiting, between warps, blocks and clusters. No wait is for ever: a robot must not hang on a bug or a lost
// block. A wait that outlasts Table::patience leaves a line in the report and lets its thread go on without;
// the first such line makes all others give up soon, too, so that the kernel ends (with nonsense in its
// outputs; the host looks).
#pragma once

#include "../small/wgmma_rows.cuh"
#include "layout.h"

namespace vla::cuda::head {

// report[0]: lines written. Line i is at report[8 + 8 i]: what, phase (counted over all steps), block,
// thread, detail, value, 0, 0.
constexpr int kReportLines = 62;
enum Waiting : unsigned {
  kForWeights = 1,  // detail: slot
  kForSlot = 2,     // detail: slot
  kForX = 3,
  kForSums = 4,  // detail: 0 in attention, 2 in a split phase
  kForKeys = 5,  // detail: 0 prefix, 1 fresh
  kForFreeX = 6,
  kForBlocks = 7,  // detail: what the counter should be; value: what it is
};

struct Watch {
  unsigned *failed, *report;  // failed: lines so far, in the GPU's memory, where waits look for them
  int64_t patience;
  unsigned phase;
  bool over;  // this thread waits no more
};

__device__ __forceinline__ int64_t now() {
  int64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ unsigned load_relaxed(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

static __device__ __noinline__ void give_up(unsigned* failed, unsigned* report, unsigned phase, unsigned what,
                                            unsigned detail, unsigned value) {
  const unsigned line = atomicAdd(failed, 1u);
  if (line < kReportLines) {
    unsigned* to = report + 8 + 8 * line;
    to[0] = what, to[1] = phase, to[2] = blockIdx.x, to[3] = threadIdx.x, to[4] = detail, to[5] = value;
    __threadfence_system();
  }
  atomicAdd_system(report, 1u);
}

// Called each time a wait has failed; `tries` and `since` (0 at first) belong to the wait. True: go on
// without. The clock and `failed` are read only now and then: what a thousand waiting warps read takes
// bandwidth from those that work.
constexpr unsigned kTries = 256;
__device__ __forceinline__ bool enough(Watch& w, unsigned& tries, int64_t& since, unsigned what,
                                       unsigned detail, unsigned value) {
  if (++tries % kTries != 0) return false;
  const int64_t t = now();
  if (since == 0) since = t;
  const bool others = load_relaxed(w.failed) != 0;
  if (!others && t - since < w.patience) return false;
  if (!others) give_up(w.failed, w.report, w.phase, what, detail, value);
  w.over = true;
  return true;
}

__device__ __forceinline__ bool try_wait(uint32_t barrier, int parity) {
  uint32_t done = 0;
#if VLA_SM90
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  (void)barrier, (void)parity;
#endif
  return done != 0;
}
// The same, but at once: try_wait may put its warp to sleep for a while.
__device__ __forceinline__ bool ask(uint32_t barrier, int parity) {
  uint32_t done = 0;
#if VLA_SM90
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  (void)barrier, (void)parity;
#endif
  return done != 0;
}
// Out of line: where products are done every instruction that must be fetched counts.
static __device__ __noinline__ bool wait_longer(uint32_t barrier, int parity, Watch w, unsigned what,
                                                unsigned detail) {
  unsigned tries = 0;
  int64_t since = 0;
  while (!try_wait(barrier, parity)) {
    if (enough(w, tries, since, what, detail, 0)) break;
  }
  return w.over;
}
// Waits for the end of the barrier's phase of this parity. By a whole warp, with a vote: where lanes may
// part, the compiler keeps nothing in uniform registers, and descriptors of the matrix unit must be there.
__device__ __forceinline__ void wait_on(uint32_t barrier, int parity, Watch& w, unsigned what,
                                        unsigned detail) {
  if (__all_sync(0xffffffffu, try_wait(barrier, parity) || w.over)) return;
  w.over = wait_longer(barrier, parity, w, what, detail);
}

// ---- between all blocks: phase number g is done when every block has said so once, after it knew that g - 1
// was.
//
// What one block writes with ordinary stores, others read with the copy engine (its own "proxy"): the writing
// warps meet and one thread releases; the reader acquires, and has a proxy fence before it starts a copy. By
// the memory model one such fence between write and read in causality order is enough.
__device__ __forceinline__ void proxy_fence() {
#if VLA_SM90
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
// The same of shared memory, before the matrix unit reads it.
__device__ __forceinline__ void shared_proxy_fence() {
#if VLA_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void add_done(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// By a whole warp: until the counter has come to `want`.
__device__ __forceinline__ void wait_for_count(const unsigned* counter, unsigned want, Watch& w) {
  unsigned tries = 0;
  int64_t since = 0;
  for (;;) {
    unsigned have;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(have) : "l"(counter) : "memory");
    if (static_cast<int>(have - want) >= 0 || w.over) break;
    if (enough(w, tries, since, kForBlocks, want, have)) break;
  }
  proxy_fence();
}
__device__ __forceinline__ void report_done(const Table& t) {
  if (t.parts & 2) add_done(t.counter);
}
// Of the first of two joined phases, which is counted and which nothing waits for: nothing to release.
__device__ __forceinline__ void report_joined(const Table& t) {
  if (t.parts & 2) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(t.counter) : "memory");
}
// By a whole warp: all blocks are done with the first g phases.
__device__ __forceinline__ void wait_for_blocks(const Table& t, unsigned g, Watch& w) {
  if ((t.parts & 2) && g != 0) wait_for_count(t.counter, g * static_cast<unsigned>(t.ctas), w);
}

// ---- copies
constexpr uint64_t kReadOnce = 0x12f0000000000000ull;  // createpolicy.fractional.L2::evict_first, all of it
__device__ __forceinline__ void copy_once(uint32_t to, const void* from, int bytes, uint32_t barrier) {
#if VLA_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(kReadOnce)
      : "memory");
#else
  (void)to, (void)from, (void)bytes, (void)barrier;
#endif
}
// To the same place, and counted by the same barrier, in every block of the cluster that `mask` names.
__device__ __forceinline__ void copy_to_all(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                            uint16_t mask) {
#if VLA_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
#else
  (void)to, (void)from, (void)bytes, (void)barrier, (void)mask;
#endif
}
// Eight bytes to another block of the cluster, counted by its barrier.
__device__ __forceinline__ void send2(uint32_t to, uint32_t barrier, uint32_t x, uint32_t y) {
#if VLA_SM90
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(x), "r"(y), "r"(barrier)
               : "memory");
#else
  (void)to, (void)x, (void)y, (void)barrier;
#endif
}

}  // namespace vla::cuda::head
