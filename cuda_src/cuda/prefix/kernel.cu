// The persistent prefix: launch, packing.
#include <type_traits>

#include "../common.cuh"
#include "build.h"
#include "kernel.cuh"

namespace vla::cuda::prefix {

namespace {

struct Parts {
  int n[3];
};

__global__ void pack_prefix(Bits* to, const __grid_constant__ Phase p, const Bits* from, Parts parts, int ld,
                            int64_t units) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;  // 8 columns of a row
  if (i >= units) return;
  const int rows = tile_rows(p), unit = static_cast<int>(i % 8), row = static_cast<int>(i / 8 % rows);
  const int chunk = static_cast<int>(i / 8 / rows % p.chunks),
            tile = static_cast<int>(i / 8 / rows / p.chunks);
  const SourceRow source = source_row(p.kind, p.heads, tile, row);
  const int at = packed_row(parts.n, source.part, source.row, p.kind == Kind::kGated);
  reinterpret_cast<uint4*>(to)[i - unit + (unit ^ (row & 7))] =
      *reinterpret_cast<const uint4*>(from + static_cast<int64_t>(at) * ld + chunk * kChunk + unit * 8);
}

// All that there is: another plan's table may need more than this one, and its graph is launched later.
cudaError_t allow_shared() {
  return cudaFuncSetAttribute(persistent_prefix, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedOfBlock);
}
cudaLaunchAttribute of_pairs() {
  cudaLaunchAttribute a;
  a.id = cudaLaunchAttributeClusterDimension;
  a.val.clusterDim.x = kPair, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  return a;
}

}  // namespace

int resident_blocks() {
  int pairs = 0;
  cudaLaunchAttribute pair = of_pairs();
  cudaLaunchConfig_t config = {};
  config.gridDim = kPair, config.blockDim = kThreads, config.dynamicSmemBytes = kSharedOfBlock;
  config.attrs = &pair, config.numAttrs = 1;
  if (allow_shared() != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&pairs, persistent_prefix, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return pairs * kPair;
}

cudaError_t launch(const Table& t, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared(); error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0] = of_pairs();
  attributes[1].id = cudaLaunchAttributeCooperative;  // all blocks start together or none does
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = t.ctas, config.blockDim = kThreads, config.dynamicSmemBytes = shared_bytes(t);
  config.stream = stream, config.attrs = attributes, config.numAttrs = 2;
  if (const cudaError_t error =
          cudaMemsetAsync(t.counter, 0, head::kCounterWords * sizeof *t.counter, stream);
      error != cudaSuccess)
    return error;
  return cudaLaunchKernelEx(&config, persistent_prefix, t);
}

cudaError_t pack(Bits* to, const Phase& p, const Bits* from, const int* n, int parts, int k,
                 cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(packed_elements(p)) / 8;
  const Parts all{{n[0], parts > 1 ? n[1] : 0, parts > 2 ? n[2] : 0}};
  pack_prefix<<<static_cast<unsigned>((units + 255) / 256), 256, 0, stream>>>(to, p, from, all, k, units);
  return cudaGetLastError();
}

}  // namespace vla::cuda::prefix
