// Products of which a cluster has 64 columns (or 80), each of its blocks a range of k: everything as wide as
// the hidden state, and the action's projection with the Euler step.
//
// A block sends each row's sums to the block of the cluster that finishes the row, which adds them up by
// rank: the same bits each time. The hidden state itself stays in float32 in the registers of the threads
// that finish it, for as long as the loop runs: every phase of this kind gives a thread the same row and
// columns. What goes to memory is what the next product reads: the state times the weight of its norm, as
// bfloat16, and the rows' sums of squares.
#pragma once

#include "block.cuh"

namespace vla::cuda::head {

// Sends sums of 64 rows, N columns to the blocks that finish the rows: group of 8 rows i to block i.
template <int N>
__device__ __forceinline__ void send_sums(const float (&acc)[N / 2], const Table& t, const Block& b) {
  const unsigned lane = threadIdx.x % 32, odd = lane & 1, owner = threadIdx.x / 32 * 2 + odd;
  const uint32_t at = cluster_address(b.base + receive_at(t), owner);
  const uint32_t barrier = cluster_address(b.sums(2), owner);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    // lanes in pairs: the even one gets 4 columns of row r, the odd one of row r + 8
    const float x = __shfl_xor_sync(0xffffffffu, odd ? acc[4 * j] : acc[4 * j + 2], 1);
    const float y = __shfl_xor_sync(0xffffffffu, odd ? acc[4 * j + 1] : acc[4 * j + 3], 1);
    if (owner * 8 >= static_cast<unsigned>(t.rows)) continue;
    send4(at + receive_unit(b.rank, lane / 4, j, lane % 4 / 2, N / 8) * 16, barrier,
          odd ? make_float4(x, y, acc[4 * j + 2], acc[4 * j + 3])
              : make_float4(acc[4 * j], acc[4 * j + 1], x, y));
  }
}
// The sum, by rank, of what `sources` blocks sent for a piece.
template <int N>
__device__ __forceinline__ float4 received_sum(uint32_t from, const Piece& piece, int sources) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int r = 0; r < kCluster; ++r) {
    if (r >= sources) break;
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from + receive_unit(r, piece.row, piece.octet, piece.half, N / 8) * 16)
                 : "memory");
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

__device__ __forceinline__ float4 read4(const float* p, int i, bool there, float otherwise) {
  if (p == nullptr || !there) return make_float4(otherwise, otherwise, otherwise, otherwise);
  return __ldg(reinterpret_cast<const float4*>(p + i));
}

template <int N>
__device__ __forceinline__ void split_phase(const Table& t, const Block& b, const Phase& p, int step,
                                            unsigned g, Carried& state, Watch& w) {
  const bool copies = t.parts & 4;
  const int thread = threadIdx.x, group = warp_index() / 4;
  const Share s = share_of(p, b.cta);
  const Shape shape = shape_of(t, p, b, s, 0, state);
  const Piece piece = piece_of(thread);
  const bool owner = owns(t.rows, b.rank) && (t.parts & 8), mine = owner && thread < pieces(N);
  const int row = b.rank * 8 + piece.row, column = s.tile * N + piece.octet * 8 + piece.half * 4;
  const bool valid = mine && column < p.n && row < t.m;
  const float4 bias = read4(p.bias.at(step), column, valid, 0.0f),
               shift = read4(p.shift.at(step), column, valid, 0.0f);
  const float4 gate = read4(p.gate.at(step), column, valid, 1.0f);
  float4 next = read4(p.next.at(step), column, valid, 1.0f);
  if (p.next.p != nullptr)
    next.x += p.next_plus, next.y += p.next_plus, next.z += p.next_plus, next.w += p.next_plus;
  const int sources = senders(p);
  if (owner && thread == 0) barrier_expect(b.sums(2), sources * 8 * N * 4);
  if (s.count() > 0) {
    if (copies) wait_on(b.x_full(), state.x_parity, w, kForX, 0);
    state.x_parity ^= 1;
    stamp(t, g, 1);
    if (group == 0) {
      float acc[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
      multiply<N, 1>(acc, t, b, shape, 0, w);
      stamp(t, g, 2);
      if (t.parts & 8) send_sums<N>(acc, t, b);
    }
  }
  if (owner) {
    wait_on(b.sums(2), state.split_parity, w, kForSums, 2);
    state.split_parity ^= 1;
  }
  if (mine) {
    // (columns past the end hold what the ring happened to; they are dropped here)
    float4 v = received_sum<N>(b.base + receive_at(t), piece, sources);
    float y[4] = {v.x, v.y, v.z, v.w};
    if (p.normed && valid) {
      const float4* parts = reinterpret_cast<const float4*>(p.squares_in + row * kSquareParts);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kSquareParts / 4; ++i) {
        const float4 q = __ldcg(parts + i);
        sum += (q.x + q.y) + (q.z + q.w);
      }
      const float rms = rsqrtf(sum * p.mean + p.eps);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] *= rms;
    }
    const float b4[4] = {bias.x, bias.y, bias.z, bias.w}, s4[4] = {shift.x, shift.y, shift.z, shift.w};
    const float g4[4] = {gate.x, gate.y, gate.z, gate.w}, n4[4] = {next.x, next.y, next.z, next.w};
    if (p.kind == Kind::kEuler) {
      if (valid && row >= t.first) {
        const EulerPart& e = p.euler;
        const int action = row - t.first;
        float* sample = e.sample + action * e.ld_sample + column;
        const float weight = __ldg(e.weight + action * e.ld_weight) * __ldg(e.gain.at(step)),
                    time = __ldg(e.time.at(step));
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float velocity = y[i] + s4[i] + b4[i], old = sample[i];
          const float error =
              __ldg(e.previous + action * e.ld_previous + column + i) - (old - time * velocity);
          x[i] = old + e.dt * (velocity - weight * error);
          sample[i] = x[i];
        }
        Bits* to = p.out + act_index(t.rows, row, column);
        *reinterpret_cast<uint2*>(to) = make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3]));
      }
    } else {
      float squares = 0.0f;
      if (valid) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float z = quick_act(p.scale * (y[i] + s4[i] + b4[i]), p.act) * g4[i];
          if (p.residual) z += state.residual[i];
          y[i] = z;
        }
        if (row < t.first && p.linear.fixed != nullptr) {
          const uint2 v = *reinterpret_cast<const uint2*>(p.linear.fixed + row * p.linear.ld_fixed + column);
          const float2 low = unpack2(v.x), high = unpack2(v.y);
          y[0] = low.x, y[1] = low.y, y[2] = high.x, y[3] = high.y;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          state.residual[i] = y[i];
          squares += y[i] * y[i];
          y[i] *= n4[i];
        }
        Bits* to = p.out + act_index(t.rows, row, column);
        *reinterpret_cast<uint2*>(to) = make_uint2(pack2(y[0], y[1]), pack2(y[2], y[3]));
      }
      if (p.squares_out != nullptr) {
        // 16 lanes have a row of the first 64 columns, 4 a row of the others; a whole warp is of one kind
        const int lanes = thread < kGroup ? 16 : 4;
        for (int o = lanes / 2; o > 0; o >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, o);
        if (thread % lanes == 0 && row < t.m)
          p.squares_out[row * kSquareParts + square_part(thread, s.tile)] = squares;
      }
    }
  }
  finish(t, g, kConsumers);
}

}  // namespace vla::cuda::head
