// From the operations of a vision encoder to the persistent encoder's table.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "../../ops/ops.h"
#include "layout.h"

namespace vla::cuda::vision {

// A weight (n, k) as large/linear.cu packs it.
struct Matrix {
  const Bits* data = nullptr;
  int n = 0, k = 0;
  int64_t ld = 0;
};

// What a product's terms are made of; (1, n) float32 each, or null.
struct Folded {
  const float *gamma = nullptr, *beta = nullptr;
  float plus = 0.0f;
  const float* bias[3] = {};  // of each part
  int part = 0;               // columns of one
};

struct Settings {
  int ctas = 132;      // blocks that the device holds at once
  bool apiece = true;  // refuse where a block would have more tiles than a shape is meant for
};

struct Memory {
  std::function<std::byte*(size_t)> take;  // zeroed, 256-byte aligned
  // A term for each row of w: (sum over k of (gamma + plus) w, bias + sum over k of beta w).
  std::function<const Term*(const Matrix& w, const Folded&)> fold;
  // For each of n columns: (bias or 0, gamma + plus or 1).
  std::function<const Term*(int n, const Folded&)> pair_up;
};

// Which of a list of operations are the encoder's layers: from the first projection of q, k and v behind a
// layer norm on. begin == end: none.
struct Range {
  size_t begin = 0, end = 0;
};
Range find_layers(const std::vector<Op>& ops);

// Fills `table` from ops[begin, end) and `weights`, kProducts a layer; gives why it cannot ("" where it did):
// what the table cannot express is launched operation by operation. counter, report, stamps and patience are
// left to the caller.
std::string build(Table& table, std::vector<Matrix>& weights, const std::vector<Op>& ops, Range range,
                  const Settings& settings, const Memory& memory);

}  // namespace vla::cuda::vision
