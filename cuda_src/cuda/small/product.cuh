// The product of few rows, y (m, n) = norm(x) W^T with m <= 64: what its kernel is told.
#pragma once

#include "../common.cuh"

namespace vla::cuda::small {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlockRows = 32;  // rows of W (columns of y) a warp handles
constexpr int kMaxWn = 4;       // warps along n
constexpr int kDepth = 6;       // weight tiles in flight a warp
constexpr int kMaxCluster = 8;  // portable cluster size

enum class Mode : int { kLinear, kGated, kQkv, kEuler };

// One output: columns of y that go to one place.
struct Part {
  void* out = nullptr;
  const float* bias = nullptr;
  int64_t ld = 0;
  int first = 0;  // first block of kBlockRows rows of W
  int n = 0;      // columns, without padding
};

struct Args {
  const void* x = nullptr;
  int64_t ldx = 0;
  int m = 0, k = 0;
  bool x_f32 = false;
  bool x_whole = false;      // x is bf16 and can be read 16 bytes at a time, to the end of its rows
  bool norm_vector = false;  // the norm's weight and bias can be read 16 bytes at a time
  NormKind norm = NormKind::kNone;
  float eps = 0.0f, plus = 0.0f;
  const float* norm_weight = nullptr;
  const float* norm_bias = nullptr;
  const uint4* w = nullptr;
  int blocks = 0, k_tiles = 0;  // of W: blocks of 32 rows, tiles of 16 columns
  // see Launch: sums of squares of the rows of x and of y, norm_bias W^T
  const float* squares_in = nullptr;
  float* squares_out = nullptr;
  int square_parts = 0;
  const float* shift = nullptr;
  bool norm_constant = false;
  // the split of the work: `wn` warps along n, kWarps / wn along k, `split` thread blocks (a cluster) along k
  int wn = 1, split = 1, tiles = 0;  // tiles: k tiles of one thread block
  int own = 0, own_inverse = 0;      // rows a block of the cluster finishes; r / own = r * own_inverse >> 16
  int half = 0,
      half_shift = 0;  // > 0: warps work in pairs of blocks half = 1 << half_shift apart (rotary halves)
  Mode mode = Mode::kLinear;
  Part part[3];
  int parts = 1;
  int rotate = 0;  // parts below this index get the rotary embedding
  bool out_f32 = false;
  int row0 = 0;  // row of the whole operation that row 0 here is
  // linear
  const void* residual = nullptr;
  int64_t ld_residual = 0;
  int residual_rows = 1;
  bool residual_f32 = false;
  const float* gate = nullptr;
  Act act = Act::kNone;
  float scale = 1.0f;
  // qkv
  const float* rope = nullptr;
  int64_t ld_rope = 0;
  int rope_rows = 1;
  const int* positions = nullptr;
  int64_t ld_positions = 0;
  // euler
  float* sample = nullptr;
  const float* previous = nullptr;
  const float* weight = nullptr;
  const float* gain = nullptr;
  const float* time = nullptr;
  int64_t ld_sample = 0, ld_previous = 0, ld_weight = 0;
  float dt = 0.0f;
};

// Shared memory of a block, in bytes from its start. The mainloop's x and weight ring give way to the partial
// sums (one tile a warp) and what the cluster's other blocks send.
struct Shape {
  int rows;      // of x in shared memory: m, the norm's bias, padding to 8
  int x_stride;  // bytes; an odd number of 16-byte units, so ldmatrix has no bank conflicts
  int ring;      // offset of the weight ring
  int partial;   // offset of the partial sums: [warp][rows][kPitch]
  int received;  // offset of received sums: [split][own + 1][32 * wn]
  int squares;   // offset of received sums of squares: [split][own]; never shared with anything else
  int own;       // rows of y a block of the cluster finishes
  int bytes;
};
constexpr int kPitch = 36;  // floats from one row of a partial tile to the next: no bank conflicts

inline __host__ __device__ Shape shape_of(int mt, int own, int wn, int split, int tiles) {
  Shape s;
  s.rows = 8 * mt;
  s.x_stride = tiles * 32 + 16;
  s.own = own;
  s.ring = round_up(s.rows * s.x_stride, 128);
  const int mainloop = s.ring + kWarps * kDepth * 1024;
  s.partial = 0;
  s.received = round_up(kWarps * s.rows * kPitch * 4, 128);
  const int reduction = s.received + split * (s.own + 1) * 32 * wn * 4;
  s.squares = round_up(mainloop > reduction ? mainloop : reduction, 128);
  s.bytes = s.squares + (split * s.own + 2 * s.rows) * 4;
  return s;
}

// What an operation asks of the kernel, for its rows [row0, row0 + rows); the split is left open.
Args arguments(const Linear& op, int step, int row0, int rows);
Args arguments(const GatedLinear& op, int step, int row0, int rows);
Args arguments(const Qkv& op, int step, int row0, int rows);
Args arguments(const Euler& op, int step, int row0, int rows);

// Rotary embedding of q or k, after a product that could not do it.
bool rotates(int head_dim);
cudaError_t run_rotate(const View& x, const Qkv& op, const Launch& at);

// Tiles of 8 rows of x that the kernel is compiled for.
int row_tiles(const Args& a);
// Sets the split to (wn, split); false where it does not fit this device.
bool set_split(Args& a, int wn, int split, const Launch& at);
// Sets the split that should be fastest; false where there is none.
bool choose_split(Args& a, const Launch& at);
cudaError_t run_product(const Args& a, const Launch& at);

// The same for the kernel on Hopper's matrix unit (product_sm90.cu). g: 64 or 128 columns a thread block.
bool fits_sm90(const Args& a, const Launch& at);
bool set_split_sm90(Args& a, int g, int split);
bool choose_split_sm90(Args& a, const Launch& at);
cudaError_t run_product_sm90(Args& a, const Launch& at);

}  // namespace vla::cuda::small
