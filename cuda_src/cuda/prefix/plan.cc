// The persistent prefix in a plan: its table, its weights, and what it reports.
#include "../plan.h"

#include <algorithm>

#include "../head/waits.h"
#include "build.h"
#include "prefix.h"

namespace vla::cuda {

namespace {

class Prefix final : public PersistentLayers {
 public:
  explicit Prefix(prefix::Range range) : PersistentLayers(range.begin, range.end) {}

  bool make(const Script& script, const Context& context, Pool& pool) {
    const prefix::Memory memory{
        [&](size_t bytes) { return pool.take(bytes); },
        [&](const prefix::Phase& p, const Weight& w) -> const prefix::Bits* {
          const prefix::Bits*& packed = (*context.prefix_weights)[w.data];
          if (packed) return packed;
          auto* to = reinterpret_cast<prefix::Bits*>(pool.take(prefix::packed_elements(p) * 2));
          VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing memory");
          VLA_CHECK(prefix::pack(to, p, static_cast<const prefix::Bits*>(w.data), w.n.data(),
                                 static_cast<int>(w.n.size()), w.k, context.stream),
                    "packing for the persistent prefix");
          return packed = to;
        }};
    prefix::Settings settings;
    settings.ctas = prefix::resident_blocks();
    // first without memory: what is refused at the end must not have taken any
    const prefix::Memory none{
        [](size_t) { return reinterpret_cast<std::byte*>(256); },
        [](const prefix::Phase&, const Weight&) -> const prefix::Bits* { return nullptr; }};
    for (const prefix::Memory* its : {&none, &memory}) {
      if (!prefix::build(table_, script.before, {begin, end}, settings, *its).empty()) return false;
    }
    waits_.give(table_, pool);
    return true;
  }

  void enqueue(cudaStream_t stream) override {
    VLA_CHECK(prefix::launch(table_, stream), "the persistent prefix");
  }

  void check() const override { waits_.check("persistent prefix"); }

 private:
  prefix::Table table_ = {};
  head::Waits waits_;
};

// Whether the memory of `script` allows for the layers as one kernel. It keeps the hidden state, queries and
// the like to itself, so nothing behind may read them; and the products of keys and values are done with
// their layer, not at the end, so they must not lie where a later layer writes.
bool allows(const Script& script, const prefix::Range& range) {
  std::vector<View> inside;  // views of which the kernel does not write what the operations would
  const auto others = [&](const View& v) {  // the place is another's from here on
    std::erase_if(inside, [&](const View& i) { return overlap(v, i); });
  };
  for (size_t i = range.begin; i < range.end; ++i) {
    const Op& op = script.before[i];
    if (const auto* qkv = std::get_if<Qkv>(&op)) {
      others(qkv->k), others(qkv->v);
      if (qkv->q) inside.push_back(qkv->q);
    } else if (const auto* linear = std::get_if<Linear>(&op); linear && !linear->residual) {
      others(linear->out);
      bool known = false;  // its keys or values have been written
      for (size_t j = range.begin; j < range.end; ++j) {
        const auto* later = std::get_if<Qkv>(&script.before[j]);
        if (!later) continue;
        if (known && (overlap(linear->out, later->k) || overlap(linear->out, later->v))) return false;
        known = known || overlap(linear->x, later->k) || overlap(linear->x, later->v);
      }
    } else {
      for (const View& v : writes_of(op)) inside.push_back(v);
    }
  }
  return !is_read_later(std::move(inside), script, range.end);
}

}  // namespace

std::unique_ptr<PersistentLayers> persistent_prefix(const Script& script, const Context& context,
                                                    Pool& pool) {
  const prefix::Range range = prefix::find_layers(script.before);
  if (context.arch != 90 || range.begin >= range.end || !allows(script, range)) return nullptr;
  for (size_t i = range.begin; i < range.end; ++i) {  // weights must be of the layout that is packed anew
    if (const void* w = weight_of(script.before[i]); w && context.layout(script.before[i]) != Layout::kRows)
      return nullptr;
  }
  auto layers = std::make_unique<Prefix>(range);
  return layers->make(script, context, pool) ? std::move(layers) : nullptr;
}

}  // namespace vla::cuda
