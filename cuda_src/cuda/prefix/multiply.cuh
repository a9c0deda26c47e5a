// The widths of the matrix unit's product that the persistent head has no use for.
#pragma once

#include "../head/multiply.cuh"

namespace vla::cuda::head {

template <>
__device__ __forceinline__ void multiply_add<40>(float (&c)[20], uint64_t a, uint64_t b) {
#if VLA_SM90A
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19}, "
      "%20, %21, 1, 1, 1, 0, 0;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19])
      : "l"(a), "l"(b));
#else
  (void)c, (void)a, (void)b;
#endif
}

}  // namespace vla::cuda::head
