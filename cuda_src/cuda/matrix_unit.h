// How the matrix unit's product (wgmma) is spelled. An instruction names each of its sums, half as many
// registers as it has columns, so that each width needs a text of its own: put together here.
//
// VLA_NAMES_r and VLA_SUMS_r: names and operands of c[0] to c[r - 1]. Operands that come after them have the
// numbers r, r + 1, ...
#pragma once

#if VLA_SM90A
#define VLA_MATRIX_UNIT(...) asm volatile(__VA_ARGS__)
#else
#define VLA_MATRIX_UNIT(...)
#endif

#define VLA_SUM_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VLA_NAMES_4 "%0, %1, %2, %3"
#define VLA_SUMS_4 VLA_SUM_4(0)
#define VLA_NAMES_8 VLA_NAMES_4 ", %4, %5, %6, %7"
#define VLA_SUMS_8 VLA_SUMS_4, VLA_SUM_4(4)
#define VLA_NAMES_12 VLA_NAMES_8 ", %8, %9, %10, %11"
#define VLA_SUMS_12 VLA_SUMS_8, VLA_SUM_4(8)
#define VLA_NAMES_16 VLA_NAMES_12 ", %12, %13, %14, %15"
#define VLA_SUMS_16 VLA_SUMS_12, VLA_SUM_4(12)
#define VLA_NAMES_20 VLA_NAMES_16 ", %16, %17, %18, %19"
#define VLA_SUMS_20 VLA_SUMS_16, VLA_SUM_4(16)
#define VLA_NAMES_24 VLA_NAMES_20 ", %20, %21, %22, %23"
#define VLA_SUMS_24 VLA_SUMS_20, VLA_SUM_4(20)
#define VLA_NAMES_28 VLA_NAMES_24 ", %24, %25, %26, %27"
#define VLA_SUMS_28 VLA_SUMS_24, VLA_SUM_4(24)
#define VLA_NAMES_32 VLA_NAMES_28 ", %28, %29, %30, %31"
#define VLA_SUMS_32 VLA_SUMS_28, VLA_SUM_4(28)
#define VLA_NAMES_36 VLA_NAMES_32 ", %32, %33, %34, %35"
#define VLA_SUMS_36 VLA_SUMS_32, VLA_SUM_4(32)
#define VLA_NAMES_40 VLA_NAMES_36 ", %36, %37, %38, %39"
#define VLA_SUMS_40 VLA_SUMS_36, VLA_SUM_4(36)
#define VLA_NAMES_44 VLA_NAMES_40 ", %40, %41, %42, %43"
#define VLA_SUMS_44 VLA_SUMS_40, VLA_SUM_4(40)
#define VLA_NAMES_48 VLA_NAMES_44 ", %44, %45, %46, %47"
#define VLA_SUMS_48 VLA_SUMS_44, VLA_SUM_4(44)
#define VLA_NAMES_52 VLA_NAMES_48 ", %48, %49, %50, %51"
#define VLA_SUMS_52 VLA_SUMS_48, VLA_SUM_4(48)
#define VLA_NAMES_56 VLA_NAMES_52 ", %52, %53, %54, %55"
#define VLA_SUMS_56 VLA_SUMS_52, VLA_SUM_4(52)
#define VLA_NAMES_60 VLA_NAMES_56 ", %56, %57, %58, %59"
#define VLA_SUMS_60 VLA_SUMS_56, VLA_SUM_4(56)
#define VLA_NAMES_64 VLA_NAMES_60 ", %60, %61, %62, %63"
#define VLA_SUMS_64 VLA_SUMS_60, VLA_SUM_4(60)
#define VLA_NAMES_68 VLA_NAMES_64 ", %64, %65, %66, %67"
#define VLA_SUMS_68 VLA_SUMS_64, VLA_SUM_4(64)
#define VLA_NAMES_72 VLA_NAMES_68 ", %68, %69, %70, %71"
#define VLA_SUMS_72 VLA_SUMS_68, VLA_SUM_4(68)
#define VLA_NAMES_76 VLA_NAMES_72 ", %72, %73, %74, %75"
#define VLA_SUMS_76 VLA_SUMS_72, VLA_SUM_4(72)
#define VLA_NAMES_80 VLA_NAMES_76 ", %76, %77, %78, %79"
#define VLA_SUMS_80 VLA_SUMS_76, VLA_SUM_4(76)
#define VLA_NAMES_84 VLA_NAMES_80 ", %80, %81, %82, %83"
#define VLA_SUMS_84 VLA_SUMS_80, VLA_SUM_4(80)
#define VLA_NAMES_88 VLA_NAMES_84 ", %84, %85, %86, %87"
#define VLA_SUMS_88 VLA_SUMS_84, VLA_SUM_4(84)
#define VLA_NAMES_92 VLA_NAMES_88 ", %88, %89, %90, %91"
#define VLA_SUMS_92 VLA_SUMS_88, VLA_SUM_4(88)
#define VLA_NAMES_96 VLA_NAMES_92 ", %92, %93, %94, %95"
#define VLA_SUMS_96 VLA_SUMS_92, VLA_SUM_4(92)
#define VLA_NAMES_100 VLA_NAMES_96 ", %96, %97, %98, %99"
#define VLA_SUMS_100 VLA_SUMS_96, VLA_SUM_4(96)
#define VLA_NAMES_104 VLA_NAMES_100 ", %100, %101, %102, %103"
#define VLA_SUMS_104 VLA_SUMS_100, VLA_SUM_4(100)
#define VLA_NAMES_108 VLA_NAMES_104 ", %104, %105, %106, %107"
#define VLA_SUMS_108 VLA_SUMS_104, VLA_SUM_4(104)
#define VLA_NAMES_112 VLA_NAMES_108 ", %108, %109, %110, %111"
#define VLA_SUMS_112 VLA_SUMS_108, VLA_SUM_4(108)
#define VLA_NAMES_116 VLA_NAMES_112 ", %112, %113, %114, %115"
#define VLA_SUMS_116 VLA_SUMS_112, VLA_SUM_4(112)
#define VLA_NAMES_120 VLA_NAMES_116 ", %116, %117, %118, %119"
#define VLA_SUMS_120 VLA_SUMS_116, VLA_SUM_4(116)
#define VLA_NAMES_124 VLA_NAMES_120 ", %120, %121, %122, %123"
#define VLA_SUMS_124 VLA_SUMS_120, VLA_SUM_4(120)
#define VLA_NAMES_128 VLA_NAMES_124 ", %124, %125, %126, %127"
#define VLA_SUMS_128 VLA_SUMS_124, VLA_SUM_4(124)
