// The persistent head in a plan: its table, its weights, and what it reports.
#include "../plan.h"

#include "build.h"
#include "head.h"
#include "waits.h"

namespace vla::cuda {

namespace {

using head::Table;

class Loop final : public PersistentLoop {
 public:
  bool make(const Script& script, const Context& context, const std::vector<Known>& known, Pool& pool) {
    std::vector<head::Fact> facts;
    for (const Known& k : known) facts.push_back({k.stable_keys, k.shift, k.shift_step});
    const head::Memory memory{
        [&](size_t bytes) { return pool.take(bytes); },
        [&](const head::Phase& p, const Weight& w) -> const head::Bits* {
          const head::Bits*& packed = (*context.head_weights)[{w.data, p.tile_rows, p.tiles}];
          if (packed) return packed;
          auto* to = reinterpret_cast<head::Bits*>(pool.take(head::packed_elements(p) * 2));
          VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing memory");
          VLA_CHECK(head::pack(to, p, static_cast<const head::Bits*>(w.data), w.n.data(),
                               static_cast<int>(w.n.size()), w.packing == Packing::kInterleaved, w.k,
                               context.stream),
                    "packing for the persistent head");
          return packed = to;
        }};
    head::Settings settings;
    settings.clusters = head::resident_clusters();
    if (!head::build(table_, script.body, script.steps, facts, settings, memory).empty()) return false;
    waits_.give(table_, pool);
    return true;
  }

  void enqueue(cudaStream_t stream) override {
    VLA_CHECK(head::launch(table_, stream), "the persistent action head");
  }

  void check() const override { waits_.check("persistent action head"); }

 private:
  Table table_ = {};
  head::Waits waits_;
};

}  // namespace

std::unique_ptr<PersistentLoop> persistent_loop(const Script& script, const Context& context,
                                                const std::vector<Known>& known, Pool& pool) {
  if (context.arch != 90 || script.steps < 1) return nullptr;
  for (const Op& op : script.body) {  // weights must be of the layout that is packed anew
    if (const void* w = weight_of(op); w && context.layout(op) != Layout::kFragments) return nullptr;
  }
  auto loop = std::make_unique<Loop>();
  return loop->make(script, context, known, pool) ? std::move(loop) : nullptr;
}

}  // namespace vla::cuda
