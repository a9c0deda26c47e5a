// What the kernels take for granted of an operation's shapes and types. Throws std::invalid_argument with one
// line.
#pragma once

#include <string>

#include "ops/ops.h"

namespace vla {

// What a device takes. act: what "act" means on it.
struct Takes {
  DType act = DType::kF32;
  bool e4m3 = false;
};

// kind: the operation's name, for the message.
void check(const Op& op, const Takes& takes, const std::string& kind);

}  // namespace vla
