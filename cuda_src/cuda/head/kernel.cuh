// The persistent action head's kernel; kernel_8.cu, kernel_7.cu and kernel_4.cu compile it for clusters of
// so many blocks.
#pragma once

#include "attention.cuh"
#include "head.h"
#include "spread.cuh"

namespace vla::cuda::head {

// Before the loop: the prefix's keys and values into blocks of what each block of a cluster reads, the noise
// as the first product's x. All consumers of all blocks.
template <int C>
__device__ __forceinline__ void prepare(const Table& t) {
  const int thread = static_cast<int>(threadIdx.x);
  int layers = 0;
#pragma unroll 1
  for (int i = 0; i < t.phases; ++i) layers += t.phase[i].kind == Kind::kAttention;
  const int each = max(1, t.ctas / max(1, layers));  // blocks a layer
#pragma unroll 1
  for (int i = 0, layer = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    if (p.kind != Kind::kAttention) continue;
    const int mine = static_cast<int>(blockIdx.x) - layer * each % t.ctas;
    ++layer;
    if (mine < 0 || mine >= each) continue;
    const AttentionPart& a = p.attention;
    const int units = p.chunks * 8, d = p.head_dim;  // of 16 bytes, of a key
    const int count = a.kv_heads * C * a.prefix_rows * units;
#pragma unroll 4
    for (int j = mine * kConsumers + thread; j < count; j += each * kConsumers) {
      const int unit = j % units, rest = j / units, row = rest % a.prefix_rows, block = rest / a.prefix_rows;
      const int head = block / C, rank = block % C, key = rank * a.prefix_rows + row;
      uint4 k = make_uint4(0, 0, 0, 0), v = k;
      if (key < a.prefix) {
        k = __ldg(reinterpret_cast<const uint4*>(a.k + static_cast<int64_t>(key) * a.ld_k + head * d) + unit);
        v = __ldg(reinterpret_cast<const uint4*>(a.v + static_cast<int64_t>(key) * a.ld_v + head * d) + unit);
      }
      const unsigned to = key_index(head, rank, p.chunks, a.prefix_rows, row, unit * 8, C);
      *reinterpret_cast<uint4*>(a.packed_k + to) = k;
      *reinterpret_cast<uint4*>(a.packed_v + to) = v;
    }
  }
  for (int j = static_cast<int>(blockIdx.x) * kConsumers + thread; j < t.m * t.action_n;
       j += t.ctas * kConsumers) {
    const int row = j / t.action_n, col = j % t.action_n;
    reinterpret_cast<bf16*>(t.actions)[act_index(t.rows, row, col)] =
        __float2bfloat16(t.sample[row * t.ld_sample + col]);
  }
}

// The attention made for `keys` rows of keys, from number I of those made on.
template <int I, int C>
__device__ __forceinline__ void attention(int keys, const Table& t, const Block& b, const Phase& p,
                                          unsigned g, Carried& state, Watch& w) {
  constexpr int kHere = key_rows_made(C, I);
  if constexpr (I == 3 || kHere == kMaxKeys) {
    attention_phase<kHere, C>(t, b, p, g, state, w);
  } else if (keys == kHere) {
    attention_phase<kHere, C>(t, b, p, g, state, w);
  } else {
    attention<I + 1, C>(keys, t, b, p, g, state, w);
  }
}

template <Kind kKind, int C>
__device__ __forceinline__ void spread(const Table& t, const Block& b, const Phase& p, int index, int step,
                                       unsigned g, Carried& state, Watch& w) {
  if (p.tile_rows <= 16) {
    spread_phase<kKind, 16, C>(t, b, p, index, step, g, state, w);
  } else if (kKind == Kind::kQkv ||
             p.tile_rows <= 32) {  // more units with rotation have no room in registers
    spread_phase<kKind, 32, C>(t, b, p, index, step, g, state, w);
  } else if (most_units(C) == 4 || p.tile_rows <= 64) {
    spread_phase<Kind::kGated, 64, C>(t, b, p, index, step, g, state, w);
  } else {
    spread_phase<Kind::kGated, 16 * most_units(C), C>(t, b, p, index, step, g, state, w);
  }
}

template <int C>
__device__ __forceinline__ void consume(const Table& t, const Block& b, Watch& w) {
  const int group = warp_index() / 4;
  Carried state;
  prepare<C>(t);
  proxy_fence();
  named_barrier(4, kConsumers);
  if (threadIdx.x == 0) report_done(t, 0);
#pragma unroll 1
  for (int step = 0; step < t.steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < t.phases; ++i) {
      const Phase& p = t.phase[i];
      const unsigned g = 1 + step * t.phases + i;
      if (!takes_part<C>(t, p, b.cta)) {
        // x's room is free for the keys of the attention that follows, as it is where products are done
        if (group == 0) release_x<C>(t, b, p, i);
        continue;
      }
      w.phase = g;
      if (group >= (p.kind == Kind::kAttention ? p.attention.columns : 1)) continue;
      if (p.kind == Kind::kAttention) {
        const int keys = key_rows(p.attention);
        attention<0, C>(keys, t, b, p, g, state, w);
      } else if (is_split(p)) {
        split_phase<C>(t, b, p, step, g, state, w);
      } else if (p.kind == Kind::kGated) {
        spread<Kind::kGated, C>(t, b, p, i, step, g, state, w);
      } else {
        spread<Kind::kQkv, C>(t, b, p, i, step, g, state, w);
      }
    }
  }
}

template <int C>
__global__ void __launch_bounds__(kThreads, 1) persistent_head(const __grid_constant__ Table t) {
#if VLA_SM90A
  extern __shared__ __align__(1024) std::byte shared[];
  const Block b(t, smem_address(shared), C);
  Watch w{t.report, t.patience, 0, false};
  const int warp = warp_index();
  if (threadIdx.x == 0) b.init(t);
  __syncthreads();
  cluster_arrive();  // no block copies into another before that one's barriers are there
  cluster_wait();
  if (warp == kFeeder) {
    if (threadIdx.x % 32 == 0 && (t.parts & 1)) feed<C>(t, b, w);
  } else if (warp == kLoader) {
    load<C>(t, b, w);
  } else {
    consume<C>(t, b, w);
  }
  __syncwarp();
  cluster_arrive();  // nor does a block end before all that is sent to it has come
  cluster_wait();
#endif
}

// Launches the kernel or, where `clusters` is not null, says how many clusters the device holds.
template <int C>
cudaError_t run(const Table& t, cudaStream_t stream, int* clusters) {
  const int shared = shared_bytes(t);
  // all that there is, not `shared`: another plan's table may need more, and its graph is launched later
  if (const cudaError_t error = cudaFuncSetAttribute(
          persistent_head<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedOfBlock);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = C, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
  // All blocks start together or none does: they wait for each other, and beside another such kernel (a
  // second policy in this process) each might hold half of the multiprocessors for ever.
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = t.ctas, config.blockDim = kThreads, config.dynamicSmemBytes = shared,
  config.stream = stream;
  config.attrs = attributes, config.numAttrs = clusters ? 1 : 2;
  if (clusters) return cudaOccupancyMaxActiveClusters(clusters, persistent_head<C>, &config);
  const size_t words = 32 + static_cast<size_t>(t.ctas) + 128;
  if (const cudaError_t error = cudaMemsetAsync(t.counters, 0, words * 4, stream); error != cudaSuccess)
    return error;
  return cudaLaunchKernelEx(&config, persistent_head<C>, t);
}

}  // namespace vla::cuda::head
