// The persistent vision encoder's kernel.
#pragma once

#include "attention.cuh"

namespace vla::cuda::vision {

template <typename S>
__device__ __forceinline__ void consume(const Params& p, const Block<S>& b, Watch& w) {
  Carried carried;
  prepare<S>(p, b);
#pragma unroll 1
  for (int layer = 0; layer < p.t.layers; ++layer) {
    w.phase = number_of(layer, 0);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {  // so that out and fc2 are the same code
      if (half == 0) {
        normed_phase<S, Kind::kQkv, S::kQkv>(p, b, layer, carried, w);
        ++w.phase;
        attention_phase<S>(p, b, layer, carried, w);
      } else {
        normed_phase<S, Kind::kFc1, S::kFc1>(p, b, layer, carried, w);
      }
      ++w.phase;
      state_phase<S>(p, b, layer, half == 0 ? Kind::kOut : Kind::kFc2, carried, w);
      ++w.phase;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(Of<S>::kThreads, 1) persistent_vision(const __grid_constant__ Params p) {
#if VLA_SM90A
  extern __shared__ __align__(1024) std::byte shared[];
  const Block<S> b(smem_address(shared));
  Watch w{p.t.counter + head::kFailed, p.t.report, p.t.patience, 0, false};
  const int warp = warp_index();
  if (threadIdx.x == 0) b.init();
  __syncthreads();
  cluster_arrive();  // no block sends to another before that one's barriers are there
  cluster_wait();
  if (warp == Of<S>::kFeeder) {
    feed<S>(p, b, w);
  } else if (warp == Of<S>::kLoader) {
    load<S>(p, b, w);
  } else {
    consume<S>(p, b, w);
  }
  __syncwarp();
  cluster_arrive();  // nor does a block end before all that is sent to it has come
  cluster_wait();
#endif
}

}  // namespace vla::cuda::vision
