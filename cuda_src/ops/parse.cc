#include "ops/parse.h"

#include <stdexcept>

namespace vla {
namespace {

// Takes operands and attributes by name; what is left over at the end is an error, so that nothing is
// ignored.
class Reader {
 public:
  explicit Reader(const Recorded& recorded)
      : r_(recorded), operands_(recorded.operands), attrs_(recorded.attrs) {}

  View maybe(const std::string& name) {
    const auto it = operands_.find(name);
    if (it == operands_.end()) return {};
    const View view = it->second;
    operands_.erase(it);
    return view;
  }
  View need(const std::string& name) {
    const View view = maybe(name);
    if (!view) fail("operand '" + name + "' is missing");
    return view;
  }
  double attr(const std::string& name) {
    const auto it = attrs_.find(name);
    if (it == attrs_.end()) fail("attribute '" + name + "' is missing");
    const double value = it->second;
    attrs_.erase(it);
    return value;
  }
  bool flag(const std::string& name) { return attrs_.count(name) && integer(name, 0, 1) == 1; }
  // The scale of an operand in E4M3, 0 where there is none. Far from float32's ends, so that its inverse and
  // its product with a weight's scale are numbers too.
  float scale(const std::string& name) {
    if (!attrs_.count(name)) return 0.0f;
    const double value = attr(name);
    if (!(value >= 1e-37 && value <= 1e37))
      fail("attribute '" + name + "' is " + std::to_string(value) + ", expected a positive scale");
    return static_cast<float>(value);
  }
  int integer(const std::string& name, int least = 0, int most = 1 << 30) {
    const double value = attr(name);
    if (!(value >= least && value <= most) || value != static_cast<int>(value))
      fail("attribute '" + name + "' is " + std::to_string(value));
    return static_cast<int>(value);
  }

  Norm norm() {
    Norm norm;
    norm.kind = static_cast<NormKind>(integer("norm", 0, 2));
    if (norm.kind == NormKind::kNone) return norm;
    norm.eps = static_cast<float>(attr("eps"));
    norm.plus = static_cast<float>(attr("plus"));
    norm.weight = maybe("norm_weight");
    norm.bias = maybe("norm_bias");
    return norm;
  }
  Act act() { return static_cast<Act>(integer("act", 0, 2)); }

  // The packed weight, checked against the operands that it multiplies and makes.
  Weight weight(const View& x, int rows, size_t parts) {
    if (r_.weights.size() != 1) fail("expected one packed weight");
    const Weight& w = r_.weights[0];
    if (w.k != x.cols) fail("x has " + std::to_string(x.cols) + " columns, W " + std::to_string(w.k));
    if (w.rows() != rows || w.n.size() != parts)
      fail("W has " + std::to_string(w.rows()) + " rows, expected " + std::to_string(rows));
    return w;
  }
  void type(const View& view, DType dtype, const char* name) {
    if (view && view.dtype != dtype) fail(std::string(name) + " has the wrong type");
  }
  void done() {
    if (!operands_.empty()) fail("unknown operand '" + operands_.begin()->first + "'");
    if (!attrs_.empty()) fail("unknown attribute '" + attrs_.begin()->first + "'");
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument(r_.kind + ": " + what);
  }

