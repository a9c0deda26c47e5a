#include "kernel.cuh"

namespace vla::cuda::head {

cudaError_t run_7(const Table& t, cudaStream_t stream, int* clusters) { return run<7>(t, stream, clusters); }

}  // namespace vla::cuda::head
