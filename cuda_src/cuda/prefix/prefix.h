// The persistent prefix: all layers of a small prefix in one kernel of one block a multiprocessor.
#pragma once

#include <cuda_runtime_api.h>

#include "layout.h"

namespace vla::cuda::prefix {

// Blocks of the kernel that the device holds at once, a multiple of kPair; 0 where it does not run.
int resident_blocks();

// Runs the layers of the table. Its counter is zeroed here.
cudaError_t launch(const Table& t, cudaStream_t stream);

// The weight of phase p from large/linear.cu's packing (n: rows of each part, k columns) to the prefix's.
cudaError_t pack(Bits* to, const Phase& p, const Bits* from, const int* n, int parts, int k,
                 cudaStream_t stream);

}  // namespace vla::cuda::prefix
