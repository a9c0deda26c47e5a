// The persistent action head's kernel.
#pragma once

#include "head.h"
#include "joined.cuh"
#include "spread.cuh"

namespace vla::cuda::head {

// Before the loop: the prefix's keys and values into blocks of what each block of a cluster reads, the noise
// as the first product's x. All consumers of all blocks.
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
    const int count = a.kv_heads * kCluster * a.prefix_rows * units;
#pragma unroll 4
    for (int j = mine * kConsumers + thread; j < count; j += each * kConsumers) {
      const int unit = j % units, rest = j / units, row = rest % a.prefix_rows, block = rest / a.prefix_rows;
      const int head = block / kCluster, rank = block % kCluster, key = rank * a.prefix_rows + row;
      uint4 k = make_uint4(0, 0, 0, 0), v = k;
      if (key < a.prefix) {
        const Bits* from = a.k + static_cast<int64_t>(key) * a.ld_k + head * d;
        if (p.joined) {
          const uint2 low = __ldg(reinterpret_cast<const uint2*>(from + joined_column(1, unit, 0))),
                      high = __ldg(reinterpret_cast<const uint2*>(from + joined_column(1, unit, 4)));
          k = make_uint4(low.x, low.y, high.x, high.y);
        } else {
          k = __ldg(reinterpret_cast<const uint4*>(from) + unit);
        }
        v = __ldg(reinterpret_cast<const uint4*>(a.v + static_cast<int64_t>(key) * a.ld_v + head * d) + unit);
      }
      const unsigned to = key_index(head, rank, p.chunks, a.prefix_rows, row, unit * 8);
      *reinterpret_cast<uint4*>(a.packed_k + to) = k;
      *reinterpret_cast<uint4*>(a.packed_v + to) = v;
    }
  }
  for (int j = static_cast<int>(blockIdx.x) * kConsumers + thread; j < (t.m - t.first) * t.action_n;
       j += t.ctas * kConsumers) {
    const int row = j / t.action_n, col = j % t.action_n;
    reinterpret_cast<bf16*>(t.actions)[act_index(t.rows, t.first + row, col)] =
        __float2bfloat16(t.sample[row * t.ld_sample + col]);
  }
}

// The attention made for `keys` rows of keys, from number I of those made on.
template <int I>
__device__ __forceinline__ void attention(int keys, const Table& t, const Block& b, const Phase& p,
                                          unsigned g, Carried& state, Watch& w) {
  constexpr int NK = key_rows_made(I);
  if (NK < kMaxKeys && keys != NK) {
    if constexpr (NK < kMaxKeys) attention<I + 1>(keys, t, b, p, g, state, w);
  } else if (p.attention.columns == 1) {
    attention_phase<NK, 1, false>(t, b, p, attending(t, b, p), g, state, w);
  } else {
    attention_phase<NK, 2, false>(t, b, p, attending(t, b, p), g, state, w);
  }
}
// The product made for tiles of so many rows of W, from N on.
template <Kind kKind, int N>
__device__ __forceinline__ void spread(const Table& t, const Block& b, const Phase& p, int index, int step,
                                       unsigned g, Carried& state, Watch& w) {
  if constexpr (N == 16 * (kKind == Kind::kQkv ? kMostQkvUnits : kMostUnits)) {
    spread_phase<kKind, N>(t, b, p, index, step, g, state, w);
  } else if (p.tile_rows == N) {
    spread_phase<kKind, N>(t, b, p, index, step, g, state, w);
  } else {
    spread<kKind, N + 16>(t, b, p, index, step, g, state, w);
  }
}

__device__ __forceinline__ void consume(const Table& t, const Block& b, Watch& w) {
  const int group = warp_index() / 4;
  Carried state;
  prepare(t);
  proxy_fence();
  named_barrier(4, kConsumers);
  if (threadIdx.x == 0) report_done(t);
#pragma unroll 1
  for (int step = 0; step < t.steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < t.phases; ++i) {
      const Phase& p = t.phase[i];
      const unsigned g = 1 + step * t.phases + i;
      if (!takes_part(t, p, b.cta)) continue;
      w.phase = g;
      if (p.joined) {
        if (p.kind == Kind::kQkv) joined_phase(t, b, p, t.phase[i + 1], step, g, state, w);
      } else if (p.kind == Kind::kAttention) {
        if (group == 0) attention<0>(key_rows(p.attention), t, b, p, g, state, w);
      } else if (is_split(p)) {
        if (p.tile_rows == 64) {
          split_phase<64>(t, b, p, step, g, state, w);
        } else {
          split_phase<kWide>(t, b, p, step, g, state, w);
        }
      } else if (p.kind == Kind::kGated) {
        spread<Kind::kGated, 16>(t, b, p, i, step, g, state, w);
      } else {
        spread<Kind::kQkv, 16>(t, b, p, i, step, g, state, w);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) persistent_head(const __grid_constant__ Table t) {
#if VLA_SM90A
  extern __shared__ __align__(1024) std::byte shared[];
  const Block b(t, smem_address(shared));
  Watch w{t.counter + kFailed, t.report, t.patience, 0, false};
  const int warp = warp_index();
  if (threadIdx.x == 0) b.init(t);
  __syncthreads();
  cluster_arrive();  // no block copies into another before that one's barriers are there
  cluster_wait();
  if (warp == kFeeder) {
    if (t.parts & 1) feed(t, b, w);
  } else if (warp == kLoader) {
    load(t, b, w);
  } else {
    consume(t, b, w);
  }
  __syncwarp();
  cluster_arrive();  // nor does a block end before all that is sent to it has come
  cluster_wait();
#endif
}

}  // namespace vla::cuda::head
