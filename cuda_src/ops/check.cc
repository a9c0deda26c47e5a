#include "ops/check.h"

#include <stdexcept>

namespace vla {
namespace {

class Checker {
 public:
  Checker(const Takes& takes, const std::string& kind) : act_(takes.act), e4m3_(takes.e4m3), kind_(kind) {}

  void operator()(const ImagePatches& op) const {
    need(op.patch > 0 && op.patch <= 4096 && op.height > 0 && op.width > 0 && op.height % op.patch == 0 &&
             op.width % op.patch == 0,
         "height and width are no multiples of the patch");
    const int64_t patches = int64_t{op.height / op.patch} * (op.width / op.patch);
    shape(op.geometry, op.frames.rows, 8, "geometry");
    shape(op.out, op.frames.rows * patches, 3 * op.patch * op.patch, "out");
    type(op.frames, DType::kU8, "frames");
    type(op.geometry, DType::kI32, "geometry");
    if (!quantised(op.out, op.out_scale)) type(op.out, act_, "out");
  }

  void operator()(const Linear& op) const {
    product(op.x, op.norm, op.w, op.out.cols, op.x_scale);
    shape(op.out, op.x.rows, op.out.cols, "out");
    row(op.bias, op.out.cols, "bias");
    row(op.gate, op.out.cols, "gate");
    if (op.residual) need(op.residual.cols == op.out.cols, "residual and out differ in columns");
    values(op.residual, "residual");
    product_out(op.out, op.x_scale, op.out_scale);
  }

  void operator()(const GatedLinear& op) const {
    product(op.x, op.norm, op.w, 2 * int64_t{op.out.cols}, op.x_scale);
    need(op.w.packing == Packing::kInterleaved && op.w.n[0] == op.w.n[1], "W is no pair of equal matrices");
    shape(op.out, op.x.rows, op.out.cols, "out");
    product_out(op.out, op.x_scale, op.out_scale);
  }

  void operator()(const Qkv& op) const {
    need(op.q || op.k || op.v, "none of q, k and v");
    need(op.head_dim > 0, "head_dim is not above 0");
    product(op.x, op.norm, op.w, int64_t{op.q.cols} + op.k.cols + op.v.cols, op.x_scale);
    const View* const outs[] = {&op.q, &op.k, &op.v};
    const View* const biases[] = {&op.q_bias, &op.k_bias, &op.v_bias};
    size_t part = 0;
    for (int i = 0; i < 3; ++i) {
      if (*outs[i]) {
        need(op.w.n[part++] == outs[i]->cols, "a part of W and its output differ");
        shape(*outs[i], op.x.rows, outs[i]->cols, "an output");
        values(*outs[i], "an output");
        row(*biases[i], outs[i]->cols, "a bias");
      } else {
        need(!*biases[i], "a bias without its output");
      }
    }
    need(bool(op.rope) == bool(op.positions), "rope and positions go together");
    if (!op.rope) return;
    need(op.head_dim % 2 == 0, "head_dim is odd");
    need(op.rope.cols == op.head_dim, "rope and head_dim differ");
    type(op.rope, DType::kF32, "rope");
    type(op.positions, DType::kI32, "positions");
    shape(op.positions, op.x.rows, 1, "positions");
    for (const View* out : {&op.q, &op.k}) {
      need(out->cols % op.head_dim == 0, "columns are no multiple of head_dim");
      type(*out, act_, "an output with rope");
    }
  }

  void operator()(const Attention& op) const {
    const int d = op.head_dim;
    need(d > 0 && op.batch > 0, "head_dim and batch are not above 0");
    need(op.q.cols % d == 0 && op.k.cols % d == 0, "columns are no multiple of head_dim");
    need(op.k.cols == op.v.cols && op.k.rows == op.v.rows, "k and v differ");
    need((op.q.cols / d) % (op.k.cols / d) == 0, "query heads are no multiple of key heads");
    need(op.q.rows % op.batch == 0 && op.k.rows % op.batch == 0, "rows are no multiple of batch");
    shape(op.out, op.q.rows, op.q.cols, "out");
    for (const View* v : {&op.q, &op.k, &op.v}) type(*v, act_, "q, k or v");
    if (!quantised(op.out, op.out_scale)) values(op.out, "out");
    need(bool(op.q_block) == bool(op.k_block), "q_block and k_block go together");
    if (!op.q_block) return;
    shape(op.q_block, op.q.rows / op.batch, 1, "q_block");
    shape(op.k_block, op.k.rows / op.batch, 1, "k_block");
    type(op.q_block, DType::kI32, "q_block");
    type(op.k_block, DType::kI32, "k_block");
  }

