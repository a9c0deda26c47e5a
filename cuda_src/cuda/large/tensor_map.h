// What the copy engine is told of a matrix; see tensor_map.cc.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace vla::cuda {

// A matrix (rows, cols) read in boxes of box_rows x 64.
cudaError_t tensor_map(CUtensorMap* map, const __nv_bfloat16* base, int rows, int cols, int64_t ld,
                       int box_rows);
// A matrix (rows, cols) written in boxes of box_rows x box_cols, rows one behind another as they are.
cudaError_t tensor_map_plain(CUtensorMap* map, const __nv_bfloat16* base, int rows, int cols, int64_t ld,
                             int box_rows, int box_cols);
// A matrix of bytes (rows, cols) read in boxes of box_rows x 128.
cudaError_t tensor_map_bytes(CUtensorMap* map, const void* base, int rows, int cols, int64_t ld,
                             int box_rows);
// A matrix (rows, heads * d) read in boxes of box_rows x box_heads x 64; columns beyond d are zeros.
cudaError_t tensor_map_heads(CUtensorMap* map, const __nv_bfloat16* base, int rows, int heads, int d,
                             int64_t ld, int box_rows, int box_heads = 1);
// A matrix of bf16 (size 2) or bytes (1) whose rows are those of heads, read in boxes of 128 bytes of 32 rows
// of the first half of a head and as many of the second: coordinates are column, row of a half, 0, head.
cudaError_t tensor_map_halves(CUtensorMap* map, const void* base, int rows, int cols, int64_t ld_bytes,
                              int size, int head_dim);

}  // namespace vla::cuda
