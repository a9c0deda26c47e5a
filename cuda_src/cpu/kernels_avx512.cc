#define VLA_ISA avx512
#define VLA_ISA_NAME "avx512"
#define VLA_ISA_ENTRY avx512_kernels
#include "cpu/kernels.inc"
