#define VLA_ISA avx512bf16
#define VLA_ISA_NAME "AVX-512 BF16"
#define VLA_ISA_ENTRY avx512bf16_kernels
#include "cpu/kernels.inc"
