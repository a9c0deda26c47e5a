#pragma once

// Symbols of libvla_engine are hidden unless marked.
#define VLA_API __attribute__((visibility("default")))

namespace vla {

// Version of the package this library was built for, such as "0.1.0".
VLA_API const char* version();

// Whether the CUDA executor was built in.
VLA_API bool built_with_cuda();

}  // namespace vla
