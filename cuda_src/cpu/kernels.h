// The kernels of one instruction set. The same source (kernels.inc and ops/*_cpu.h) is compiled once for
// each, in a namespace of its own; the device picks one when it is made.
#pragma once

#include <cstddef>

#include "cpu/threads.h"
#include "device.h"

namespace vla::cpu {

// What a kernel may use beside its operands.
struct Context {
  Threads* threads = nullptr;
  std::byte* scratch = nullptr;  // as many bytes as scratch_bytes() asked for
  DType act = DType::kF32;       // of products' operands
  bool alone = false;            // the calling thread does it all: less work than sharing it out costs

  template <typename F>
  void run(int items, const F& f) const {
    if (!alone) return threads->run(items, f);
    for (int i = 0; i < items; ++i) f(i, 0);
  }
};

struct Kernels {
  const char* name;
  int panel;   // columns of a packed panel
  int offset;  // added to the bytes of a left operand in int8
  void (*run)(const Op& op, const Context& context, int step);
  size_t (*scratch_bytes)(const Op& op, int threads, DType act);
};

const Kernels& generic_kernels();
#ifdef __x86_64__
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512vnni_kernels();
const Kernels& avx512bf16_kernels();
#endif

// The sets that this processor runs, the best first.
std::vector<const Kernels*> runnable_kernels();

}  // namespace vla::cpu
