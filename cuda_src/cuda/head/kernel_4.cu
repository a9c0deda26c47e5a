#include "kernel.cuh"

namespace vla::cuda::head {

cudaError_t run_4(const Table& t, cudaStream_t stream, int* clusters) { return run<4>(t, stream, clusters); }

}  // namespace vla::cuda::head
