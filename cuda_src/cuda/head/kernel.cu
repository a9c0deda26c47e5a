// The persistent action head: launch, packing.
#include <algorithm>

#include "../common.cuh"
#include "build.h"
#include "head.h"
#include "kernel.cuh"
#include "together.h"

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

}  // namespace

int resident_clusters() {
  return std::min(resident_together(persistent_head, kCluster, kThreads), kMaxTiles);
}

cudaError_t launch(const Table& t, cudaStream_t stream) {
  return launch_together(persistent_head, {t.ctas, kCluster, kThreads, shared_bytes(t)}, t.counter, stream,
                         t);
}

cudaError_t pack(Bits* to, const Phase& p, const Bits* fragments, const int* n, int parts, bool interleaved,
                 int k, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(packed_elements(p)) / 8;
  pack_head<<<static_cast<unsigned>((units + 255) / 256), 256, 0, stream>>>(
      to, p, fragments, n[0], parts > 1 ? n[1] : 0, parts > 2 ? n[2] : 0, interleaved, k, units);
  return cudaGetLastError();
}

}  // namespace vla::cuda::head
