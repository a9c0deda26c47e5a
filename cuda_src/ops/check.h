// What the kernels take for granted of an operation's shapes and types. Throws std::invalid_argument with one
// line.
#pragma once

#include <string>

#include "ops/ops.h"

namespace vla {

// act: what "act" means on the device. kind: the operation's name, for the message.
void check(const Op& op, DType act, const std::string& kind);

}  // namespace vla