  void operator()(const SpaceToDepth& op) const {
    const int64_t f = op.factor, grid = int64_t{op.height} * op.width;
    need(f > 0 && f <= 4096 && op.height > 0 && op.width > 0 && op.height % f == 0 && op.width % f == 0,
         "height and width are no multiples of the factor");
    need(op.x.rows % grid == 0, "x is no whole number of grids");
    shape(op.out, op.x.rows / (f * f), op.x.cols * f * f, "out");
    norm(op.norm, op.x.cols);
    values(op.x, "x");
    if (!quantised(op.out, op.out_scale)) type(op.out, act_, "out");
  }

  void operator()(const Embed& op) const {
    need(op.tokens.cols == 1, "tokens have more than one column");
    shape(op.out, op.tokens.rows, op.table.cols, "out");
    type(op.tokens, DType::kI32, "tokens");
    type(op.table, act_, "table");
    type(op.out, act_, "out");
  }

  void operator()(const Euler& op) const {
    product(op.h, op.norm, op.w, op.x.cols, 0.0f);
    shape(op.x, op.h.rows, op.x.cols, "x");
    shape(op.previous, op.h.rows, op.x.cols, "previous");
    shape(op.weight, op.h.rows, 1, "weight");
    shape(op.gain, 1, 1, "gain");
    shape(op.time, 1, 1, "time");
    row(op.bias, op.x.cols, "bias");
    for (const View* v : {&op.x, &op.previous, &op.weight, &op.gain, &op.time}) {
      type(*v, DType::kF32, "an operand");
    }
  }

 private:
  void need(bool right, const char* otherwise) const {
    if (!right) throw std::invalid_argument(kind_ + ": " + otherwise);
  }
  void type(const View& v, DType dtype, const char* name) const {
    if (v && v.dtype != dtype) throw std::invalid_argument(kind_ + ": " + name + " has the wrong type");
  }
  // float32 or bfloat16
  void values(const View& v, const char* name) const {
    if (v && v.dtype != DType::kF32) type(v, DType::kBF16, name);
  }
  void shape(const View& v, int64_t rows, int64_t cols, const char* name) const {
    if (v.rows == rows && v.cols == cols) return;
    throw std::invalid_argument(kind_ + ": " + name + " is (" + std::to_string(v.rows) + ", " +
                                std::to_string(v.cols) + "), expected (" + std::to_string(rows) + ", " +
                                std::to_string(cols) + ")");
  }
  // (1, cols) float32, or absent
  void row(const View& v, int cols, const char* name) const {
    if (!v) return;
    shape(v, 1, cols, name);
    type(v, DType::kF32, name);
  }
  void norm(const Norm& norm, int k) const {
    row(norm.weight, k, "norm_weight");
    row(norm.bias, k, "norm_bias");
  }
  // True where `v` is E4M3; then it has a scale, and rows that the copy engine can read.
  bool quantised(const View& v, float scale) const {
    const bool is = v && v.dtype == DType::kE4M3;
    need(is == (scale != 0.0f), is ? "an E4M3 operand without its scale" : "a scale for what is not E4M3");
    if (!is) return false;
    need(e4m3_, "this device has no E4M3");
    need(reinterpret_cast<uintptr_t>(v.base) % 16 == 0 && v.ld % 16 == 0 && v.step_bytes % 16 == 0,
         "rows of an E4M3 operand do not start on multiples of 16 bytes");
    return true;
  }
  void product_out(const View& out, float x_scale, float out_scale) const {
    if (!quantised(out, out_scale)) return values(out, "out");
    need(x_scale != 0.0f, "an E4M3 out needs an E4M3 W");
  }
  void product(const View& x, const Norm& n, const Weight& w, int64_t rows, float x_scale) const {
    norm(n, x.cols);
    const bool e4m3 = w.dtype == DType::kE4M3;
    need(e4m3 == (x_scale != 0.0f), e4m3 ? "an E4M3 W without x_scale" : "x_scale without an E4M3 W");
    need(!e4m3 || e4m3_, "this device has no E4M3");
    if (x.dtype == DType::kE4M3) {
      quantised(x, x_scale);
      need(n.kind == NormKind::kNone, "a norm of an E4M3 x");
    } else {
      values(x, "x");
    }
    need(w.k == x.cols && w.rows() == rows, "W does not fit x and the outputs");
  }

  DType act_;
  bool e4m3_;
  const std::string& kind_;
};

}  // namespace

void check(const Op& op, const Takes& takes, const std::string& kind) {
  std::visit(Checker(takes, kind), op);
}

}  // namespace vla
