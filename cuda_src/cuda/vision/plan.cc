// The persistent vision encoder in a plan: its table, its terms, and what it reports.
#include "../plan.h"

#include "../head/waits.h"
#include "build.h"
#include "vision.h"

namespace vla::cuda {

namespace {

class Encoder final : public PersistentLayers {
 public:
  explicit Encoder(vision::Range range) : PersistentLayers(range.begin, range.end) {}

  bool make(const Script& script, const Context& context, Pool& pool) {
    const auto terms = [&](int n, const auto& fill) {
      auto* to = reinterpret_cast<vision::Term*>(pool.take(sizeof(vision::Term) * static_cast<size_t>(n)));
      VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing memory");
      VLA_CHECK(fill(to), "terms of the persistent vision encoder");
      return static_cast<const vision::Term*>(to);
    };
    const vision::Memory memory{
        [&](size_t bytes) { return pool.take(bytes); },
        [&](const vision::Matrix& w, const vision::Folded& f) {
          return terms(w.n, [&](vision::Term* to) { return vision::fold(to, w, f, context.stream); });
        },
        [&](int n, const vision::Folded& f) {
          return terms(n, [&](vision::Term* to) { return vision::pair_up(to, n, f, context.stream); });
        }};
    // first without memory: what is refused at the end must not have taken any
    const vision::Memory none{
        [](size_t) { return reinterpret_cast<std::byte*>(256); },
        [](const vision::Matrix&, const vision::Folded&) -> const vision::Term* { return nullptr; },
        [](int, const vision::Folded&) -> const vision::Term* { return nullptr; }};
    vision::Settings settings;
    settings.ctas = vision::resident_blocks();
    vision::Table table;
    std::vector<vision::Matrix> weights;
    for (const vision::Memory* its : {&none, &memory}) {
      if (!vision::build(table, weights, script.before, {begin, end}, settings, *its).empty()) return false;
    }
    waits_.give(table, pool);
    VLA_CHECK(encoder_.make(table, weights), "maps of the persistent vision encoder");
    return true;
  }

  void enqueue(cudaStream_t stream) override {
    VLA_CHECK(encoder_.launch(stream), "the persistent vision encoder");
  }

  void check() const override { waits_.check("persistent vision encoder"); }

 private:
  vision::Encoder encoder_;
  head::Waits waits_;
};

// Whether what the table is made of stays as it is, and what the kernel keeps to itself is read by nobody
// else.
bool allows(const Script& script, const Context& context, const vision::Range& range) {
  std::vector<View> inside;  // views that the operations would write, and the kernel does not
  for (size_t i = range.begin; i < range.end; ++i) {
    const Op& op = script.before[i];
    if (weight_of(op) && context.layout(op) != Layout::kRows) return false;
    for (const View& v : reads_of(op)) {
      if (v && v.dtype == DType::kF32 && !is_constant(v, script)) return false;  // a bias, or of a norm
    }
    if (i + 1 == range.end) break;
    for (const View& v : writes_of(op)) inside.push_back(v);
  }
  for (const View& v : writes_of(script.before[range.end - 1])) {
    std::erase_if(inside, [&](const View& i) { return overlap(v, i); });
  }
  return !is_read_later(std::move(inside), script, range.end);
}

}  // namespace

std::unique_ptr<PersistentLayers> persistent_vision(const Script& script, const Context& context,
                                                    Pool& pool) {
  const vision::Range range = vision::find_layers(script.before);
  if (context.arch != 90 || range.begin >= range.end || !allows(script, context, range)) return nullptr;
  auto layers = std::make_unique<Encoder>(range);
  return layers->make(script, context, pool) ? std::move(layers) : nullptr;
}

}  // namespace vla::cuda
