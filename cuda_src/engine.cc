#include "engine.h"

namespace vla {

const char* version() { return VLA_VERSION; }

bool built_with_cuda() {
#ifdef VLA_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace vla
