// Hopper's matrix unit on E4M3: c (64, N) (+)= a (64, 32) b (N, 32)^T, all but c in shared memory, 32 bytes
// of a row a step as in bf16. Both operands have k along their rows: there is no transposed form of 8 bits
// (PTX ISA 8.0, "wgmma.mma_async").
#pragma once

#include "wgmma.cuh"

namespace vla::cuda {

template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&c)[N / 2], uint64_t a, uint64_t b, bool add);

#define VLA_NAMES_32                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VLA_NAMES_64                                                                   \
  VLA_NAMES_32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VLA_NAMES_96                                                                   \
  VLA_NAMES_64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VLA_NAMES_128                                                                    \
  VLA_NAMES_96                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
#define VLA_SUMS_8(i)                                                                         \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define VLA_SUMS_32(i) VLA_SUMS_8(i), VLA_SUMS_8(i + 8), VLA_SUMS_8(i + 16), VLA_SUMS_8(i + 24)
#define VLA_SUMS_64 VLA_SUMS_32(0), VLA_SUMS_32(32)
#define VLA_SUMS_96 VLA_SUMS_64, VLA_SUMS_32(64)
#define VLA_SUMS_128 VLA_SUMS_96, VLA_SUMS_32(96)
// A, B, ADD: the numbers of the operands after the sums.
#define VLA_WGMMA_E4M3(N, NAMES, A, B, ADD) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD \
  ", 0;\n"                                  \
  "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES "}, %" #A ", %" #B ", p, 1, 1;\n}\n"

template <>
__device__ __forceinline__ void wgmma_e4m3<64>(float (&c)[32], uint64_t a, uint64_t b, bool add) {
#if VLA_SM90A
  asm volatile(VLA_WGMMA_E4M3(64, VLA_NAMES_32, 32, 33, 34)
               : VLA_SUMS_32(0)
               : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
  (void)c, (void)a, (void)b, (void)add;
#endif
}

template <>
__device__ __forceinline__ void wgmma_e4m3<128>(float (&c)[64], uint64_t a, uint64_t b, bool add) {
#if VLA_SM90A
  asm volatile(VLA_WGMMA_E4M3(128, VLA_NAMES_64, 64, 65, 66)
               : VLA_SUMS_64
               : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
  (void)c, (void)a, (void)b, (void)add;
#endif
}

template <>
__device__ __forceinline__ void wgmma_e4m3<192>(float (&c)[96], uint64_t a, uint64_t b, bool add) {
#if VLA_SM90A
  asm volatile(VLA_WGMMA_E4M3(192, VLA_NAMES_96, 96, 97, 98)
               : VLA_SUMS_96
               : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
  (void)c, (void)a, (void)b, (void)add;
#endif
}

template <>
__device__ __forceinline__ void wgmma_e4m3<256>(float (&c)[128], uint64_t a, uint64_t b, bool add) {
#if VLA_SM90A
  asm volatile(VLA_WGMMA_E4M3(256, VLA_NAMES_128, 128, 129, 130)
               : VLA_SUMS_128
               : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#else
  (void)c, (void)a, (void)b, (void)add;
#endif
}

#undef VLA_WGMMA_E4M3
#undef VLA_SUMS_128
#undef VLA_SUMS_96
#undef VLA_SUMS_64
#undef VLA_SUMS_32
#undef VLA_SUMS_8
#undef VLA_NAMES_128
#undef VLA_NAMES_96
#undef VLA_NAMES_64
#undef VLA_NAMES_32

}  // namespace vla::cuda
