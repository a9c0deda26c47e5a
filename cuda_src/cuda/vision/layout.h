// Where everything of the persistent vision encoder lies, and who does what: tiles, stages of the ring,
// shared memory. The kernel, the table and the host's test share these functions.
//
// A layer is five phases: q, k and v; attention; out; fc1; fc2. Activations lie in memory as plain rows,
// which the copy engine reads and, of the wide ones, writes.
#pragma once

#include "../head/layout.h"

namespace vla::cuda::vision {

using head::Bits;
using head::divide_up;
using head::kChunk;
using head::kChunkBytes;
using head::kGroup;
using head::kSharedOfBlock;

constexpr int kPair = 2;        // blocks of a cluster: they share the k of out and fc2
constexpr int kMaxLayers = 32;  // of a table
constexpr int kStamps = 8;      // of a phase
constexpr int kQueries = 64;    // of an item of attention

// Tiles of an encoder: 64 rows a warpgroup, columns by product, chosen so that 132 blocks have one each.
// PaliGemma's SigLIP (27 layers, width 1152, 16 heads of 72, 4304 in between, 256 rows a camera), up to two
// cameras.
struct Pi {
  static constexpr int kGroups = 2, kQkv = 112, kState = 72, kFc1 = 136, kHead = 72, kKeys = 256;
  static constexpr int kSlots = 5, kSlotBytes = 33 * 1024, kParts = 32;
};
// The same with three.
struct Pi3 {
  static constexpr int kGroups = 2, kQkv = 160, kState = 128, kFc1 = 200, kHead = 72, kKeys = 256;
  static constexpr int kSlots = 4, kSlotBytes = 41 * 1024, kParts = 24;
};

template <typename S>
struct Of {
  static constexpr int kRows = 64 * S::kGroups;  // of a tile
  static constexpr int kConsumers = kGroup * S::kGroups, kThreads = kConsumers + 64;
  static constexpr int kFeeder = 4 * S::kGroups,
                       kLoader = kFeeder + 1;   // warps: weights; what blocks have written
  static constexpr int kUnits = S::kState / 8;  // of 8 columns, of the hidden state's tile
  static constexpr int kOwned =
      (kUnits + 1) / 2;  // of them that a block of a pair finishes; the second the rest
  static constexpr int kExchange = kOwned * S::kGroups * kGroup * 16;  // bytes that a block receives
  static constexpr int kWidest = S::kFc1 > S::kQkv ? S::kFc1 : S::kQkv;
  static constexpr int kStagingOfWarp = 16 * kWidest * 2;
  static constexpr int kStaging = 4 * S::kGroups * kStagingOfWarp;  // of what is on its way out
  static constexpr int kStateOfWarp = 16 * kOwned * 8 * 2,
                       kStateAt = kExchange;  // x on its way out, behind the exchange
  static constexpr int kMeeting = kStateAt + 4 * S::kGroups * kStateOfWarp > kStaging
                                      ? kStateAt + 4 * S::kGroups * kStateOfWarp
                                      : kStaging;
  static constexpr int kTermBytes = 8 * 256, kBarriers = 2 * S::kSlots + 2;
  static constexpr int kBytesOfX = kRows * kChunkBytes;
  static constexpr int kShared = S::kSlots * S::kSlotBytes + kMeeting + kTermBytes + 8 * kBarriers;
  static_assert(kShared <= kSharedOfBlock && kBytesOfX + kWidest * kChunkBytes <= S::kSlotBytes);
};

enum class Kind : int { kPrepare = -1, kQkv = 0, kAttention = 1, kOut = 2, kFc1 = 3, kFc2 = 4 };
constexpr int kKinds = 5;     // of a layer
constexpr int kProducts = 4;  // of a layer
VLA_HD constexpr bool is_split(Kind k) { return k == Kind::kOut || k == Kind::kFc2 || k == Kind::kPrepare; }
VLA_HD constexpr int product_of(Kind k) { return k == Kind::kQkv ? 0 : static_cast<int>(k) - 1; }

struct Term {
  float a, b;
};

// terms: by product and column. Of q, k and v and of fc1, whose left operand is x gamma: (sum over k of gamma
// W, bias + sum over k of beta W). Of out and fc2: (bias, gamma of the norm that follows).
struct Layer {
  const Term* terms[kProducts];
};

enum class Shape : int { kPi, kPi3 };

template <typename F>
auto with_shape(Shape shape, const F& f) {
  return shape == Shape::kPi ? f(Pi{}) : f(Pi3{});
}

struct Table {
  Shape shape;
  int ctas, layers, rows, cameras, heads, width, mlp;
  int row_tiles, column_tiles[kKinds];
  int chunks[kKinds];  // of k
  float eps;
  float scale;        // log2(e) / sqrt(head size)
  const Bits* first;  // (rows, width): the hidden state as it comes
  Bits* last;         // (rows, width): and as it goes
  int64_t ld_first, ld_last;
  Bits *x, *a, *h,
      *qkv;  // (rows, width): hidden state times gamma; what attention gives; (rows, mlp); (rows, 3 width)
  float* state;  // hidden state, see state_at()
  float* parts;  // (rows, kParts, 2): sums and sums of squares, by tile and block of a pair; the others zero
  const Term* first_terms;  // (0, gamma) of the first norm
  unsigned* counter;        // head::kCounterWords, zero before a launch
  unsigned* report;         // see head/watch.cuh
  int64_t* stamps;          // (1 + layers * kKinds, kStamps) clocks of block 0, or null
  int64_t patience;         // nanoseconds that a wait may take
  Layer layer[kMaxLayers];
};

VLA_HD constexpr int kind_index(Kind k) {
  return k == Kind::kPrepare ? static_cast<int>(Kind::kOut) : static_cast<int>(k);
}
VLA_HD int tiles_of(const Table& t, Kind k) {
  if (k == Kind::kAttention) return t.heads * (t.rows / kQueries);
  return t.row_tiles * t.column_tiles[kind_index(k)];
}
// A block's first tile; the others are tile_step() apart.
VLA_HD int first_tile(Kind k, int cta) { return is_split(k) ? cta / kPair : cta; }
VLA_HD int tile_step(const Table& t, Kind k) { return is_split(k) ? t.ctas / kPair : t.ctas; }
// Blocks that have a part in a phase.
VLA_HD int busy_blocks(const Table& t, Kind k) {
  const int tiles = tiles_of(t, k) * (is_split(k) ? kPair : 1);
  return tiles < t.ctas ? tiles : t.ctas;
}
// What the counter has come to when phase `k` of a layer may begin.
VLA_HD int done_before(const Table& t, int layer, Kind k) {
  int each = 0, here = 0;
  for (int i = 0; i < kKinds; ++i) {
    const int busy = busy_blocks(t, static_cast<Kind>(i));
    each += busy;
    if (i < static_cast<int>(k)) here += busy;
  }
  return busy_blocks(t, Kind::kPrepare) + layer * each + here;
}
struct Tile {
  int row, column;   // number of the row's tile, of the column's
  int first, count;  // chunks of k
};
VLA_HD Tile tile_at(const Table& t, Kind k, int tile, int cta) {
  Tile at{tile % t.row_tiles, tile / t.row_tiles, 0, t.chunks[kind_index(k)]};
  if (is_split(k)) {
    const int half = divide_up(at.count, kPair);
    if (cta % kPair == 0) {
      at.count = half;
    } else {
      at.first = half, at.count -= half;
    }
  }
  return at;
}
// Stages of a tile. Of an item of attention: queries, keys of either warpgroup, values of either.
constexpr int kStagesOfAttention = 5;
VLA_HD int stages_of(Kind k, const Tile& at) { return k == Kind::kAttention ? kStagesOfAttention : at.count; }

// A place in the ring.
struct Place {
  int slot = 0, parity = 0;
  template <typename S>
  VLA_HD void next() {
    if (++slot == S::kSlots) slot = 0, parity ^= 1;
  }
};

// Element of the hidden state in float32: four of unit i of a thread.
template <typename S>
VLA_HD int64_t state_at(int tile, int rank, int group, int i, int thread) {
  return ((((static_cast<int64_t>(tile) * kPair + rank) * S::kGroups + group) * Of<S>::kOwned + i) * kGroup +
          thread) *
         4;
}
}  // namespace vla::cuda::vision
