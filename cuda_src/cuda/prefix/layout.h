// Where everything of the persistent prefix lies: who owns which tile, and the order of bytes in global and
// shared memory. The kernel, the packing and the host's test share these functions.
//
// As in the persistent head a row of 64 bf16 columns ("chunk") is 128 bytes, swizzled as the matrix unit
// wants it, and activations are chunks one after another: [chunk][rows][128 bytes], rows padded to 8. Here
// the matrix unit's 64 rows are rows of W, its columns are rows of x: few blocks' worth of x rows is then no
// waste, and what a block waits for after a barrier is small.
#pragma once

#include "../head/layout.h"

namespace vla::cuda::prefix {

using head::act_index;
using head::Bits;
using head::divide_up;
using head::kChunk;
using head::kChunkBytes;
using head::kConsumers;
using head::kFeeder;
using head::kGroup;
using head::kLoader;
using head::kSharedOfBlock;
using head::kThreads;
using head::pad_to;

constexpr int kPair = 2;   // blocks of a cluster: they share k where it is split
constexpr int kHead = 64;  // columns of a head: a chunk
constexpr int kMaxPhases = 112;
constexpr int kMaxSlots = 12;   // of the ring
constexpr int kMaxStages = 32;  // of a tile: a lane of the feeding warp each
constexpr int kSquareParts =
    64;                          // of a row's sum of squares: four a tile of 64 columns; the others stay zero
constexpr int kMaxRows = 256;    // of x
constexpr int kSpareRows = 128;  // after an activation: tiles reach past its last row
constexpr int kUnitBytes = 16 * kGroup;          // what a warpgroup hands over of 8 rows of x
constexpr int kLeastExchange = 10 * kUnitBytes;  // what attention hands over
constexpr int kStages = 3;  // of a tile of attention: queries, keys and values of either warpgroup

// The tiles that the kernel is made for: rows of x that a block finishes of the hidden state; of a tile of q,
// k and v; of the gated product; keys of a warpgroup.
struct Sizes {
  int of[3];
};
constexpr Sizes kOwned{{16, 24, 32}}, kQkvRows{{24, 40, 64}}, kGatedRows{{40, 64, 96}}, kKeys{{64, 96, 128}};

// kPrepare: the rows as they come; kLinear: hidden state + x W^T; kProject: x W^T alone.
enum class Kind : int { kPrepare = 0, kQkv = 1, kAttention = 2, kLinear = 3, kGated = 4, kProject = 5 };

struct Phase {
  Kind kind;
  int group;            // begins when all blocks are done with the groups before
  int first_cta, ctas;  // blocks that have its tiles, in turn; those of a group's phases are apart
  int column_tiles, row_tiles;
  int rows;          // of x, of a tile; of keys of a warpgroup in attention
  int chunks;        // of k
  int split;         // kPair: the blocks of a pair have half of the chunks each; or 1
  int stage_chunks;  // of a stage of the ring
  int x_rows;        // padded rows of x
  int act;
  float eps, mean;  // of the norm of x; mean: 1 / columns
  const Bits* x;
  const Bits* w;  // [column tile][chunk][64, or 128 where gated][128 bytes]
  Bits* out;      // an activation; rows of ld_out where kProject
  int64_t ld_out;
  const float* next;  // weight of the norm that reads `out`
  float next_plus;
  int heads[2];             // qkv: of q; of k and of v
  Bits *cache_k, *cache_v;  // qkv: plain rows
  int64_t ld_k, ld_v;
};

struct Table {
  int phases, ctas, slots, slot;  // slot: bytes of one of the ring's
  int m, rows;                    // of x; padded to 8
  int owned;                      // rows of x that a block finishes of the hidden state
  int exchange;                   // bytes, of sums that are handed over
  int key_rows;                   // of a warpgroup in attention
  int heads_per_key;
  float scale;         // log2(e) / sqrt(head size)
  Bits *k, *v;         // [kv head][2 key_rows][128 bytes]
  float* squares;      // (kMaxRows, kSquareParts), of the hidden state
  const Bits* prefix;  // (m, width), plain rows
  int64_t ld_prefix;
  const float* rope;  // (rope_rows, 64): cosines, sines
  const int* positions;
  int64_t ld_rope, ld_positions;
  int rope_rows;
  const int *q_block, *k_block;  // or null
  int64_t ld_q_block, ld_k_block;
  unsigned* counter;  // head::kCounterWords, zero before a launch
  unsigned* report;   // see head/watch.cuh
  int64_t* stamps;    // (phases, 4) clocks of block 0, or null
  int64_t patience;   // nanoseconds that a wait may take
  Phase phase[kMaxPhases];
};
static_assert(sizeof(Table) <= 32764, "a kernel's parameters");

VLA_HD bool is_product(const Phase& p) { return p.kind != Kind::kAttention && p.kind != Kind::kPrepare; }
// The hidden state's own: a block finishes the same rows and columns of it in each, in registers.
VLA_HD bool owns_state(const Phase& p) { return p.kind == Kind::kLinear || p.kind == Kind::kPrepare; }
VLA_HD int tile_rows(const Phase& p) { return p.kind == Kind::kGated ? 128 : 64; }  // of W

// ---- who does what
VLA_HD int tiles_of(const Phase& p) { return p.column_tiles * p.row_tiles; }
// Number of the first tile of a block, tiles_of() or more where it has none; the others are p.ctas apart.
VLA_HD int first_tile(const Phase& p, int cta) {
  const int i = cta - p.first_cta;
  if (i < 0 || i >= p.ctas) return tiles_of(p);
  return p.split == kPair ? i / kPair : i;
}
VLA_HD bool takes_part(const Phase& p, int cta) { return first_tile(p, cta) < tiles_of(p); }
// Column tile, first row of x, and the chunks [first, last) of k. The blocks of a pair have the same columns
// of the hidden state, and neighbouring rows.
struct Tile {
  int column, row, first, last;
  VLA_HD int chunks() const { return last - first; }
};
VLA_HD Tile tile_at(const Phase& p, int tile, int cta) {
  Tile t{tile % p.column_tiles, tile / p.column_tiles * p.rows, 0, p.chunks};
  if (p.kind == Kind::kAttention) t.row = tile / p.column_tiles * 64;
  if (owns_state(p) && p.split == 1) {
    t.column = tile / kPair % p.column_tiles;
    t.row = (tile / kPair / p.column_tiles * kPair + tile % kPair) * p.rows;
  }
  if (p.split == kPair) {
    const int half = divide_up(p.chunks, kPair);
    t.first = cta % kPair * half, t.last = t.first + half < p.chunks ? t.first + half : p.chunks;
  }
  return t;
}
VLA_HD int stages_of(const Phase& p, const Tile& t) {
  return p.kind == Kind::kPrepare     ? 0
         : p.kind == Kind::kAttention ? kStages
                                      : divide_up(t.chunks(), p.stage_chunks);
}
// Where x begins in a slot, behind the weights.
VLA_HD int x_in_slot(const Phase& p) { return p.stage_chunks * tile_rows(p) * kChunkBytes; }
VLA_HD int chunks_of_stage(const Phase& p, const Tile& t, int stage) {
  const int left = t.chunks() - stage * p.stage_chunks;
  return left < p.stage_chunks ? left : p.stage_chunks;
}
// Where the ring stands: every tile begins with slot 0, so that the blocks of a pair agree on the slots; a
// bit for each says which parity its next use has.
struct Ring {
  unsigned parities = 0;
  VLA_HD int parity(int slot, int turn) const { return static_cast<int>(parities >> slot & 1) ^ (turn & 1); }
  VLA_HD void use(int stages, int slots) {
    if (stages / slots % 2) parities ^= (1u << slots) - 1;
    parities ^= (1u << stages % slots) - 1;
  }
};
// Whether both blocks of a pair have the same rows of x in their first tiles: then either has half of them
// copied, for both, into the stages that have a slot from the start.
VLA_HD bool shares_x(const Phase& p, int cta) {
  const int mine = first_tile(p, cta), other = first_tile(p, cta ^ 1);
  return is_product(p) && p.split == 1 && mine < tiles_of(p) && other < tiles_of(p) &&
         tile_at(p, mine, cta).row == tile_at(p, other, cta ^ 1).row;
}
VLA_HD int half_rows(int rows) { return pad_to(rows / 2, 8); }  // that the first block has copied

// Elements of W before a stage's.
VLA_HD int64_t weights_at(const Phase& p, const Tile& t, int stage) {
  return (static_cast<int64_t>(t.column) * p.chunks + t.first + stage * p.stage_chunks) * tile_rows(p) *
         kChunk;
}

// ---- packed weights: which row of which matrix row r of a column tile is
// A head's number among those of q (part 0), of k (1) or of v (2).
struct HeadOf {
  int part, head;
};
VLA_HD HeadOf head_of(const int* heads, int tile) {
  if (tile < heads[0]) return {0, tile};
  if (tile < heads[0] + heads[1]) return {1, tile - heads[0]};
  return {2, tile - heads[0] - heads[1]};
}
struct SourceRow {
  int part, row;
};
// In units of 16 rows, a warp's: two groups of 8 that a thread has side by side, the halves of a head, or
// gate and up.
VLA_HD SourceRow source_row(Kind kind, const int* heads, int tile, int r) {
  const int unit = r / 16, second = r % 16 / 8;
  if (kind == Kind::kGated) return {second, tile * 64 + unit * 8 + r % 8};
  if (kind != Kind::kQkv) return {0, tile * 64 + r};
  const HeadOf of = head_of(heads, tile);
  return {of.part - (heads[0] == 0), of.head * kHead + second * (kHead / 2) + unit * 8 + r % 8};
}
// Row of large/linear.cu's packing: of part `part` of a stacked weight of n[0], n[1], ... rows, or of two
// that alternate by 32.
VLA_HD int packed_row(const int* n, int part, int row, bool interleaved) {
  if (interleaved) return row / 32 * 64 + part * 32 + row % 32;
  for (int i = 0; i < part; ++i) row += n[i];
  return row;
}

// ---- sums between warpgroups and between the blocks of a pair. Of the units of 8 rows of x that a block
// finishes, the first warpgroup takes the first half, rounded up.
VLA_HD constexpr int units_first(int units) { return (units + 1) / 2; }
// Bytes from the exchange's begin where unit `unit` of warpgroup `group` of the other block arrives.
VLA_HD int received_at(int units, int group, int unit) { return (units * (1 + group) + unit) * kUnitBytes; }

// ---- shared memory: [ring][exchange][1 / rms of a tile's rows][blocks of keys][barriers]
constexpr int kBarriers = 2 * kMaxSlots + 1;
constexpr int kInverseBytes = 128 * 4, kKeyBlockBytes = kMaxRows * 4;
inline int shared_bytes(const Table& t) {
  return t.slots * t.slot + t.exchange + kInverseBytes + kKeyBlockBytes + kBarriers * 8;
}

}  // namespace vla::cuda::prefix
