// Attention of few queries (m <= 64) over some hundreds of keys, the keys shared out over a cluster.
//
// out (batch * m, heads * d) = softmax(q k^T / sqrt(d) + mask) v. The query heads that share a key head are
// stacked: row r = g * m + i is query i of the group's head g. A cluster takes kRows of those rows; each of
// its blocks takes a range of keys, in chunks that fit shared memory, with a running maximum (Milakov and
// Gimelshein 2018). The blocks then send their sums (rows, d), maxima and denominators to the block that
// finishes the row, which adds them in rank order. q k^T and p v are on the matrix unit, p as bfloat16.
#include <climits>

#include "../common.cuh"

namespace vla::cuda {

namespace small {

namespace {

constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kMaxSplit = 8;                                    // a power of two
constexpr int max_chunk(int d) { return d > 128 ? 128 : 256; }  // keys at a time

struct AttentionArgs {
  const bf16 *q = nullptr, *k = nullptr, *v = nullptr;
  const int *q_block = nullptr, *k_block = nullptr;
  bf16* out = nullptr;
  int64_t ld_q = 0, ld_k = 0, ld_v = 0, ld_out = 0, ld_q_block = 0, ld_k_block = 0;
  int m = 0, n = 0, group = 1;  // queries, keys of a batch element; query heads a key head
  int split = 1, keys = 0,
      chunk = 0;      // blocks of the cluster; keys of a block; keys at a time (multiple of 16)
  int stable = 0;     // keys that may be read early
  int m_inverse = 0;  // r / m = r * m_inverse >> 20
  int row_tiles = 1, own_shift = 0;  // tiles of kRows rows a key head; kRows / split = 1 << own_shift
  float scale = 1.0f;
};

template <int D, int kRows>
struct AttentionShape {
  static constexpr int kDepth = round_up(D, 16);  // d in shared memory, zero-filled
  static constexpr int kStride = kDepth + 8;      // bf16: odd number of 16-byte units
  int k, v, scores, probabilities, state, received, bytes;
  int own;  // rows a block finishes, a power of two

