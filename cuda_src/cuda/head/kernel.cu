// The persistent action head: launch, packing.
#include "../common.cuh"
#include "build.h"
#include "head.h"
#include "kernel.cuh"

namespace vla::cuda::head {

namespace {

__global__ void pack_head(Bits* to, const __grid_constant__ Phase p, const Bits* fragments, int n0, int n1,
                          int n2, bool interleaved, int k, int64_t units) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;  // a row's 8 columns
  if (i >= units) return;
  const int n[3] = {n0, n1, n2};
  const int unit = static_cast<int>(i % 8), row = static_cast<int>(i / 8 % p.tile_rows);
  const int chunk = static_cast<int>(i / 8 / p.tile_rows % p.chunks),
            tile = static_cast<int>(i / 8 / p.tile_rows / p.chunks);
  const SourceRow source = source_row(p, tile, row);
  const int64_t at = (i - unit) * 8 + (unit ^ (row & 7)) * 8;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int col = chunk * kChunk + unit * 8 + j;
    Bits v = 0;
    if (source.row >= 0 && col < k) {
      v = fragments[fragment_index(fragment_row(n, source.part, source.row, interleaved), col,
                                   divide_up(k, 16))];
    }
    to[at + j] = v;
  }
}

// All that there is: another plan's table may need more than this one, and its graph is launched later.
cudaError_t allow_shared() {
  return cudaFuncSetAttribute(persistent_head, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedOfBlock);
}
cudaLaunchAttribute of_clusters() {
  cudaLaunchAttribute a;
  a.id = cudaLaunchAttributeClusterDimension;
  a.val.clusterDim.x = kCluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  return a;
}

}  // namespace

int resident_clusters() {
  int clusters = 0;
  cudaLaunchAttribute cluster = of_clusters();
  cudaLaunchConfig_t config = {};
  config.gridDim = kCluster, config.blockDim = kThreads, config.dynamicSmemBytes = kSharedOfBlock;
  config.attrs = &cluster, config.numAttrs = 1;
  if (allow_shared() != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, persistent_head, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters < kMaxTiles ? clusters : kMaxTiles;
}

cudaError_t launch(const Table& t, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared(); error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0] = of_clusters();
  // All blocks start together or none does: they wait for each other, and beside another such kernel (a
  // second policy in this process) each might hold half of the multiprocessors for ever.
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = t.ctas, config.blockDim = kThreads, config.dynamicSmemBytes = shared_bytes(t);
  config.stream = stream, config.attrs = attributes, config.numAttrs = 2;
  if (const cudaError_t error = cudaMemsetAsync(t.counter, 0, kCounterWords * sizeof *t.counter, stream);
      error != cudaSuccess)
    return error;
  return cudaLaunchKernelEx(&config, persistent_head, t);
}

cudaError_t pack(Bits* to, const Phase& p, const Bits* fragments, const int* n, int parts, bool interleaved,
                 int k, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(packed_elements(p)) / 8;
  pack_head<<<static_cast<unsigned>((units + 255) / 256), 256, 0, stream>>>(
      to, p, fragments, n[0], parts > 1 ? n[1] : 0, parts > 2 ? n[2] : 0, interleaved, k, units);
  return cudaGetLastError();
}

}  // namespace vla::cuda::head
