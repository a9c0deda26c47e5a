#define VLA_ISA avx512vnni
#define VLA_ISA_NAME "avx512vnni"
#define VLA_ISA_ENTRY avx512vnni_kernels
#include "cpu/kernels.inc"