  __host__ __device__ AttentionShape(int chunk, int split) {
    own = kRows / split;
    k = kRows * kStride * 2;
    v = k + chunk * kStride * 2;
    scores = v + chunk * kStride * 2;
    probabilities = scores + kRows * (chunk + 4) * 4;
    const int mainloop = round_up(probabilities + kRows * (chunk + 8) * 2, 128);
    received = 0;  // over q, k and v, when all blocks are done with them: [split][own][D]
    const int reduction = split * own * D * 4;
    state = round_up(mainloop > reduction ? mainloop : reduction, 128);
    // maximum, denominator, rescaling, block of each row; received maxima and denominators [split][own]; key
    // blocks
    bytes = state + (4 * kRows + 2 * split * own + chunk) * 4;
  }
};

// Rows [first, last) of `from` (D columns) to shared memory, zeros from `rows` on and up to kDepth columns.
template <int D>
__device__ __forceinline__ void stage(std::byte* to, const bf16* from, int ld, int first, int last,
                                      int rows) {
  constexpr int kChunks = round_up(D, 16) / 8, kStride = (round_up(D, 16) + 8) * 2;
  if constexpr (kAttentionThreads % kChunks == 0) {
    constexpr int kRowsAtOnce = kAttentionThreads / kChunks;  // a thread keeps its column
    const int c = static_cast<int>(threadIdx.x) % kChunks;
    int row = first + static_cast<int>(threadIdx.x) / kChunks;
    uint32_t at = smem_address(to) + row * kStride + c * 16;
    const bf16* source = from + row * ld + c * 8;
#pragma unroll 2
    for (; row < last; row += kRowsAtOnce) {
      cp_async16_or_zero(at, row < rows ? source : from, row < rows ? 16 : 0);
      at += kRowsAtOnce * kStride;
      source += kRowsAtOnce * ld;
    }
  } else {
    for (int i = first * kChunks + static_cast<int>(threadIdx.x); i < last * kChunks;
         i += kAttentionThreads) {
      const int row = i / kChunks, c = i % kChunks;
      const bool in = row < rows && c * 8 < D;
      cp_async16_or_zero(smem_address(to + row * kStride + c * 16), in ? from + row * ld + c * 8 : from,
                         in ? 16 : 0);
    }
  }
}

// Sends row `row`'s numbers to the block that finishes it.
struct Owner {
  int rank, local;
  __device__ Owner(int row, int own_shift) : rank(row >> own_shift), local(row & ((1 << own_shift) - 1)) {}
};

template <int D, int kRows>
__global__ void __launch_bounds__(kAttentionThreads) attention(const __grid_constant__ AttentionArgs a) {
  extern __shared__ __align__(128) std::byte smem[];
  using Shape = AttentionShape<D, kRows>;
  constexpr int kStride = Shape::kStride, kDepth = Shape::kDepth;
  constexpr int kRowTiles = kRows / 16, kGroups = kAttentionWarps / kRowTiles;
  constexpr int kTiles = ceil_div(D / 8, kGroups);       // tiles of 8 columns of the output a warp has
  constexpr int kKeyTiles = max_chunk(D) / 8 / kGroups;  // tiles of 8 keys of a chunk a warp has, at most
  constexpr int kLanes = kAttentionThreads / kRows;      // lanes that share a row's softmax
  const Shape s(a.chunk, a.split);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int rank = block_rank(), tile = cluster_index();
  const int kv_head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
  const int rows = a.m * a.group, row0 = tile * kRows;
  const int key0 = rank * a.keys, key_end = min(a.n, key0 + a.keys);
  const bf16* k = a.k + static_cast<int64_t>(batch) * a.n * a.ld_k + kv_head * D;
  const bf16* v = a.v + static_cast<int64_t>(batch) * a.n * a.ld_v + kv_head * D;
  const int ld_k = static_cast<int>(a.ld_k), ld_v = static_cast<int>(a.ld_v);
  float* scores = reinterpret_cast<float*>(smem + s.scores);
  bf16* probabilities = reinterpret_cast<bf16*>(smem + s.probabilities);
  float* top = reinterpret_cast<float*>(smem + s.state);
  float *denominator = top + kRows, *rescale = denominator + kRows;
  int* row_block = reinterpret_cast<int*>(rescale + kRows);
  float *received_top = rescale + 2 * kRows, *received_denominator = received_top + kRows;
  int* key_block = reinterpret_cast<int*>(received_denominator + kRows);
  const int score_pitch = a.chunk + 4, p_pitch = a.chunk + 8;

  const auto block_of_key = [&](int j, int start, int count) {
    return j >= count ? INT_MAX : a.k_block != nullptr ? a.k_block[(start + j) * a.ld_k_block] : INT_MIN + 1;
  };
  const auto head_and_query = [&](int r) {
    const int head = r * a.m_inverse >> 20;
    return make_int2(head, r - head * a.m);
  };
  const auto block_of_row = [&](int row) {
    const int r = row0 + row;  // a row past the end sees nothing
    return r >= rows              ? INT_MIN
           : a.q_block != nullptr ? a.q_block[head_and_query(r).y * a.ld_q_block]
                                  : INT_MAX - 1;
  };
  // what no kernel of the loop writes is on its way while the kernel before this one ends
  const int first_count = max(0, min(a.chunk, key_end - key0));
  const int early = max(0, min(first_count, a.stable - key0));
  if (early > 0) {
    stage<D>(smem + s.k, k + key0 * a.ld_k, ld_k, 0, early, first_count);
    stage<D>(smem + s.v, v + key0 * a.ld_v, ld_v, 0, early, first_count);
  }
  if (a.stable > 0) {
#pragma unroll 1
    for (int j = threadIdx.x; j < round_up(first_count, 16); j += kAttentionThreads) {
      key_block[j] = block_of_key(j, key0, first_count);
    }
    if (threadIdx.x < kRows) row_block[threadIdx.x] = block_of_row(threadIdx.x);
  }
  pdl_trigger();
  pdl_wait();
#pragma unroll
  for (int i = 0; i < kRows / kAttentionWarps; ++i) {
    const int row = warp + i * kAttentionWarps, r = row0 + row;
    const int2 at = head_and_query(r);
    const bf16* from =
        a.q + (static_cast<int64_t>(batch) * a.m + at.y) * a.ld_q + (kv_head * a.group + at.x) * D;
    if (lane < kDepth / 8) {
      const bool in = r < rows && lane * 8 < D;
      cp_async16_or_zero(smem_address(smem + row * kStride * 2 + lane * 16), in ? from + lane * 8 : a.q,
                         in ? 16 : 0);
    }
  }
  if (threadIdx.x < kRows) {
    top[threadIdx.x] = -INFINITY;
    denominator[threadIdx.x] = 0.0f;
    if (a.stable == 0) row_block[threadIdx.x] = block_of_row(threadIdx.x);
  }
  float acc[kTiles][4] = {};
  const int row_tile = warp % kRowTiles, part = warp / kRowTiles;

#pragma unroll 1
  for (int start = key0; start < key_end; start += a.chunk) {
    const int count = min(a.chunk, key_end - start), padded = round_up(count, 16);
    const int here = start == key0 ? early : 0;  // rows that are there or on their way
    stage<D>(smem + s.k, k + start * a.ld_k, ld_k, here, padded, count);
    cp_async_commit();
    stage<D>(smem + s.v, v + start * a.ld_v, ld_v, here, padded, count);
    cp_async_commit();
    if (start != key0 || a.stable == 0) {
      for (int j = threadIdx.x; j < padded; j += kAttentionThreads)
        key_block[j] = block_of_key(j, start, count);
    }
    cp_async_wait<1>();
    __syncthreads();

    // scores: 16 rows by up to kKeyTiles tiles of 8 keys, together to hide the matrix unit's latency
    {
      float c[kKeyTiles][4] = {};
      const uint32_t q_at = smem_address(smem) + ((row_tile * 16 + lane % 16) * kStride + lane / 16 * 8) * 2;
      const uint32_t k_at = smem_address(smem + s.k) + ((part * 8 + lane % 8) * kStride + lane / 8 * 8) * 2;
#pragma unroll
      for (int d = 0; d < kDepth; d += 32) {
        uint32_t q0[4], q1[4];
        ldmatrix_x4(q0, q_at + d * 2);
        if (d + 32 <= kDepth) ldmatrix_x4(q1, q_at + d * 2 + 32);
#pragma unroll
        for (int i = 0; i < kKeyTiles; ++i) {
          if ((part + i * kGroups) * 8 < padded) {
            const uint32_t at = k_at + (i * kGroups * 8 * kStride + d) * 2;
            if (d + 32 <= kDepth) {
              uint32_t kf[4];
              ldmatrix_x4(kf, at);
              mma_16816(c[i], q0, kf[0], kf[1]);
              mma_16816(c[i], q1, kf[2], kf[3]);
            } else {
              uint32_t kf[2];
              ldmatrix_x2(kf, lane < 16 ? at : k_at);
              mma_16816(c[i], q0, kf[0], kf[1]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kKeyTiles; ++i) {
        const int t = part + i * kGroups;
        if (t * 8 < padded) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int row = row_tile * 16 + lane / 4 + j / 2 * 8, key = t * 8 + lane % 4 * 2 + j % 2;
            scores[row * score_pitch + key] =
                key_block[key] <= row_block[row] ? c[i][j] * a.scale : -INFINITY;
          }
        }
      }
    }
    __syncthreads();

    // softmax of this chunk: kLanes neighbours share a row
    {
      const int row = threadIdx.x / kLanes, first = threadIdx.x % kLanes;
      const float before = top[row];
      float largest = before;
#pragma unroll 4
      for (int j = first; j < padded; j += kLanes) largest = fmaxf(largest, scores[row * score_pitch + j]);
#pragma unroll
      for (int o = kLanes / 2; o > 0; o >>= 1)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
      const float base = largest == -INFINITY ? 0.0f : largest;
      float sum = 0.0f;
#pragma unroll 4
      for (int j = first; j < padded; j += kLanes) {
        const float p = __expf(scores[row * score_pitch + j] - base);
        probabilities[row * p_pitch + j] = __float2bfloat16(p);
        sum += p;
      }
#pragma unroll
      for (int o = kLanes / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
      if (first == 0) {
        const float factor = __expf(before - base);
        rescale[row] = factor;
        denominator[row] = denominator[row] * factor + sum;
        top[row] = largest;
      }
    }
    cp_async_wait<0>();
    __syncthreads();

    // acc = acc * rescale + p v
    const float low = rescale[row_tile * 16 + lane / 4], high = rescale[row_tile * 16 + lane / 4 + 8];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) acc[j][0] *= low, acc[j][1] *= low, acc[j][2] *= high, acc[j][3] *= high;
#pragma unroll 4
    for (int key = 0; key < padded; key += 16) {
      uint32_t p[4];
      ldmatrix_x4(p,
                  smem_address(probabilities + (row_tile * 16 + lane % 16) * p_pitch + key + lane / 16 * 8));
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int column = (part * kTiles + j) * 8;
        if (column < D) {
          uint32_t vf[2];
          ldmatrix_x2_t(vf, smem_address(smem + s.v) + ((key + lane % 16) * kStride + column) * 2);
          mma_16816(acc[j], p, vf[0], vf[1]);
        }
      }
    }
    __syncthreads();
  }

  // Hand over: the block that finishes row r has rank r / own.
  cp_async_wait<0>();
  if (a.split > 1) cluster_arrive();
  __syncthreads();
  if (a.split > 1) cluster_wait();
  const uint32_t received = smem_address(smem + s.received);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Owner owner(row_tile * 16 + lane / 4 + 8 * h, a.own_shift);
    const uint32_t at = cluster_address(received + (rank * s.own + owner.local) * D * 4, owner.rank);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int column = (part * kTiles + j) * 8 + lane % 4 * 2;
      if (column < D) cluster_store2(at + column * 4, acc[j][2 * h], acc[j][2 * h + 1]);
    }
  }
  if (threadIdx.x < kRows) {
    const Owner owner(threadIdx.x, a.own_shift);
    const int at = rank * s.own + owner.local;
    cluster_store(cluster_address(smem_address(received_top + at), owner.rank), top[threadIdx.x]);
    cluster_store(cluster_address(smem_address(received_denominator + at), owner.rank),
                  denominator[threadIdx.x]);
  }
  if (a.split > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  const float* sums = reinterpret_cast<const float*>(smem + s.received);
#pragma unroll 1
  for (int i = threadIdx.x; i < s.own * (D / 2); i += kAttentionThreads) {
    const int local = i / (D / 2), c = i % (D / 2) * 2, r = row0 + rank * s.own + local;
    if (r >= rows) continue;
    float largest = -INFINITY, total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
    for (int b = 0; b < kMaxSplit; ++b) {
      if (b < a.split) largest = fmaxf(largest, received_top[b * s.own + local]);
    }
#pragma unroll
    for (int b = 0; b < kMaxSplit; ++b) {
      if (b < a.split) {
        const float t = received_top[b * s.own + local];
        const float factor = t == -INFINITY ? 0.0f : __expf(t - largest);
        total += factor * received_denominator[b * s.own + local];
        const float2 v2 = *reinterpret_cast<const float2*>(sums + (b * s.own + local) * D + c);
        x += factor * v2.x, y += factor * v2.y;
      }
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    const int head = r / a.m, query = r - head * a.m;
    bf16* out =
        a.out + (static_cast<int64_t>(batch) * a.m + query) * a.ld_out + (kv_head * a.group + head) * D + c;
    *reinterpret_cast<uint32_t*>(out) = pack2(x * inverse, y * inverse);
  }
}

template <int D, int kRows>
cudaError_t run_attention(AttentionArgs a, int kv_heads, int batch, const Launch& at) {
  a.row_tiles = ceil_div(a.m * a.group, kRows);
  const int largest = at.arch == 90 || at.arch == 100 ? 227 * 1024 : at.arch == 80 ? 163 * 1024 : 99 * 1024;
  // as many blocks as there are multiprocessors, each with at least as many keys as make up for adding the
  // sums; a power of two, so rows divide evenly
  constexpr int kFewest = D > 128 ? 64 : 256;
  a.split = 1, a.own_shift = kRows == 32 ? 5 : 4, a.m_inverse = ceil_div(1 << 20, a.m);
  while (at.arch >= 90 && a.split < kMaxSplit && a.n > a.split * kFewest &&
         2 * a.split * a.row_tiles * kv_heads * batch <= at.sms + at.sms / 8) {
    a.split *= 2, --a.own_shift;
  }
  a.keys = round_up(ceil_div(a.n, a.split), 8);
  a.chunk = round_up(a.keys, 16);
  if (a.chunk > max_chunk(D)) a.chunk = max_chunk(D);
  while (a.chunk > 16 && AttentionShape<D, kRows>(a.chunk, a.split).bytes > largest) a.chunk -= 16;
  const AttentionShape<D, kRows> shape(a.chunk, a.split);
  const dim3 grid(static_cast<unsigned>(a.row_tiles * a.split), static_cast<unsigned>(kv_heads),
                  static_cast<unsigned>(batch));
  return launch_kernel(attention<D, kRows>, grid, kAttentionThreads, shape.bytes, at, a.split, a);
}

}  // namespace
}  // namespace small

cudaError_t launch_small(const Attention& op, const Launch& at) {
  small::AttentionArgs a;
  a.q = op.q.at<const bf16>(at.step), a.k = op.k.at<const bf16>(at.step), a.v = op.v.at<const bf16>(at.step);
  a.ld_q = op.q.ld, a.ld_k = op.k.ld, a.ld_v = op.v.ld;
  if (op.q_block) {
    a.q_block = op.q_block.at<const int>(at.step), a.k_block = op.k_block.at<const int>(at.step);
    a.ld_q_block = op.q_block.ld, a.ld_k_block = op.k_block.ld;
  }
  a.out = op.out.at<bf16>(at.step), a.ld_out = op.out.ld;
  a.m = op.q.rows / op.batch, a.n = op.k.rows / op.batch;
  const int kv_heads = op.k.cols / op.head_dim;
  a.group = op.q.cols / op.k.cols;
  a.stable = op.batch == 1 ? at.stable_keys : 0;
  a.scale = 1.0f / sqrtf(static_cast<float>(op.head_dim));
  const bool few = a.m * a.group * kv_heads * op.batch < 128;
  switch (op.head_dim) {
    case 64:
      return small::run_attention<64, 16>(a, kv_heads, op.batch, at);
    case 72:
      return small::run_attention<72, 16>(a, kv_heads, op.batch, at);
    case 128:
      return small::run_attention<128, 16>(a, kv_heads, op.batch, at);
    case 256:
      return few ? small::run_attention<256, 16>(a, kv_heads, op.batch, at)
                 : small::run_attention<256, 32>(a, kv_heads, op.batch, at);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace vla::cuda
