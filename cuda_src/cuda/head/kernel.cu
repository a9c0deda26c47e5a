// The persistent action head: launch, packing.
#include "../common.cuh"
#include "build.h"
#include "head.h"

namespace vla::cuda::head {

cudaError_t run_8(const Table& t, cudaStream_t stream, int* clusters);  // kernel_8.cu
cudaError_t run_7(const Table& t, cudaStream_t stream, int* clusters);
cudaError_t run_4(const Table& t, cudaStream_t stream, int* clusters);

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

cudaError_t dispatch(const Table& t, cudaStream_t stream, int* clusters) {
  return t.cluster == 8   ? run_8(t, stream, clusters)
         : t.cluster == 7 ? run_7(t, stream, clusters)
         : t.cluster == 4 ? run_4(t, stream, clusters)
                          : cudaErrorInvalidValue;
}

}  // namespace

int resident_clusters(int size, int shared) {
  static Table t;  // too large for a stack frame of a small thread
  t.cluster = size, t.ctas = size;
  t.slots = 1, t.stage = kStage, t.x_bytes = (shared - kRest - kStage) / 1024 * 1024;
  int clusters = 0;
  if (dispatch(t, nullptr, &clusters) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

cudaError_t launch(const Table& t, cudaStream_t stream) { return dispatch(t, stream, nullptr); }

cudaError_t pack(Bits* to, const Phase& p, const Bits* fragments, const int* n, int parts, bool interleaved,
                 int k, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(packed_elements(p)) / 8;
  pack_head<<<static_cast<unsigned>((units + 255) / 256), 256, 0, stream>>>(
      to, p, fragments, n[0], parts > 1 ? n[1] : 0, parts > 2 ? n[2] : 0, interleaved, k, units);
  return cudaGetLastError();
}

}  // namespace vla::cuda::head
