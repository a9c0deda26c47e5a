// Attention of the persistent vision encoder where all keys of a camera lie in the ring at once: an item is
// 64 queries of a head, half of the keys each warpgroup's. What the warpgroups find of their keys is weighed
// and added (Milakov and Gimelshein 2018), either of them finishing half of the columns.
#pragma once

#include "../large/attention.cuh"
#include "../large/wgmma_registers.cuh"
#include "product.cuh"

namespace vla::cuda::vision {

template <typename S>
__device__ __forceinline__ void attention_phase(const Params& p, const Block<S>& b, int layer,
                                                Carried& carried, Watch& w) {
  constexpr int D = (S::kHead + 15) / 16 * 16;  // with what the copy engine fills up with zeros
  constexpr int kHalf = S::kKeys / 2, kBox = kHalf * kChunkBytes, kQueryBox = kQueries * kChunkBytes;
  constexpr int kUnits = S::kHead / 8,
                kFirst = (kUnits + 1) / 2;  // of a head's columns; that the first finishes
  static_assert(S::kGroups == 2 && S::kSlots >= 4 && kHalf == 128);
  static_assert((2 * kFirst + 2) * kGroup * 16 <= Of<S>::kMeeting);
  const Table& t = p.t;
  const int group = warp_index() / 4, thread = threadIdx.x % kGroup, lane = thread % 32, q = lane % 4;
  const int items = tiles_of(t, Kind::kAttention);
  const unsigned number = number_of(layer, static_cast<int>(Kind::kAttention));
  if (b.cta >= items) return;
#pragma unroll 1
  for (int n = b.cta; n < items; n += t.ctas) {
    const Item item = item_at<S>(t, n);
    Place stage[kStagesOfAttention];
#pragma unroll
    for (Place& s : stage) s = carried.at, carried.at.next<S>();
    const auto wait = [&](int s) {
      head::wait_on(b.full(stage[s].slot), stage[s].parity, w, kForStage, stage[s].slot);
    };
    wait(0);
    stamp(t, number, 1);
    wait(1), wait(2);
    const uint32_t queries = b.slot(stage[0].slot), keys = b.slot(group == 0 ? stage[1].slot : stage[2].slot),
                   values = b.slot(group == 0 ? stage[3].slot : stage[4].slot);
    float s[kHalf / 2];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
      wgmma<kHalf>(s, wgmma_tile(queries + kk / 4 * kQueryBox + kk % 4 * 32),
                   wgmma_tile(keys + kk / 4 * kBox + kk % 4 * 32), kk > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (float& e : s) asm volatile("" : "+f"(e)::"memory");
#pragma unroll
    for (int i = 0; i < 3; ++i) b.release(stage[i].slot);
    float top[2], total[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = -INFINITY;
#pragma unroll
      for (int i = 0; i < kHalf / 8; ++i) high = fmaxf(high, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      top[h] = high == -INFINITY ? 0.0f : high * t.scale;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kHalf / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * h + e];
          x = exp2_fast(x * t.scale - top[h]);
          sum += x;
        }
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      total[h] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
    }
    uint32_t weights[kHalf / 16][4];
#pragma unroll
    for (int kk = 0; kk < kHalf / 16; ++kk) {
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[kk][e] = pack2(s[8 * kk + 2 * e], s[8 * kk + 2 * e + 1]);
    }
    float out[D / 2];
#pragma unroll
    for (float& e : out) e = 0.0f;
    wait(3), wait(4);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kHalf / 16; ++kk)
      wgmma_registers<D>(out, weights[kk], wgmma_tile_of_rows(values + kk * 2048, kBox));
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (float& e : out) asm volatile("" : "+f"(e)::"memory");
    b.release(stage[3].slot), b.release(stage[4].slot);
    stamp(t, number, 2);

    // To the other warpgroup: the columns that it finishes; maxima and totals.
    const uint32_t own = b.meeting + thread * 16, tops = own + 2 * kFirst * kGroup * 16;
    store4(tops + group * kGroup * 16, top[0], total[0], top[1], total[1]);
    const auto column = [&](int g, int i, int e) {  // unit i of those that warpgroup g finishes
      const int second = kFirst + i < kUnits ? kFirst + i : 0;
      return g == 0 ? out[4 * i + e] : out[4 * second + e];
    };
#pragma unroll
    for (int i = 0; i < kFirst; ++i)
      store4(own + (group * kFirst + i) * kGroup * 16, column(1 - group, i, 0), column(1 - group, i, 1),
             column(1 - group, i, 2), column(1 - group, i, 3));
    stamp(t, number, 3);
    named_barrier(kAll, Of<S>::kConsumers);
    stamp(t, number, 4);
    const float4 other = load4(tops + (1 - group) * kGroup * 16);
    float mine[2], theirs[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float its = h == 0 ? other.x : other.z, its_total = h == 0 ? other.y : other.w;
      const float high = fmaxf(top[h], its), a = exp2_fast(top[h] - high), c = exp2_fast(its - high);
      const float share = 1.0f / (group == 0 ? total[h] * a + its_total * c : its_total * c + total[h] * a);
      mine[h] = a * share, theirs[h] = c * share;
    }
    Bits* const to = t.a + static_cast<int64_t>(item.row + warp_index() % 4 * 16 + lane / 4) * t.width +
                     item.head * S::kHead + 2 * q;
#pragma unroll
    for (int i = 0; i < kFirst; ++i) {
      if (group == 1 && kFirst + i >= kUnits) continue;
      const float4 from = load4(own + ((1 - group) * kFirst + i) * kGroup * 16);
      Bits* const at = to + (group * kFirst + i) * 8;
      *reinterpret_cast<uint32_t*>(at) = pack2(column(group, i, 0) * mine[0] + from.x * theirs[0],
                                               column(group, i, 1) * mine[0] + from.y * theirs[0]);
      *reinterpret_cast<uint32_t*>(at + 8 * t.width) =
          pack2(column(group, i, 2) * mine[1] + from.z * theirs[1],
                column(group, i, 3) * mine[1] + from.w * theirs[1]);
    }
    stamp(t, number, 5);
    end_tile<S>();
  }
  end_phase(t, number);
}

}  // namespace vla::cuda::vision
