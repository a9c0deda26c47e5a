// The persistent prefix's kernel.
#pragma once

#include <type_traits>

#include "attention.cuh"
#include "prefix.h"

namespace vla::cuda::prefix {

// The hidden state as it comes, into registers, and what the first product reads of it.
template <int kOwnedRows>
__device__ __forceinline__ void prepare(const Table& t, const Block& b, const Phase& p, int index,
                                        Carried& state) {
  constexpr int kUnits = kOwnedRows / 8, H = units_first(kUnits);
  const int group = warp_index() / 4, lane = threadIdx.x % 32, warp = warp_index() % 4;
  const Tile at = tile_at(p, first_tile(p, b.cta), b.cta);
  const int c = at.column * 64 + warp * 16 + lane / 4;
  float z[H][4], next[2] = {1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < H; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = at.row + 8 * (group * H + i) + lane % 4 * 2 + e % 2;
      z[i][e] =
          row < t.m
              ? __bfloat162float(reinterpret_cast<const bf16*>(t.prefix)[row * t.ld_prefix + c + e / 2 * 8])
              : 0.0f;
    }
  }
  if (p.next != nullptr)
    next[0] = p.next_plus + __ldg(p.next + c), next[1] = p.next_plus + __ldg(p.next + c + 8);
  end_state<kUnits, H>(z, t, p, at.column, at.row, next, group, state);
  named_barrier(kAll, kConsumers);
  if (threadIdx.x == 0) head::add_done(t.counter);
  stamp(t, index, 3);
}

// Calls f with the one of kSizes that `size` is.
template <Sizes kSizes, int I = 0, typename F>
__device__ __forceinline__ void with_size(int size, const F& f) {
  if constexpr (I == 2) {
    f(std::integral_constant<int, kSizes.of[I]>{});
  } else if (size == kSizes.of[I]) {
    f(std::integral_constant<int, kSizes.of[I]>{});
  } else {
    with_size<kSizes, I + 1>(size, f);
  }
}

__device__ __forceinline__ void consume(const Table& t, const Block& b, int* key_blocks, Watch& w) {
  Carried state;
  read_key_blocks(t, key_blocks);
  named_barrier(kAll, kConsumers);
#pragma unroll 1
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    if (!takes_part(p, b.cta)) continue;
    w.phase = i;
    if (p.kind == Kind::kQkv) {
      with_size<kQkvRows>(p.rows, [&](auto n) { product_phase<Kind::kQkv, n, 1>(t, b, p, i, state, w); });
    } else if (p.kind == Kind::kAttention) {
      with_size<kKeys>(p.rows, [&](auto n) { attention_phase<n>(t, b, p, i, key_blocks, state, w); });
    } else if (p.kind == Kind::kGated) {
      with_size<kGatedRows>(p.rows, [&](auto n) { product_phase<Kind::kGated, n, 1>(t, b, p, i, state, w); });
    } else if (p.kind == Kind::kProject) {
      with_size<kOwned>(p.rows, [&](auto n) { product_phase<Kind::kProject, n, 1>(t, b, p, i, state, w); });
    } else if (p.kind == Kind::kPrepare) {
      with_size<kOwned>(t.owned, [&](auto n) { prepare<n>(t, b, p, i, state); });
    } else if (p.split == kPair) {
      with_size<kOwned>(
          t.owned, [&](auto n) { product_phase<Kind::kLinear, kPair * n, kPair>(t, b, p, i, state, w); });
    } else {
      with_size<kOwned>(t.owned, [&](auto n) { product_phase<Kind::kLinear, n, 1>(t, b, p, i, state, w); });
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) persistent_prefix(const __grid_constant__ Table t) {
#if VLA_SM90A
  extern __shared__ __align__(1024) std::byte shared[];
  const Block b(t, smem_address(shared));
  Watch w{t.counter + head::kFailed, t.report, t.patience, 0, false};
  const int warp = warp_index();
  if (threadIdx.x == 0) b.init(t);
  __syncthreads();
  cluster_arrive();  // no block sends to another before that one's barriers are there
  cluster_wait();
  if (warp == kFeeder) {
    feed(t, b, w);
  } else if (warp == kLoader) {
    load(t, b, w);
  } else {
    consume(t, b, reinterpret_cast<int*>(shared + (b.key_blocks - b.ring)), w);
  }
  __syncwarp();
  cluster_arrive();  // nor does a block end before all that is sent to it has come
  cluster_wait();
#endif
}

}  // namespace vla::cuda::prefix
