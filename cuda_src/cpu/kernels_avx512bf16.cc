#define VLA_ISA avx512bf16
#define VLA_ISA_NAME "avx512bf16"
#define VLA_ISA_ENTRY avx512bf16_kernels
#include "cpu/kernels.inc"
