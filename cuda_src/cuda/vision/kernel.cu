// The persistent vision encoder: launch, what the copy engine is told, terms.
#include "kernel.cuh"

#include <algorithm>
#include <cstring>

#include "../head/together.h"
#include "../large/tensor_map.h"
#include "vision.h"

namespace vla::cuda::vision {

namespace {

// A warp for each row of w.
__global__ void __launch_bounds__(128) fold_kernel(Term* to, const Matrix w, const Folded f) {
  const int row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= w.n) return;
  const bf16* from = reinterpret_cast<const bf16*>(w.data) + row * w.ld;
  float scaled = 0.0f, shifted = 0.0f;
  for (int k = threadIdx.x % 32; k < w.k; k += 32) {
    const float v = __bfloat162float(from[k]);
    scaled += (f.gamma[k] + f.plus) * v;
    if (f.beta) shifted += f.beta[k] * v;
  }
  scaled = warp_sum(scaled), shifted = warp_sum(shifted);
  if (threadIdx.x % 32 != 0) return;
  const float* bias = f.bias[row / f.part];
  to[row] = {scaled, shifted + (bias ? bias[row % f.part] : 0.0f)};
}
__global__ void __launch_bounds__(128) pair_up_kernel(Term* to, int n, const Folded f) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < n) to[i] = {f.bias[0] ? f.bias[0][i] : 0.0f, f.gamma ? f.gamma[i] + f.plus : 1.0f};
}

const bf16* values(const Bits* p) { return reinterpret_cast<const bf16*>(p); }

// What a warp stores at once: see staged_at().
template <int N>
cudaError_t out_map(CUtensorMap* map, const Bits* to, int rows, int cols, int64_t ld) {
  return N % 64 != 0 ? tensor_map_plain(map, values(to), rows, cols, ld, 16, N)
                     : tensor_map(map, values(to), rows, cols, ld, 16);
}

template <typename S>
cudaError_t make_maps(Params& p, const std::vector<Matrix>& weights) {
  const Table& t = p.t;
  constexpr int kRows = Of<S>::kRows;
  const int columns[kProducts] = {S::kQkv, S::kState, S::kFc1, S::kState};
  for (size_t i = 0; i < weights.size(); ++i) {
    const Matrix& w = weights[i];
    if (const cudaError_t error = tensor_map(&p.w[i], values(w.data), w.n, w.k, w.ld, columns[i % kProducts]);
        error != cudaSuccess)
      return error;
  }
  const int wide = 3 * t.width;
  constexpr int kFirst = Of<S>::kOwned * 8,
                kSecond = S::kState - kFirst;  // columns of either block of a pair
  for (const cudaError_t error :
       {tensor_map(&p.x, values(t.x), t.rows, t.width, t.width, kRows),
        tensor_map(&p.a, values(t.a), t.rows, t.width, t.width, kRows),
        tensor_map(&p.h, values(t.h), t.rows, t.mlp, t.mlp, kRows),
        tensor_map_heads(&p.heads, values(t.qkv), t.rows, 3 * t.heads, S::kHead, wide, 64),
        out_map<S::kQkv>(&p.qkv_out, t.qkv, t.rows, wide, wide),
        out_map<S::kFc1>(&p.h_out, t.h, t.rows, t.mlp, t.mlp),
        out_map<kFirst>(&p.x_out[0], t.x, t.rows, t.width, t.width),
        out_map<kSecond>(&p.x_out[1], t.x, t.rows, t.width, t.width),
        out_map<kFirst>(&p.last_out[0], t.last, t.rows, t.width, t.ld_last),
        out_map<kSecond>(&p.last_out[1], t.last, t.rows, t.width, t.ld_last)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename S>
int resident_blocks_of() {
  return head::resident_together(persistent_vision<S>, kPair, Of<S>::kThreads) * kPair;
}

template <typename S>
cudaError_t launch_of(const Params& p, cudaStream_t stream) {
  return head::launch_together(persistent_vision<S>, {p.t.ctas, kPair, Of<S>::kThreads, Of<S>::kShared},
                               p.t.counter, stream, p);
}

}  // namespace

int resident_blocks() { return std::min(resident_blocks_of<Pi>(), resident_blocks_of<Pi3>()); }

Encoder::Encoder() : params_(std::make_unique<Params>()) {}
Encoder::~Encoder() = default;

cudaError_t Encoder::make(const Table& t, const std::vector<Matrix>& weights) {
  std::memset(static_cast<void*>(params_.get()), 0, sizeof(Params));
  params_->t = t;
  return with_shape(t.shape, [&]<typename S>(S) { return make_maps<S>(*params_, weights); });
}

cudaError_t Encoder::launch(cudaStream_t stream) const {
  return with_shape(params_->t.shape, [&]<typename S>(S) { return launch_of<S>(*params_, stream); });
}

cudaError_t fold(Term* to, const Matrix& w, const Folded& from, cudaStream_t stream) {
  fold_kernel<<<divide_up(w.n, 4), 128, 0, stream>>>(to, w, from);
  return cudaGetLastError();
}
cudaError_t pair_up(Term* to, int n, const Folded& from, cudaStream_t stream) {
  pair_up_kernel<<<divide_up(n, 128), 128, 0, stream>>>(to, n, from);
  return cudaGetLastError();
}

}  // namespace vla::cuda::vision
