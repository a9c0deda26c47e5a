#define VLA_ISA avx2
#define VLA_ISA_NAME "avx2"
#define VLA_ISA_ENTRY avx2_kernels
#include "cpu/kernels.inc"
