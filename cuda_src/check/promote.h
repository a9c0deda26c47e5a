// The E4M3 product of 128 x 128 tiles whose sums are added to float32 registers after every `promote` slices
// of 128 (0: never, 1, 2 or 4), to measure what the matrix unit's own sums cost in accuracy and what this
// costs in time.
#pragma once

#include "../cuda/large/product.cuh"

namespace vla::check {

cudaError_t product_promoted(int promote, const cuda::QuantisedProduct& p, const cuda::Launch& at);

}  // namespace vla::check
