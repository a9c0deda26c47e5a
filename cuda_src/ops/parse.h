// From what was recorded (names, views, numbers) to an operation. Throws std::invalid_argument with one line.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace vla {

struct Recorded {
  std::string kind;
  std::map<std::string, View> operands;
  std::vector<Weight> weights;  // packed: at most one
  std::map<std::string, double> attrs;
};

Op parse(const Recorded& recorded);

}  // namespace vla
