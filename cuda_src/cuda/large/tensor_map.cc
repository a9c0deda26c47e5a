// Tensor maps for the copy engine: bf16 or bytes, 128-byte swizzle, zeros outside. The driver's function is
// looked up at run time, so that the library loads where there is no driver.
#include "tensor_map.h"

#include <cudaTypedefs.h>

namespace vla::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      found = nullptr;
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

cudaError_t encode(CUtensorMap* map, CUtensorMapDataType type, const void* base, int rank,
                   const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                   CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  if (!encoder()) return cudaErrorNotSupported;
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = encoder()(map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(base), sizes,
                                    strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t tensor_map(CUtensorMap* map, const __nv_bfloat16* base, int rows, int cols, int64_t ld,
                       int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, 2, sizes, strides, box);
}

cudaError_t tensor_map_plain(CUtensorMap* map, const __nv_bfloat16* base, int rows, int cols, int64_t ld,
                             int box_rows, int box_cols) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, 2, sizes, strides, box,
                CU_TENSOR_MAP_SWIZZLE_NONE);
}

cudaError_t tensor_map_bytes(CUtensorMap* map, const void* base, int rows, int cols, int64_t ld,
                             int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(ld)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, base, 2, sizes, strides, box);
}

cudaError_t tensor_map_heads(CUtensorMap* map, const __nv_bfloat16* base, int rows, int heads, int d,
                             int64_t ld, int box_rows, int box_heads) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(d) * 2, static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(box_rows)};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, 3, sizes, strides, box);
}

cudaError_t tensor_map_halves(CUtensorMap* map, const void* base, int rows, int cols, int64_t ld_bytes,
                              int size, int head_dim) {
  const auto half = static_cast<cuuint64_t>(head_dim / 2), ld = static_cast<cuuint64_t>(ld_bytes);
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(cols), half, 2,
                               static_cast<cuuint64_t>(rows / head_dim)};
  const cuuint64_t strides[3] = {ld, half * ld, 2 * half * ld};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(128 / size), 32, 2, 1};
  return encode(map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, 4,
                sizes, strides, box);
}

}  // namespace vla::cuda
