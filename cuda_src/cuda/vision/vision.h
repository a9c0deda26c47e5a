// The persistent vision encoder: all layers in one kernel of one block a multiprocessor.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "build.h"

namespace vla::cuda::vision {

// Blocks of the kernel that the device holds at once, a multiple of kPair; 0 where it does not run.
int resident_blocks();

struct Params;

// A table, and what the copy engine is told of its matrices.
class Encoder {
 public:
  Encoder();
  ~Encoder();
  // `t` points to device memory, counter and all; weights: kProducts a layer.
  cudaError_t make(const Table& t, const std::vector<Matrix>& weights);
  // Runs the layers. The counter is zeroed here.
  cudaError_t launch(cudaStream_t stream) const;

 private:
  std::unique_ptr<Params> params_;
};

// See Memory.
cudaError_t fold(Term* to, const Matrix& w, const Folded& from, cudaStream_t stream);
cudaError_t pair_up(Term* to, int n, const Folded& from, cudaStream_t stream);

}  // namespace vla::cuda::vision
