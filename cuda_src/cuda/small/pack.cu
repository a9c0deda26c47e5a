// Weights as the small product reads them: the matrix unit's left operand, one 16-byte load a lane.
//
// Block b has 32 rows of W, tile t 16 columns; (b, t) is 1 KB: two halves of 16 rows, in each lane l's 8
// numbers (l / 4 = g, l % 4 = c): rows g, g + 8, g, g + 8 at columns 2c, 2c, 2c + 8, 2c + 8, each with its
// right neighbour. kStacked: every part starts a new block. kInterleaved: a block has 16 rows of the first
// matrix, then the same 16 rows of the second. Rows and columns past the end are zeros.
#include "product.cuh"

namespace vla::cuda {

namespace {

__global__ void pack_fragments(uint4* to, const void* from, bool f32, int n, int k, int64_t ld,
                               int first_block, int blocks, int k_tiles, int halves, int half) {
  // one thread a lane of a half tile: blocks * k_tiles * halves * 32 of them
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= static_cast<int64_t>(blocks) * k_tiles * halves * 32) return;
  const int lane = static_cast<int>(i % 32), h = static_cast<int>(i / 32 % halves);
  const int t = static_cast<int>(i / 32 / halves % k_tiles), b = static_cast<int>(i / 32 / halves / k_tiles);
  const int row0 = (b * halves + h) * 16 + lane / 4, col0 = t * 16 + lane % 4 * 2;
  bf16 v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int row = row0 + (j / 2 % 2) * 8, col = col0 + (j / 4) * 8 + j % 2;
    v[j] = __float2bfloat16(row < n && col < k ? load_as_float(from, row * ld + col, f32) : 0.0f);
  }
  const int where = halves == 2 ? h : half;
  to[((static_cast<int64_t>(first_block) + b) * k_tiles + t) * 64 + where * 32 + lane] =
      *reinterpret_cast<const uint4*>(v);
}

int rows_of_block(Packing packing) { return packing == Packing::kStacked ? 32 : 16; }

}  // namespace

size_t packed_bytes_small(Packing packing, const std::vector<int>& n, int k) {
  size_t blocks = 0;
  if (packing == Packing::kInterleaved) {
    blocks = ceil_div(n[0], 16);
  } else {
    for (int part : n) blocks += ceil_div(part, 32);
  }
  return blocks * ceil_div(k, 16) * 1024;
}

cudaError_t pack_small(void* to, Packing packing, const std::vector<RawMatrix>& parts, cudaStream_t stream) {
  int first = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const RawMatrix& p = parts[i];
    const int halves = packing == Packing::kStacked ? 2 : 1;
    const int blocks = ceil_div(p.n, rows_of_block(packing)), k_tiles = ceil_div(p.k, 16);
    const int64_t threads = static_cast<int64_t>(blocks) * k_tiles * halves * 32;
    pack_fragments<<<static_cast<unsigned>((threads + 255) / 256), 256, 0, stream>>>(
        static_cast<uint4*>(to), p.data, p.dtype == DType::kF32, p.n, p.k, p.ld, first, blocks, k_tiles,
        halves, static_cast<int>(i));
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    if (packing == Packing::kStacked) first += blocks;
  }
  return cudaSuccess;
}

}  // namespace vla::cuda
