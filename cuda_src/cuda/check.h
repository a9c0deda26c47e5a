// Turning CUDA errors into exceptions: one line with what failed, where, on which operation.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../errors.h"

namespace vla::cuda {

// Errors after which nothing in this process can use the device any more.
inline bool sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContextIsDestroyed:
    case cudaErrorDevicesUnavailable:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

[[noreturn]] inline void fail(cudaError_t error, const char* expression, const std::string& op,
                              const char* file, int line) {
  const std::string path(file);
  const std::string message = "cuda: " + op + ": " + cudaGetErrorName(error) + " (" +
                              cudaGetErrorString(error) + ") from " + expression + " at " +
                              path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  if (sticky(error)) throw DeviceLost(message + "; this process has lost the device: restart it");
  cudaGetLastError();  // an error that is not sticky must not show up again at the next call
  throw std::runtime_error(message);
}

}  // namespace vla::cuda

// Throws std::runtime_error or DeviceLost where `expression` is not cudaSuccess. `op`: what was being done, a
// string.
#define VLA_CHECK(expression, op)                                                                        \
  do {                                                                                                   \
    const cudaError_t vla_error_ = (expression);                                                         \
    if (vla_error_ != cudaSuccess) ::vla::cuda::fail(vla_error_, #expression, (op), __FILE__, __LINE__); \
  } while (false)
