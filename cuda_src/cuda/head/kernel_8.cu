#include "kernel.cuh"

namespace vla::cuda::head {

cudaError_t run_8(const Table& t, cudaStream_t stream, int* clusters) { return run<8>(t, stream, clusters); }

}  // namespace vla::cuda::head
