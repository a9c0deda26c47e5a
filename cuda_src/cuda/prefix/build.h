// From the operations of a prefix to the persistent prefix's table.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "../../ops/ops.h"
#include "layout.h"

namespace vla::cuda::prefix {

struct Settings {
  int ctas = 132;             // blocks that the device holds at once
  int max_slots = kMaxSlots;  // of the ring
  int split = kPair;          // of the products of the longest k
  int slot =
      39 * 1024;  // bytes of one of the ring's at least: three chunks a stage of q, k and v of 177 rows
};

struct Memory {
  std::function<std::byte*(size_t)> take;                        // zeroed, 256-byte aligned
  std::function<const Bits*(const Phase&, const Weight&)> pack;  // the weight in the prefix's layout
};

// bf16 elements of a phase's packed weight.
inline size_t packed_elements(const Phase& p) {
  return static_cast<size_t>(p.column_tiles) * p.chunks * tile_rows(p) * kChunk;
}

// Which of a list of operations are a prefix's layers: from the first projection of q, k and v behind an RMS
// norm to the last that writes keys, and the products of keys and values alone that follow. begin == end:
// none.
struct Range {
  size_t begin = 0, end = 0;
};
Range find_layers(const std::vector<Op>& ops);

// Fills `table` from ops[begin, end); gives why it cannot ("" where it did): what the table cannot express is
// launched operation by operation. counter, report, stamps and patience are left to the caller.
std::string build(Table& table, const std::vector<Op>& ops, Range range, const Settings& settings,
                  const Memory& memory);

}  // namespace vla::cuda::prefix
