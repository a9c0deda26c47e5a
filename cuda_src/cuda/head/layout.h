// Where everything of the persistent action head lies: who owns which tile, and the order of bytes in global
// and shared memory. The kernel, the packing and the host's test share these functions.
//
// A row of 64 bf16 columns ("chunk") is 128 bytes, swizzled as the matrix unit wants it: unit u (16 bytes) of
// row r stands at u ^ (r & 7). Activations (rows, k) are chunks one after another: [chunk][rows][128 bytes],
// rows padded to
// 8. So a copy of a chunk is contiguous and needs no tensor map.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define VLA_HD __host__ __device__ __forceinline__
#else
#define VLA_HD inline
#endif

namespace vla::cuda::head {

using Bits = uint16_t;  // a bf16

constexpr int kChunk = 64;               // columns
constexpr int kChunkBytes = 2 * kChunk;  // of one row
constexpr int kCluster = 8;              // blocks; each finishes 8 rows of the sums of the cluster
constexpr int kMaxSlots = 24;            // of the weight ring
constexpr int kMaxChunks = 32;           // of x in shared memory
constexpr int kGroup = 128;              // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;   // two warpgroups
constexpr int kFeeder = 8, kLoader = 9;  // warps: weights, everything else that is copied
constexpr int kThreads = 320;
constexpr int kSharedOfBlock = 232448;  // bytes that a block may have
constexpr int kFreshRows = 8;           // keys of a step that a block has
constexpr int kMaxKeys = 112;           // of a block in attention
constexpr int kMaxTiles = 16;           // of a split phase, a cluster each
constexpr int kSquareParts = 32;        // of a row's sum of squares: two a cluster; the others stay zero
constexpr int kWide = 80;               // columns of a tile at most, of a split phase
constexpr int kSumBytes = kCluster * 8 * kWide * 4;  // that a block receives in a split phase
constexpr int kMostColumns = 4;  // groups of 64 columns of the output that a cluster has in attention
// Bytes that a block receives in attention: columns of bfloat16, a maximum and a total a row; or what the
// warpgroups give each other: a float4 a unit and thread.
constexpr int kExchange = (kCluster * 8 * (kMostColumns * kChunk * 2 + 8) + 1023) / 1024 * 1024;
static_assert(kExchange >= kConsumers * 16 * kWide / 16, "room for the largest tile");

constexpr int kKeyBlocks = kMaxKeys * 4;  // bytes of shared memory
constexpr int kBarrierCount = 2 * kMaxSlots + 7;
constexpr int kRest = kKeyBlocks + kBarrierCount * 8;  // bytes after the ring

VLA_HD constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
VLA_HD constexpr int pad_to(int a, int b) { return divide_up(a, b) * b; }

// Element (row, col) of an activation of `rows` padded rows.
VLA_HD int act_index(int rows, int row, int col) {
  const unsigned r = row, c = col;  // shifts, not divisions
  return static_cast<int>(((c >> 6) * rows + r) * kChunk + (((c >> 3 & 7) ^ (r & 7)) << 3) + (c & 7));
}

// The matrix unit's sums c (64, N): number i of thread t of the warpgroup.
struct SumPlace {
  int row, col;
};
VLA_HD SumPlace sum_place(int t, int i) {
  return {t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2};
}

// ---- phases
enum class Kind : int { kQkv = 0, kGated = 1, kAttention = 2, kLinear = 3, kEuler = 4 };

// A vector that moves with the step; absent where p is null.
struct Stepped {
  const float* p;
  int64_t stride;  // floats
  VLA_HD const float* at(int step) const { return p ? p + step * stride : nullptr; }
};

struct QkvPart {
  const float* rope;
  const int* positions;
  Bits *fresh_k, *fresh_v;
  int ld_rope, ld_positions, rope_rows;
  int units[3];  // of 16 columns, of q, k and v
};
struct AttentionPart {
  const Bits *k, *v;              // as the prefix left them: (prefix, kv_heads * d), plain rows
  Bits *packed_k, *packed_v;      // [kv head][rank][chunk][prefix_rows][128 bytes]
  const Bits *fresh_k, *fresh_v;  // the same of kFreshRows, where there are fresh keys
  const int *q_block, *k_block;
  int ld_k, ld_v, ld_q_block, ld_k_block;
  int prefix, fresh;            // keys
  int prefix_rows, fresh_rows;  // of a block, padded: together a multiple of 16; kFreshRows or 0
  int stacks_per_key;           // stacks of query heads of a key head
  int columns;                  // groups of 64 columns of the output that a cluster has, 1, 2 or 4
  int kv_heads;
  int at;  // where keys, values and queries lie in shared memory, from where x begins
};
// Rows before Table::first: what they are where the hidden state begins, instead of sums. Null elsewhere.
struct LinearPart {
  const Bits* fixed;
  int ld_fixed;
};
struct EulerPart {
  float* sample;
  const float *previous, *weight;
  Stepped gain, time;
  int ld_sample, ld_previous, ld_weight;
  float dt;
};

// Queries as qkv writes them and attention reads them: the rows of `heads` query heads of one key head, one
// under another, in tiles of 64: [stack][tile][chunk of the head][rows][128 bytes].
constexpr int kQueryRows = 64;
struct Stack {
  int heads;  // 1: each by itself
  int tiles;  // of a stack
  int rows;   // of a tile in memory, padded to 8
};

// One step of the table. Spread (kQkv, kGated): a block has `tile_rows` rows of W and all of k, x is
// multicast in the cluster. Split (kLinear, kEuler): a cluster has `tile_rows` rows of W, each block a range
// of k. Attention: a cluster has a tile of queries and some columns of their output, each block a range of
// keys.
struct Phase {
  Kind kind;
  int chunks;  // of x; of a head
  int tile_rows, tiles, stage_chunks;
  int each, units;  // split: chunks of a block, at most; spread: units of 16 rows of W
  int head_shift;   // head_dim = 1 << head_shift
  int n;            // columns of y (of h where gated; of a head's row of queries in attention)
  int head_dim;
  Stack stack;  // qkv and attention
  int act;      // vla::Act
  int joined;   // qkv and the attention after it: no wait between all blocks is between them, see below
  int normed;   // the sums are scaled by the rows' 1 / rms
  int residual;
  float scale, eps, mean;  // mean: 1 / columns of x before padding
  const Bits* x;
  const Bits* w;
  Bits* out;
  const float* squares_in;
  float* squares_out;
  Stepped shift, bias, gate,
      next;  // shift: in the order of the packed rows; next: of the norm that reads `out`
  float next_plus;
  union {
    QkvPart qkv;
    AttentionPart attention;
    LinearPart linear;
    EulerPart euler;
  };
};

constexpr int kMaxPhases = 100;
constexpr int kFailed = 32, kCounterWords = 64;  // each in a line of the cache of its own

struct Table {
  int phases, steps;
  int m, rows;             // rows of x; padded to 8
  int first;               // rows of x before those of the actions
  int ctas, slots, stage;  // slots of the weight ring, bytes of one
  int x_bytes;             // shared memory: [x | exchange | ring | the rest]
  int parts;          // what runs, 15 but for timing: 1 weights, 2 barriers, 4 copies of x, 8 sums and ends;
                      // products wherever anything but barriers does
  unsigned* counter;  // kCounterWords, zero before a launch: blocks done; at kFailed, waits given up
  unsigned* report;   // see watch.cuh
  int64_t* stamps;    // (phases * steps, 4) clocks of block 0, or null
  int64_t patience;   // nanoseconds that a wait may take
  // before the loop
  const float* sample;  // (m, action_n) to `actions`, an activation
  Bits* actions;
  int ld_sample, action_n;
  Phase phase[kMaxPhases];
};

static_assert(sizeof(Table) <= 32764, "a kernel's parameters");
inline int shared_bytes(const Table& t) { return t.x_bytes + kExchange + t.slots * t.stage + kRest; }

VLA_HD bool is_spread(const Phase& p) { return p.kind == Kind::kQkv || p.kind == Kind::kGated; }
VLA_HD bool is_split(const Phase& p) { return p.kind == Kind::kLinear || p.kind == Kind::kEuler; }

// What a block does in a phase: rows of W (tile) and chunks [first, last) of k. x's chunk c lies in slot c -
// first.
struct Share {
  int tile, first, last;
  VLA_HD int count() const { return last - first; }
};
VLA_HD Share share_of(const Phase& p, int cta) {
  if (is_spread(p)) return {cta, 0, cta < p.tiles ? p.chunks : 0};
  const int tile = cta / kCluster, rank = cta % kCluster;
  if (!is_split(p) || tile >= p.tiles) return {tile, 0, 0};
  const int first = rank * p.each < p.chunks ? rank * p.each : p.chunks;
  return {tile, first, first + p.each < p.chunks ? first + p.each : p.chunks};
}
// Chunks of x that arrive in a block. Multicast reaches all blocks of a cluster in which any has a tile.
VLA_HD int arriving(const Phase& p, int cta) {
  if (is_spread(p)) return cta / kCluster * kCluster < p.tiles ? p.chunks : 0;
  return share_of(p, cta).count();
}
// Blocks of a cluster that have sums to send in a split phase.
VLA_HD int senders(const Phase& p) { return divide_up(p.chunks, p.each); }

VLA_HD bool owns(int rows, int rank) { return 8 * rank < rows; }  // whether a block finishes rows of sums
// The multiprocessors come in groups that a cluster does not cross: of 132, 15 or 16 clusters of 8 fit, as
// the groups of a card are. So a tile of a split phase has 64 columns, or kWide where 64 would need more
// clusters.
// Units of 16 rows of W that a block can have: more with rotation have no room in registers.
constexpr int kMostUnits = kWide / 16, kMostQkvUnits = 2;

// Whether a block's warps have anything to do in a phase (else the loader reports it done).
VLA_HD bool is_busy(const Phase& p, int cta, int rows) {
  if (is_spread(p)) return arriving(p, cta) > 0;
  if (cta / kCluster >= p.tiles) return false;
  return p.kind == Kind::kAttention || share_of(p, cta).count() > 0 || owns(rows, cta % kCluster);
}

// ---- x by multicast: a chunk in pieces of rows, piece i by block i mod cluster
VLA_HD int pieces_of(int rows) { return rows >= 16 ? 2 : 1; }
VLA_HD int piece_first(int rows, int part) { return part == 0 ? 0 : divide_up(rows / 8, 2) * 8; }
VLA_HD int piece_rows(int rows, int part) {
  const int half = divide_up(rows / 8, 2) * 8;
  return rows < 16 ? rows : part == 0 ? half : rows - half;
}

// ---- packed weights: [tile][chunk][tile_rows][128 bytes]. Which row of which matrix row r of a tile is.
struct Octets {
  int part, first, second;  // columns of y where the unit's two groups of 8 begin
};
// Unit u of 16 columns of q, k and v: with rotation the two halves of a head side by side.
VLA_HD Octets octets_of(const Phase& p, int unit) {
  const QkvPart& q = p.qkv;
  int part = 0;
  if (unit >= q.units[0]) unit -= q.units[0], part = 1;
  if (part == 1 && unit >= q.units[1]) unit -= q.units[1], part = 2;
  if (part == 2 || q.rope == nullptr) return {part, 16 * unit, 16 * unit + 8};
  const unsigned shift = p.head_shift - 4, u = unit;  // units of a head: 1 << shift
  const int first = static_cast<int>((u >> shift << p.head_shift) + (u & ((1u << shift) - 1)) * 8);
  return {part, first, first + (1 << p.head_shift) / 2};
}
VLA_HD int units_of(const Phase& p) {
  return p.kind == Kind::kGated ? p.n / 8 : p.qkv.units[0] + p.qkv.units[1] + p.qkv.units[2];
}
struct SourceRow {
  int part, row;  // -1: none, zeros
};
// Where qkv is joined to its attention a cluster has a head (of kChunk columns): block `rank` has eight
// columns of q, where it is self-attention of k and v, too, and sends them where they belong in its siblings'
// shared memory: as octet `rank` of a row. Those of q and k are four of each half of the head, so that what
// rotation turns into each other is one thread's; so all rows of q and k have their columns in this order,
// which a product of them does not see. Key heads are computed by each cluster that has one of their query
// heads.
constexpr int kJoinedColumns = kChunk / kCluster;
// Column of a head that has place e of octet `octet`; part: 0 q, 1 k, 2 v.
VLA_HD int joined_column(int part, int octet, int e) {
  return part == 2 ? kJoinedColumns * octet + e : kJoinedColumns / 2 * octet + e % 4 + e / 4 * (kChunk / 2);
}
// Which place row r of a block's rows of W (of a part) is: pairs of a place and the fourth after it.
VLA_HD int joined_place(int r) { return r / 2 + r % 2 * 4; }
VLA_HD SourceRow source_row(const Phase& p, int tile, int r) {
  if (is_split(p)) {
    const int row = tile * p.tile_rows + r;
    return {0, row < p.n ? row : -1};
  }
  if (p.joined) {
    const unsigned part = r / kJoinedColumns, head = tile / kCluster;
    const int its = part == 0 ? head : head / (static_cast<unsigned>(p.qkv.units[0]) / p.qkv.units[1]);
    const int place = joined_place(r % kJoinedColumns);
    return {static_cast<int>(part), its * kChunk + joined_column(part, tile % kCluster, place)};
  }
  const int unit = tile * (p.tile_rows / 16) + r / 16, second = r % 16 / 8;
  if (unit >= p.units) return {0, -1};
  if (p.kind == Kind::kGated) return {second, unit * 8 + r % 8};
  const Octets o = octets_of(p, unit);
  return {o.part, (second ? o.second : o.first) + r % 8};
}
// Row of small/pack.cu's packing: of part `part` of a stacked weight whose parts have n[0], n[1], ... rows.
VLA_HD int fragment_row(const int* n, int part, int row, bool interleaved) {
  if (interleaved) return row / 16 * 32 + part * 16 + row % 16;
  int first = 0;
  for (int i = 0; i < part; ++i) first += pad_to(n[i], 32);
  return first + row;
}
// Element of that packing at packed row r, column c.
VLA_HD int64_t fragment_index(int r, int c, int k_tiles) {
  const int64_t tile = static_cast<int64_t>(r / 32) * k_tiles + c / 16;
  const int lane = r % 8 * 4 + c % 8 / 2, j = c % 16 / 8 * 4 + r % 16 / 8 * 2 + c % 2;
  return ((tile * 2 + r % 32 / 16) * 32 + lane) * 8 + j;
}
// Rows of n[] before part p, in that order, for the table of norm biases times weights (kernels.h,
// make_shift).
VLA_HD int shift_row(const Phase& p, int part, int column) {
  if (p.kind == Kind::kGated) return fragment_row(nullptr, part, column, true);
  if (p.kind != Kind::kQkv) return column;
  const int n[3] = {p.qkv.units[0] * 16, p.qkv.units[1] * 16, p.qkv.units[2] * 16};
  return fragment_row(n, part, column, false);
}

// ---- keys and values: block `rank` of a cluster has prefix rows [rank * prefix_rows, ...), then fresh rows
VLA_HD unsigned key_index(int head, int rank, int chunks, int rows_each, int row, int col) {
  const unsigned r = row, c = col;
  return ((static_cast<unsigned>(head * kCluster + rank) * chunks + (c >> 6)) * rows_each + r) * kChunk +
         (((c >> 3 & 7) ^ (r & 7)) << 3) + (c & 7);
}
// Where the loop's row `row` of column `col` of k or v goes.
VLA_HD unsigned fresh_index(const Phase& p, int row, int col) {
  const unsigned r = row, c = col;
  return key_index(c >> p.head_shift, r / kFreshRows, 1 << p.head_shift >> 6, kFreshRows, r % kFreshRows,
                   c & ((1u << p.head_shift) - 1));
}
// Key number of row i of a block, -1 where there is none.
VLA_HD int key_of(const AttentionPart& a, int rank, int i) {
  if (i < a.prefix_rows) {
    const int key = rank * a.prefix_rows + i;
    return key < a.prefix ? key : -1;
  }
  const int fresh = rank * a.fresh_rows + i - a.prefix_rows;
  return i < a.prefix_rows + a.fresh_rows && fresh < a.fresh ? a.prefix + fresh : -1;
}
// ---- queries. Row `row` of a head: elements before its tile, and the row of the tile.
struct QueryRow {
  unsigned before;
  int row;
};
VLA_HD QueryRow query_row(const Phase& p, int m, int row, int head) {
  const unsigned h = head, heads = p.stack.heads, stack = h / heads, stacked = (h - stack * heads) * m + row;
  const unsigned tile = stack * p.stack.tiles + stacked / kQueryRows;
  return {tile * p.stack.rows << p.head_shift, static_cast<int>(stacked % kQueryRows)};
}
inline size_t query_elements(const Phase& p) {  // of all heads; p: qkv
  return static_cast<size_t>(p.n >> p.head_shift) / p.stack.heads * p.stack.tiles * p.stack.rows
         << p.head_shift;
}
// What a cluster does in attention: a tile of queries (of all stacks' tiles), the first query head of its
// stack, their key head, the first row of the stack that the tile has and how many, the first group of 64
// columns of the output.
struct HeadTask {
  int tile, head, key_head, first, rows, column;
};
VLA_HD HeadTask head_task(const Phase& p, int m, int cluster_index) {
  const int each = p.chunks / p.attention.columns, tile = cluster_index / each, stack = tile / p.stack.tiles;
  const int first = (tile - stack * p.stack.tiles) * kQueryRows, left = p.stack.heads * m - first;
  return {tile,
          stack * p.stack.heads,
          stack / p.attention.stacks_per_key,
          first,
          left < kQueryRows ? left : kQueryRows,
          (cluster_index - tile * each) * p.attention.columns};
}
// The head and the loop's row of row `row` of a cluster's tile.
struct HeadRow {
  int head, row;
};
VLA_HD HeadRow head_row(const HeadTask& task, int m, int row) {
  const unsigned stacked = task.first + row, head = stacked / m;
  return {task.head + static_cast<int>(head), static_cast<int>(stacked - head * m)};
}
// Shared memory in attention: keys, values, queries.
VLA_HD int key_rows(const AttentionPart& a) { return a.prefix_rows + a.fresh_rows; }
// What the kernel is made for.
VLA_HD constexpr int key_rows_made(int i) { return i == 0 ? 32 : i == 1 ? 48 : i == 2 ? 80 : kMaxKeys; }
constexpr int kJoinedKeys = key_rows_made(1);  // at most, where qkv is joined
VLA_HD int values_at(const Phase& p) { return p.chunks * key_rows(p.attention) * kChunkBytes; }
VLA_HD int queries_at(const Phase& p) {
  return (p.chunks + p.attention.columns) * key_rows(p.attention) * kChunkBytes;
}

// What siblings send there where qkv is joined: all rows of queries, and those of the loop's keys and values
// that are its own, behind the prefix's. Bytes.
VLA_HD int joined_received(const AttentionPart& a, int rows) {
  return (rows + 2 * a.fresh_rows) * kChunkBytes;
}

// ---- sums from block to block in a split phase: units of 16 bytes, 4 columns of a row. Octet j of row `row`
// (of the 8 that the owner finishes), half of it; `octets`: of a tile. What two octets of a warp go to is 512
// contiguous bytes, and a row is read without bank conflicts.
VLA_HD int receive_unit(int source, int row, int octet, int half, int octets) {
  return (source * octets + octet) * 16 + ((2 * row + half) ^ (2 * (octet & 7)));
}
// Where a split phase's sums arrive: at the end of x's part.
VLA_HD int receive_at(const Table& t) { return t.x_bytes - kSumBytes; }
// The 4-column piece that a thread finishes: of the first 64 columns, or of the 16 after them.
struct Piece {
  int row, octet, half;
};
VLA_HD Piece piece_of(int thread) {
  const int more = thread - kGroup, quad = more < 0 ? thread % 16 : 16 + more % 4;
  return {more < 0 ? thread / 16 : more / 4, quad / 2, quad % 2};
}
VLA_HD int pieces(int columns) { return kGroup + (columns - 64) * 2; }  // 64 or kWide columns
// The part of a row's sum of squares that a thread's piece belongs to.
VLA_HD int square_part(int thread, int tile) { return thread < kGroup ? tile : kMaxTiles + tile; }

// ---- attention's, bytes: octet j of a row, 8 columns of bfloat16; then a maximum and a total a row.
VLA_HD int receive_octet(int source, int row, int octet, int octets) {
  return ((source * 8 + row) * octets + (octet ^ row)) * 16;
}
VLA_HD int receive_stats(int source, int row) {
  return kCluster * 8 * kMostColumns * kChunk * 2 + (source * 8 + row) * 8;
}

}  // namespace vla::cuda::head
