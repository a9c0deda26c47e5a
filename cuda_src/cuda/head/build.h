// From the operations of the denoising loop to the persistent head's table.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "../../ops/ops.h"
#include "layout.h"

namespace vla::cuda::head {

struct Settings {
  int clusters = kMaxTiles;   // that the device holds at once
  int min_units = 1;          // units of 16 columns that a block of a spread phase has at least
  int max_slots = kMaxSlots;  // of the weight ring
  int stage = 0;              // bytes of one; 0: as share_memory() finds best
  bool joins = true;          // qkv with its attention, where that is counted to be quicker
};

// What is known of an operation beside the operation itself (plan.h, Known).
struct Fact {
  int stable_keys = 0;  // keys, from the first, that no operation of the loop writes
  const float* shift =
      nullptr;  // norm.bias W^T in the order of the packed rows, `shift_stride` floats a step
  int64_t shift_stride = 0;
};

struct Memory {
  std::function<std::byte*(size_t)> take;                        // zeroed, 256-byte aligned
  std::function<const Bits*(const Phase&, const Weight&)> pack;  // the weight in the head's layout
};

// bf16 elements of a phase's packed weight.
inline size_t packed_elements(const Phase& p) {
  return static_cast<size_t>(p.tiles) * p.chunks * p.tile_rows * kChunk;
}

// Fills `table`; gives why it cannot ("" where it did): what the table cannot express runs on the kernels of
// small/. counter, report and stamps are left to the caller.
std::string build(Table& table, const std::vector<Op>& body, int steps, const std::vector<Fact>& facts,
                  const Settings& settings, const Memory& memory);

}  // namespace vla::cuda::head