 private:
  const Recorded& r_;
  std::map<std::string, View> operands_;
  std::map<std::string, double> attrs_;
};

ImagePatches image_patches(Reader& r) {
  ImagePatches op{r.need("frames"), r.need("geometry"), r.need("out")};
  op.height = r.integer("height");
  op.width = r.integer("width");
  op.patch = r.integer("patch");
  op.out_scale = r.scale("out_scale");
  r.type(op.frames, DType::kU8, "frames");
  r.type(op.geometry, DType::kI32, "geometry");
  return op;
}

Linear linear(Reader& r) {
  Linear op;
  op.x = r.need("x");
  op.bias = r.maybe("bias");
  op.residual = r.maybe("residual");
  op.gate = r.maybe("gate");
  op.out = r.need("out");
  op.norm = r.norm();
  op.act = r.act();
  op.scale = static_cast<float>(r.attr("scale"));
  op.x_scale = r.scale("x_scale");
  op.out_scale = r.scale("out_scale");
  op.w = r.weight(op.x, op.out.cols, 1);
  r.type(op.bias, DType::kF32, "bias");
  r.type(op.gate, DType::kF32, "gate");
  return op;
}

GatedLinear gated_linear(Reader& r) {
  GatedLinear op;
  op.x = r.need("x");
  op.out = r.need("out");
  op.norm = r.norm();
  op.act = r.act();
  op.x_scale = r.scale("x_scale");
  op.out_scale = r.scale("out_scale");
  op.w = r.weight(op.x, 2 * op.out.cols, 2);
  return op;
}

Qkv qkv(Reader& r) {
  Qkv op;
  op.x = r.need("x");
  op.q = r.maybe("q");
  op.k = r.maybe("k");
  op.v = r.maybe("v");
  op.q_bias = r.maybe("q_bias");
  op.k_bias = r.maybe("k_bias");
  op.v_bias = r.maybe("v_bias");
  op.rope = r.maybe("rope");
  op.positions = r.maybe("positions");
  op.norm = r.norm();
  op.head_dim = r.integer("head_dim");
  op.x_scale = r.scale("x_scale");
  op.w = r.weight(op.x, op.q.cols + op.k.cols + op.v.cols, size_t(bool(op.q)) + bool(op.k) + bool(op.v));
  r.type(op.rope, DType::kF32, "rope");
  r.type(op.positions, DType::kI32, "positions");
  for (const View* bias : {&op.q_bias, &op.k_bias, &op.v_bias}) r.type(*bias, DType::kF32, "bias");
  return op;
}

Attention attention(Reader& r) {
  Attention op;
  op.q = r.need("q");
  op.k = r.need("k");
  op.v = r.need("v");
  op.q_block = r.maybe("q_block");
  op.k_block = r.maybe("k_block");
  op.out = r.need("out");
  op.head_dim = r.integer("head_dim");
  op.batch = r.integer("batch");
  op.int8 = r.flag("int8");
  op.out_scale = r.scale("out_scale");
  if (op.int8 && op.head_dim > 1024) r.fail("int8 takes heads of up to 1024 columns");
  r.type(op.q_block, DType::kI32, "q_block");
  r.type(op.k_block, DType::kI32, "k_block");
  return op;
}

SpaceToDepth space_to_depth(Reader& r) {
  SpaceToDepth op;
  op.x = r.need("x");
  op.out = r.need("out");
  op.norm = r.norm();
  op.factor = r.integer("factor");
  op.out_scale = r.scale("out_scale");
  op.height = r.integer("height");
  op.width = r.integer("width");
  return op;
}

Embed embed(Reader& r) {
  Embed op{r.need("tokens"), r.need("table"), r.need("out"), static_cast<float>(r.attr("scale"))};
  r.type(op.tokens, DType::kI32, "tokens");
  return op;
}

Euler euler(Reader& r) {
  Euler op;
  op.h = r.need("h");
  op.bias = r.need("bias");
  op.x = r.need("x");
  op.previous = r.need("previous");
  op.weight = r.need("weight");
  op.gain = r.need("gain");
  op.time = r.need("time");
  op.norm = r.norm();
  op.dt = static_cast<float>(r.attr("dt"));
  op.w = r.weight(op.h, op.x.cols, 1);
  for (const View* v : {&op.x, &op.previous, &op.weight, &op.gain, &op.time, &op.bias}) {
    r.type(*v, DType::kF32, "an operand");
  }
  return op;
}

template <typename T>
Op finish(T (*make)(Reader&), Reader& r) {
  T op = make(r);
  r.done();
  return op;
}

}  // namespace

Op parse(const Recorded& recorded) {
  Reader r(recorded);
  if (recorded.kind == "image_patches") return finish(image_patches, r);
  if (recorded.kind == "linear") return finish(linear, r);
  if (recorded.kind == "gated_linear") return finish(gated_linear, r);
  if (recorded.kind == "qkv") return finish(qkv, r);
  if (recorded.kind == "attention") return finish(attention, r);
  if (recorded.kind == "space_to_depth") return finish(space_to_depth, r);
  if (recorded.kind == "embed") return finish(embed, r);
  if (recorded.kind == "euler") return finish(euler, r);
  r.fail("no such operation");
}

}  // namespace vla
