#define VLA_ISA generic
#define VLA_ISA_NAME "generic"
#define VLA_ISA_ENTRY generic_kernels
#include "cpu/kernels.inc"
