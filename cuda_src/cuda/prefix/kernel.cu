// The persistent prefix: launch, packing.
#include <type_traits>

#include "../common.cuh"
#include "../head/together.h"
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

}  // namespace

int resident_blocks() { return head::resident_together(persistent_prefix, kPair, kThreads) * kPair; }

cudaError_t launch(const Table& t, cudaStream_t stream) {
  return head::launch_together(persistent_prefix, {t.ctas, kPair, kThreads, shared_bytes(t)}, t.counter,
                               stream, t);
}

cudaError_t pack(Bits* to, const Phase& p, const Bits* from, const int* n, int parts, int k,
                 cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(packed_elements(p)) / 8;
  const Parts all{{n[0], parts > 1 ? n[1] : 0, parts > 2 ? n[2] : 0}};
  pack_prefix<<<static_cast<unsigned>((units + 255) / 256), 256, 0, stream>>>(to, p, from, all, k, units);
  return cudaGetLastError();
}

}  // namespace vla::cuda::prefix
