#define VLA_ISA avx2
#define VLA_ISA_NAME "AVX2"
#define VLA_ISA_ENTRY avx2_kernels
#include "cpu/kernels.inc"
