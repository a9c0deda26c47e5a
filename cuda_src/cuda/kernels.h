// The CUDA launchers: one per operation and size class, all with the same shape. No CUDA syntax in here.
//
// Small: products of up to 64 rows and attention of up to 64 queries a batch element (the denoising loop).
// Large: everything else (vision, prefix). dispatch.cu picks once, when a plan is captured; a launcher is
// called only then (its work is replayed as a graph), so it may do slow things on the host, but not allocate
// or wait.
//
// Rules for every kernel: read and write planned memory only after pdl_wait() (weights may be read before
// it); every block executes pdl_wait(); sums in an order that does not change from call to call.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "../ops/ops.h"

namespace vla::cuda {

struct Launch {
  cudaStream_t stream = nullptr;
  int step = 0;                  // iteration of the loop: View::at(step)
  int sms = 0;                   // multiprocessors
  int arch = 0;                  // 10 * major + minor of the device
  bool pdl = false;              // the launch before this one in the stream is a kernel of ours
  std::byte* scratch = nullptr;  // scratch_bytes, 256-byte aligned, shared by all launches of the stream
  size_t scratch_bytes = 0;
  // Attention in the loop: rows of k and v, from the first, that were written before the loop's first kernel
  // began and that no kernel of the loop writes. They, and the blocks if this is not 0, may be read before
  // pdl_wait().
  int stable_keys = 0;
  // Small products with an RMS norm. squares (kSmallRows, kSquareParts): room for the sums of squares of x's
  // rows, squares_in: the same where the launch before has put them there, as square_parts parts a row;
  // squares_out: where to put those of what a Linear writes; null: nowhere.
  float* squares = nullptr;
  const float* squares_in = nullptr;
  float* squares_out = nullptr;
  int square_parts = 0;
  // norm.bias W^T in the order of W's packed rows, see make_shift; null: not known.
  const float* shift = nullptr;
  bool norm_constant = false;  // norm.weight was written before the plan was made
};
constexpr int kSquareParts = 64;

constexpr int kSmallRows = 64;
// Longer sums than these, such as SmolVLA's connector over one camera (64 rows of 12288), are for the large
// kernels whatever the rows: a block of the small ones has no room for so much of x.
constexpr int kLongestSmall = 4096;

// ---- packed weights
// ------------------------------------------------------------------------------------------- kFragments
// (small): see small/pack.cu. kRows (large): see large/pack.cu.
enum class Layout : int { kFragments = 0, kRows = 1 };

// A part of a weight as it comes from the checkpoint, already in device memory: (n, k) row-major, `ld`
// elements.
struct RawMatrix {
  const void* data = nullptr;
  DType dtype = DType::kBF16;
  int n = 0, k = 0;
  int64_t ld = 0;
};

// Bytes of the packed bf16 weight, and the packing itself (all of `to` is written, padding as zeros).
size_t packed_bytes_small(Packing packing, const std::vector<int>& n, int k);
size_t packed_bytes_large(Packing packing, const std::vector<int>& n, int k);
cudaError_t pack_small(void* to, Packing packing, const std::vector<RawMatrix>& parts, cudaStream_t stream);
cudaError_t pack_large(void* to, Packing packing, const std::vector<RawMatrix>& parts, cudaStream_t stream);

// The same in E4M3 with scales, for the large products.
size_t packed_bytes_e4m3(Packing packing, const std::vector<int>& n, int k);
cudaError_t pack_e4m3(void* to, Packing packing, const std::vector<RawMatrix>& parts, cudaStream_t stream);

// ---- small (m <= 64): weights are kFragments
// ------------------------------------------------------------------
cudaError_t launch_small(const Linear& op, const Launch& at);
cudaError_t launch_small(const GatedLinear& op, const Launch& at);
cudaError_t launch_small(const Qkv& op, const Launch& at);
cudaError_t launch_small(const Attention& op, const Launch& at);  // q rows / batch <= 64
cudaError_t launch_small(const Euler& op, const Launch& at);

// Whether a Linear leaves the sums of squares of what it writes in Launch::squares_out, and in how many parts
// a row.
int small_square_parts(const Linear& op, const Launch& at);

// Rows of a kFragments weight with their padding, and bias W^T in their order for `steps` rows of norm
// biases: bias (steps, k) f32 to shift (steps, packed_rows_small).
int packed_rows_small(const Weight& w);
cudaError_t make_shift(const View& bias, int steps, const Weight& w, float* shift, const Launch& at);

// ---- large (any m): weights are kRows
// -------------------------------------------------------------------------
cudaError_t launch_large(const Linear& op, const Launch& at);
cudaError_t launch_large(const GatedLinear& op, const Launch& at);
cudaError_t launch_large(const Qkv& op, const Launch& at);
cudaError_t launch_large(const Attention& op, const Launch& at);
cudaError_t launch(const ImagePatches& op, const Launch& at);
cudaError_t launch(const SpaceToDepth& op, const Launch& at);
cudaError_t launch(const Embed& op, const Launch& at);

// Scratch that a large launcher needs for this operation (0 where none). Small launchers need none.
size_t scratch_large(const Op& op, int sms);

// Why this operation cannot run here (an empty string when it can): asked before anything is launched.
std::string refuse_small(const Op& op);
std::string refuse_large(const Op& op);

}  // namespace vla::cuda
