#include "dispatch.h"

#include <algorithm>

#include "../errors.h"

namespace vla::cuda {

namespace {

std::string shape(int rows, int cols) {
  return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}
std::string shape(const View& v) { return shape(v.rows, v.cols); }

template <typename... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <typename... F>
Overloaded(F...) -> Overloaded<F...>;

}  // namespace

std::string describe(const Op& op) {
  const auto product = [](const char* name, const View& x, const Weight& w) {
    return std::string(name) + " " + shape(x) + " x " + shape(w.rows(), w.k) +
           (w.dtype == DType::kE4M3 ? " in E4M3" : "");
  };
  return std::visit(Overloaded{[](const ImagePatches& o) { return "image_patches " + shape(o.out); },
                               [&](const Linear& o) { return product("linear", o.x, o.w); },
                               [&](const GatedLinear& o) { return product("gated_linear", o.x, o.w); },
                               [&](const Qkv& o) {
                                 return product("qkv", o.x, o.w) + " head " + std::to_string(o.head_dim);
                               },
                               [](const Attention& o) {
                                 return "attention " + shape(o.q) + " over " + shape(o.k) + " head " +
                                        std::to_string(o.head_dim) + " batch " + std::to_string(o.batch);
                               },
                               [](const SpaceToDepth& o) { return "space_to_depth " + shape(o.x); },
                               [](const Embed& o) { return "embed " + shape(o.out); },
                               [&](const Euler& o) { return product("euler", o.h, o.w); }},
                    op);
}

const void* weight_of(const Op& op) {
  return std::visit(
      [](const auto& o) -> const void* {
        if constexpr (requires { o.w.data; }) {
          return o.w.data;
        } else {
          return nullptr;
        }
      },
      op);
}

std::vector<View> writes_of(const Op& op) {
  return std::visit(Overloaded{[](const Qkv& o) { return std::vector<View>{o.q, o.k, o.v}; },
                               [](const Euler& o) { return std::vector<View>{o.x}; },
                               [](const auto& o) { return std::vector<View>{o.out}; }},
                    op);
}

std::vector<View> reads_of(const Op& op) {
  std::vector<View> all = std::visit(
      Overloaded{[](const ImagePatches& o) { return std::vector<View>{o.frames, o.geometry}; },
                 [](const Linear& o) { return std::vector<View>{o.x, o.bias, o.gate, o.residual}; },
                 [](const GatedLinear& o) { return std::vector<View>{o.x}; },
                 [](const Qkv& o) {
                   return std::vector<View>{o.x, o.q_bias, o.k_bias, o.v_bias, o.rope, o.positions};
                 },
                 [](const Attention& o) { return std::vector<View>{o.q, o.k, o.v, o.q_block, o.k_block}; },
                 [](const SpaceToDepth& o) { return std::vector<View>{o.x}; },
                 [](const Embed& o) { return std::vector<View>{o.tokens, o.table}; },
                 [](const Euler& o) {
                   return std::vector<View>{o.h, o.bias, o.x, o.previous, o.weight, o.gain, o.time};
                 }},
      op);
  if (const Norm* norm = norm_of(op)) all.insert(all.end(), {norm->weight, norm->bias});
  return all;
}

int stable_keys(const Attention& op, const std::vector<Op>& ops, int steps) {
  const auto end = [](const View& v, int rows) {
    return v.base + ((rows - 1) * v.ld + v.cols) * static_cast<int64_t>(size_of(v.dtype));
  };
  int stable = op.k.rows;
  for (const Op& other : ops) {
    for (const View& w : writes_of(other)) {
      if (!w) continue;
      const std::byte* last = end(w, w.rows) + (steps - 1) * w.step_bytes;
      for (const View* keys : {&op.k, &op.v}) {
        const int64_t row = keys->ld * static_cast<int64_t>(size_of(keys->dtype));
        while (stable > 0 && w.base < end(*keys, stable) && keys->base < last) {
          // the last row that ends before the write begins
          const int64_t before = w.base - keys->base;
          const int fits = before <= 0 ? 0 : static_cast<int>(before / row);
          stable = fits < stable ? fits : stable - 1;
        }
      }
    }
  }
  return stable;
}

const Norm* norm_of(const Op& op) {
  return std::visit(
      [](const auto& o) -> const Norm* {
        if constexpr (requires { o.norm; }) {
          return &o.norm;
        } else {
          return nullptr;
        }
      },
      op);
}

const Weight* product_weight(const Op& op) {
  return std::visit(
      [](const auto& o) -> const Weight* {
        if constexpr (requires { o.w; }) {
          return &o.w;
        } else {
          return nullptr;
        }
      },
      op);
}

bool normalises_output_of(const Op& op, const Op& before) {
  const auto* linear = std::get_if<Linear>(&before);
  const Norm* norm = norm_of(op);
  if (!linear || !norm || norm->kind != NormKind::kRms) return false;
  const View x = std::visit(Overloaded{[](const Euler& o) { return o.h; },
                                       [](const auto& o) {
                                         if constexpr (requires { o.x; }) {
                                           return o.x;
                                         } else {
                                           return View{};
                                         }
                                       }},
                            op);
  const View& y = linear->out;
  return x.base == y.base && x.rows == y.rows && x.cols == y.cols && x.ld == y.ld && x.dtype == y.dtype &&
         x.step_bytes == y.step_bytes;
}

bool is_constant(const View& v, const Script& script) {
  const auto end = [&](const View& of) {
    return of.base + ((of.rows - 1) * of.ld + of.cols) * static_cast<int64_t>(size_of(of.dtype)) +
           (script.steps - 1) * of.step_bytes;
  };
  const auto apart = [&](const View& w) { return !w || w.base >= end(v) || end(w) <= v.base; };
  for (const View& w : script.inputs) {
    if (!apart(w)) return false;
  }
  for (const std::vector<Op>* ops : {&script.before, &script.body, &script.after}) {
    for (const Op& op : *ops) {
      for (const View& w : writes_of(op)) {
        if (!apart(w)) return false;
      }
    }
  }
  return true;
}

bool overlap(const View& a, const View& b) {
  const auto end = [](const View& v) {
    return v.base + ((v.rows - 1) * v.ld + v.cols) * static_cast<int64_t>(size_of(v.dtype));
  };
  return a && b && a.base < end(b) && b.base < end(a);
}

bool is_read_later(std::vector<View> places, const Script& script, size_t first) {
  const auto meets = [&](const View& v) {
    return std::any_of(places.begin(), places.end(), [&](const View& i) { return overlap(v, i); });
  };
  const auto reads = [&](const Op& op) {
    for (const View& v : reads_of(op)) {
      if (meets(v)) return true;
    }
    for (const View& v : writes_of(op)) {  // the place is another's from here on
      std::erase_if(places, [&](const View& i) { return overlap(v, i); });
    }
    return false;
  };
  for (size_t i = first; i < script.before.size(); ++i) {
    if (reads(script.before[i])) return true;
  }
  for (const std::vector<Op>* ops : {&script.body, &script.after}) {
    for (const Op& op : *ops) {
      if (reads(op)) return true;
    }
  }
  return std::any_of(script.outputs.begin(), script.outputs.end(), meets);
}

bool is_small(const Op& op, Layout layout) {
  if (const auto* a = std::get_if<Attention>(&op)) {
    return a->q.rows / a->batch <= kSmallRows && refuse_small(op).empty();
  }
  return weight_of(op) != nullptr && layout == Layout::kFragments;
}

void check_supported(const Op& op, Layout layout) {
  const std::string why = is_small(op, layout) ? refuse_small(op) : refuse_large(op);
  if (!why.empty()) throw Unsupported("cuda: " + describe(op) + ": " + why);
}

cudaError_t launch_op(const Op& op, Layout layout, const Launch& at) {
  const bool small = is_small(op, layout);
  return std::visit(
      [&](const auto& o) -> cudaError_t {
        using T = std::decay_t<decltype(o)>;
        if constexpr (std::is_same_v<T, Euler>) {
          return launch_small(o, at);  // its weight is always packed for few rows
        } else if constexpr (requires { launch_small(o, at); }) {
          return small ? launch_small(o, at) : launch_large(o, at);
        } else {
          return launch(o, at);
        }
      },
      op);
}

std::string refuse_small(const Op& op) {
  if (const auto* a = std::get_if<Attention>(&op)) {
    const int d = a->head_dim;
    if (d != 64 && d != 72 && d != 128 && d != 256) {
      return "head size " + std::to_string(d) + ": expected 64, 72, 128 or 256";
    }
    if (a->out.dtype != DType::kBF16) return "expected bfloat16";
    for (const View* v : {&a->q, &a->k, &a->v, &a->out}) {
      if (v->ld % 8 || reinterpret_cast<uintptr_t>(v->base) % 16) return "rows are not 16-byte aligned";
    }
  }
  if (const auto* q = std::get_if<Qkv>(&op); q && q->rope && q->head_dim % 2) {
    return "rotary embedding of head size " + std::to_string(q->head_dim) + ": expected an even one";
  }
  return {};
}

}  // namespace vla::cuda
