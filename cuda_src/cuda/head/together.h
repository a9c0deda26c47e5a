// Launching a kernel whose blocks wait for each other: in clusters, all of them at once or none.
#pragma once

#include <cuda_runtime.h>

#include "layout.h"

namespace vla::cuda::head {

struct Together {
  int blocks, cluster, threads;  // blocks: all; of a cluster; threads of a block
  int shared;                    // bytes of a block
};

inline cudaLaunchAttribute of_clusters(int size) {
  cudaLaunchAttribute a;
  a.id = cudaLaunchAttributeClusterDimension;
  a.val.clusterDim.x = static_cast<unsigned>(size), a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  return a;
}

// All that there is: another plan's table may need more than this one, and its graph is launched later.
template <typename Argument>
cudaError_t allow_shared(void (*kernel)(Argument)) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedOfBlock);
}

// Clusters of `size` blocks that the device holds at once; 0 where the kernel does not run.
template <typename Argument>
int resident_together(void (*kernel)(Argument), int size, int threads) {
  int clusters = 0;
  cudaLaunchAttribute cluster = of_clusters(size);
  cudaLaunchConfig_t config = {};
  config.gridDim = size, config.blockDim = threads, config.dynamicSmemBytes = kSharedOfBlock;
  config.attrs = &cluster, config.numAttrs = 1;
  if (allow_shared(kernel) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

// Zeroes the counter that the blocks meet at (kCounterWords), and launches.
template <typename Argument>
cudaError_t launch_together(void (*kernel)(Argument), const Together& of, unsigned* counter,
                            cudaStream_t stream, const Argument& argument) {
  if (const cudaError_t error = allow_shared(kernel); error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0] = of_clusters(of.cluster);
  // All blocks start together or none does: they wait for each other, and beside another such kernel (a
  // second policy in this process) each might hold half of the multiprocessors for ever.
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = of.blocks, config.blockDim = of.threads, config.dynamicSmemBytes = of.shared;
  config.stream = stream, config.attrs = attributes, config.numAttrs = 2;
  if (const cudaError_t error = cudaMemsetAsync(counter, 0, kCounterWords * sizeof *counter, stream);
      error != cudaSuccess)
    return error;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

}  // namespace vla::cuda::head
