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
  // lanes in pairs: the even one gets 4 columns of row r, the odd one of row r + 8
  float x[N / 8], y[N / 8];
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    x[j] = __shfl_xor_sync(0xffffffffu, odd ? acc[4 * j] : acc[4 * j + 2], 1);
    y[j] = __shfl_xor_sync(0xffffffffu, odd ? acc[4 * j + 1] : acc[4 * j + 3], 1);
  }
  if (owner * 8 >= static_cast<unsigned>(t.rows)) return;
  // receive_unit() of octet j: what is before it is a multiple of 16 units
  const uint32_t at = cluster_address(
      b.base + receive_at(t) + receive_unit(b.rank, lane / 4, 0, lane % 4 / 2, N / 8) * 16, owner);
  const uint32_t barrier = cluster_address(b.sums(2), owner);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    send4((at ^ (j & 7) * 32) + j * 256, barrier,
          odd ? make_float4(x[j], y[j], acc[4 * j + 2], acc[4 * j + 3])
              : make_float4(acc[4 * j], acc[4 * j + 1], x[j], y[j]));
  }
}
// The sum, by rank, of what `sources` blocks sent for a piece: all readings at once where all have sent.
template <int N>
__device__ __forceinline__ float4 received_sum(uint32_t from, const Piece& piece, int sources) {
  from += receive_unit(0, piece.row, piece.octet, piece.half, N / 8) * 16;
  const auto read = [from](int r) { return load4(from + r * receive_unit(1, 0, 0, 0, N / 8) * 16); };
  float4 v[kCluster], sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (sources == kCluster) {
#pragma unroll
    for (int r = 0; r < kCluster; ++r) v[r] = read(r);
#pragma unroll
    for (int r = 0; r < kCluster; ++r) sum.x += v[r].x, sum.y += v[r].y, sum.z += v[r].z, sum.w += v[r].w;
    return sum;
  }
#pragma unroll 1
  for (int r = 0; r < sources; ++r) {
    v[0] = read(r);
    sum.x += v[0].x, sum.y += v[0].y, sum.z += v[0].z, sum.w += v[0].w;
  }
  return sum;
}

__device__ __forceinline__ float4 read4(const float* p, int i, bool there, float otherwise) {
  if (p == nullptr || !there) return make_float4(otherwise, otherwise, otherwise, otherwise);
  return __ldg(reinterpret_cast<const float4*>(p + i));
}

// A step of the sample by its velocity, with the correction toward `previous` (ops.h, Euler).
__device__ __forceinline__ void euler_step(const Table& t, const Phase& p, int step, int row, int column,
                                           const float (&velocity)[4], Bits* to) {
  const EulerPart& e = p.euler;
  const int action = row - t.first;
  float* sample = e.sample + action * e.ld_sample + column;
  const float weight = __ldg(e.weight + action * e.ld_weight) * __ldg(e.gain.at(step)),
              time = __ldg(e.time.at(step));
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float old = sample[i];
    const float error = __ldg(e.previous + action * e.ld_previous + column + i) - (old - time * velocity[i]);
    x[i] = old + e.dt * (velocity[i] - weight * error);
    sample[i] = x[i];
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3]));
}

// As in spread.cuh: what the end needs is asked of the table before x is there, and the end has few branches.
template <int N>
__device__ __forceinline__ void split_phase(const Table& t, const Block& b, const Phase& p, int step,
                                            unsigned g, Carried& state, Watch& w) {
  const bool copies = t.parts & 4;
  const int thread = threadIdx.x, group = warp_index() / 4;
  const Share s = share_of(p, b.cta);
  const Shape shape = shape_of(t, p, b, s, 0, state);
  const Piece piece = piece_of(thread);
  const bool owner = owns(t.rows, b.rank) && (t.parts & 8), mine = owner && warp_index() < pieces(N) / 32;
  const int row = b.rank * 8 + piece.row, column = s.tile * N + piece.octet * 8 + piece.half * 4;
  const bool valid = mine && column < p.n && row < t.m;
  float4 add = read4(p.bias.at(step), column, valid, 0.0f);
  const float4 shift = read4(p.shift.at(step), column, valid, 0.0f);
  const float4 gate = read4(p.gate.at(step), column, valid, 1.0f);
  float4 next = read4(p.next.at(step), column, valid, 1.0f);
  if (p.next.p != nullptr)
    next.x += p.next_plus, next.y += p.next_plus, next.z += p.next_plus, next.w += p.next_plus;
  const int sources = kept(senders(p)), act = kept(p.act);
  const bool normed = kept(p.normed) != 0, euler = kept(p.kind == Kind::kEuler) != 0;
  const float scale = __int_as_float(kept(__float_as_int(p.scale)));
  const bool residual = kept(p.residual) != 0;
  Bits* const to = p.out + act_index(t.rows, row, column);
  const uint2* fixed = nullptr;  // of a row that the loop does not change
  if (!euler && valid && row < t.first && p.linear.fixed != nullptr)
    fixed = reinterpret_cast<const uint2*>(p.linear.fixed + row * p.linear.ld_fixed + column);
  // 16 lanes have a row of the first 64 columns, 4 a row of the others; a whole warp is of one kind
  float* squares_to = nullptr;
  if (p.squares_out != nullptr && mine && row < t.m && (thread & (group == 0 ? 15 : 3)) == 0)
    squares_to = p.squares_out + row * kSquareParts + square_part(thread, s.tile);
  if (owner && thread == 0) barrier_expect(b.sums(2), sources * 8 * N * 4);
  add.x += shift.x, add.y += shift.y, add.z += shift.z, add.w += shift.w;
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
    const float4 v = received_sum<N>(b.base + receive_at(t), piece, sources);
    float y[4] = {v.x, v.y, v.z, v.w};
    if (normed && valid) {
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
    const float a4[4] = {add.x, add.y, add.z, add.w}, g4[4] = {gate.x, gate.y, gate.z, gate.w};
    const float n4[4] = {next.x, next.y, next.z, next.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += a4[i];
    if (euler) {
      if (valid && row >= t.first) euler_step(t, p, step, row, column, y, to);
    } else {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] *= scale;
      if (act != static_cast<int>(Act::kNone)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = quick_act(y[i], act);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = y[i] * g4[i] + (residual ? state.residual[i] : 0.0f);
      if (fixed != nullptr) {
        const float2 low = unpack2(fixed->x), high = unpack2(fixed->y);
        y[0] = low.x, y[1] = low.y, y[2] = high.x, y[3] = high.y;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (valid) state.residual[i] = y[i];
        squares += y[i] * y[i];
        y[i] *= n4[i];
      }
      if (valid) *reinterpret_cast<uint2*>(to) = make_uint2(pack2(y[0], y[1]), pack2(y[2], y[3]));
      if (!valid) squares = 0.0f;
      squares += __shfl_xor_sync(0xffffffffu, squares, 1);
      squares += __shfl_xor_sync(0xffffffffu, squares, 2);
      if (group == 0) {
        squares += __shfl_xor_sync(0xffffffffu, squares, 4);
        squares += __shfl_xor_sync(0xffffffffu, squares, 8);
      }
      if (squares_to != nullptr) *squares_to = squares;
    }
  }
  finish(t, g, kConsumers);
}

}  // namespace vla::cuda::head
