// The persistent action head: the whole denoising loop in one kernel of one block a multiprocessor.
#pragma once

#include <cuda_runtime_api.h>

#include "layout.h"

namespace vla::cuda::head {

// Clusters of the kernel that the device holds at once, kMaxTiles at most; 0 where it does not run.
int resident_clusters();

// Runs the loop of the table. Its counter is zeroed here.
cudaError_t launch(const Table& t, cudaStream_t stream);

// The weight of phase p, from small/pack.cu's packing (n: rows of each part) to the head's: `to` has
// packed_elements(p).
cudaError_t pack(Bits* to, const Phase& p, const Bits* fragments, const int* n, int parts, bool interleaved,
                 int k, cudaStream_t stream);

}  // namespace vla::cuda::head
