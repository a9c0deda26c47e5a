// What the engine throws, seen from outside the library (hence visible). Each message is one line: what,
// where, expected, got.
#pragma once

#include <stdexcept>
#include <string>

namespace vla {

// The device cannot do what the tape asks for.
struct __attribute__((visibility("default"))) Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The device failed in a way that does not go away in this process (a sticky CUDA error): it must end.
struct __attribute__((visibility("default"))) DeviceLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace vla
