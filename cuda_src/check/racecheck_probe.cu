// What compute-sanitizer's racecheck follows, in the smallest kernels that can show it: each writes shared
// memory with some threads, waits, and reads it with others, in a loop. All but the last are ordered; what is
// reported of those is the tool's, not the kernel's.
//   compute-sanitizer --tool racecheck racecheck_probe KERNEL
//   block    every thread waits at a barrier of the whole block
//   named    8 of 10 warps wait at a named barrier (bar.sync 4, 256), as the persistent head's do
//   group    two groups of 4 warps, each at a named barrier whose number stands in a register
//   cluster  as named, in a cluster of 8 blocks
//   copied   a bulk copy fills what was read before a mbarrier was arrived at
//   counted  a bulk copy fills what was read before this block counted itself done in global memory
//   racing   nobody waits
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kRounds = 4, kWorkers = 256, kThreads = 320;

__device__ __forceinline__ uint32_t address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void named_barrier() { asm volatile("bar.sync 4, 256;" ::: "memory"); }

__global__ void ordered_by_block(int* out) {
  __shared__ int x[kThreads];
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    x[threadIdx.x] = i;
    __syncthreads();
    sum += x[kThreads - 1 - threadIdx.x];
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}
__global__ void ordered_by_name(int* out) {
  __shared__ int x[kWorkers];
  if (threadIdx.x >= kWorkers) return;
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    x[threadIdx.x] = i;
    named_barrier();
    sum += x[kWorkers - 1 - threadIdx.x];
    named_barrier();
  }
  out[threadIdx.x] = sum;
}

__global__ void ordered_by_group(int* out) {
  __shared__ int x[kWorkers];
  if (threadIdx.x >= kWorkers) return;
  const int group = threadIdx.x / 128, id = 2 + __shfl_sync(0xffffffffu, group, 0);
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    x[threadIdx.x] = i;
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
    sum += x[threadIdx.x ^ 127];
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
  }
  out[threadIdx.x] = sum;
}

__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
// The last warp has 1 KB copied, the others read it; the next copy waits until they have.
template <bool kCounted>
__global__ void copied(int* out, const int* from, unsigned* counter) {
  __shared__ alignas(128) int x[kWorkers];
  __shared__ alignas(8) uint64_t barriers[2];
  const uint32_t full = address(&barriers[0]), empty = address(&barriers[1]);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty), "r"(kWorkers / 32));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x == kWorkers) {
    for (int i = 0; i < kRounds; ++i) {
      if (kCounted) {
        unsigned have = 0;
        while (have < static_cast<unsigned>(i)) {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(have) : "l"(counter) : "memory");
        }
      } else {
        wait(empty, (i & 1) ^ 1);
      }
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(kWorkers * 4)
                   : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              address(x)),
          "l"(from), "r"(kWorkers * 4), "r"(full)
          : "memory");
    }
  } else if (threadIdx.x < kWorkers) {
    int sum = 0;
    for (int i = 0; i < kRounds; ++i) {
      wait(full, i & 1);
      sum += x[kWorkers - 1 - threadIdx.x];
      if (kCounted) {
        named_barrier();
        if (threadIdx.x == 0)
          asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      } else {
        __syncwarp();
        if (threadIdx.x % 32 == 0)
          asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty) : "memory");
      }
    }
    out[threadIdx.x] = sum;
  }
}
__global__ void racing(int* out) {
  __shared__ int x[kThreads];
  x[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  const char* what = argc > 1 ? argv[1] : "";
  int *out = nullptr, *from = nullptr;
  unsigned* counter = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&out), kThreads * 4);
  cudaMalloc(reinterpret_cast<void**>(&from), kWorkers * 4);
  cudaMalloc(reinterpret_cast<void**>(&counter), 4);
  cudaMemset(from, 0, kWorkers * 4), cudaMemset(counter, 0, 4);
  if (!std::strcmp(what, "block")) {
    ordered_by_block<<<1, kThreads>>>(out);
  } else if (!std::strcmp(what, "named")) {
    ordered_by_name<<<1, kThreads>>>(out);
  } else if (!std::strcmp(what, "group")) {
    ordered_by_group<<<1, kThreads>>>(out);
  } else if (!std::strcmp(what, "cluster")) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 8, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = 8, config.blockDim = kThreads, config.attrs = &cluster, config.numAttrs = 1;
    cudaLaunchKernelEx(&config, ordered_by_name, out);
  } else if (!std::strcmp(what, "copied")) {
    copied<false><<<1, kThreads>>>(out, from, counter);
  } else if (!std::strcmp(what, "counted")) {
    copied<true><<<1, kThreads>>>(out, from, counter);
  } else if (!std::strcmp(what, "racing")) {
    racing<<<1, kThreads>>>(out);
  } else {
    std::printf("racecheck_probe: expected block, named, group, cluster, copied, counted or racing\n");
    return 2;
  }
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 2;
}
