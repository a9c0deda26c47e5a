// The persistent action head: the whole denoising loop in one kernel of one block a multiprocessor.
#pragma once

#include <cuda_runtime_api.h>

#include "layout.h"

namespace vla::cuda::head {

// Clusters of `size` blocks that the device holds at once, 0 where the kernel does not run; `shared`: bytes a
// block.
int resident_clusters(int size, int shared);

// Runs the loop of the table. counters: 32 + ctas + 128 words, zeroed here.
cudaError_t launch(const Table& t, cudaStream_t stream);

// The weight of phase p, from small/pack.cu's packing (n: rows of each part) to the head's: `to` has
// packed_elements(p).
cudaError_t pack(Bits* to, const Phase& p, const Bits* fragments, const int* n, int parts, bool interleaved,
                 int k, cudaStream_t stream);

}  // namespace vla::cuda::head
