// The tiles that the product of many rows in bf16 is compiled for on Hopper.
#include "product_sm90.cuh"

namespace vla::cuda {
namespace {

using sm90::entry;

constexpr sm90::Entry<bf16> kEntries[] = {
    entry<bf16, 3, 256, true>(),  entry<bf16, 3, 192, false>(), entry<bf16, 3, 160, true>(),
    entry<bf16, 3, 128, false>(), entry<bf16, 3, 128, true>(),  entry<bf16, 3, 64, false>(),
    entry<bf16, 3, 64, true>(),   entry<bf16, 2, 256, false>(), entry<bf16, 2, 256, true>(),
    entry<bf16, 2, 192, false>(), entry<bf16, 2, 128, false>(), entry<bf16, 2, 128, true>(),
    entry<bf16, 2, 64, false>(),  entry<bf16, 2, 64, true>(),   entry<bf16, 1, 64, false>(),
    entry<bf16, 1, 64, true>(),
};

}  // namespace

bool has_tile_sm90(const Tile& tile) { return sm90::find(kEntries, tile) != nullptr; }

cudaError_t product_sm90(const Product& p, const Tile& tile, const Launch& at) {
  const auto* e = sm90::find(kEntries, tile);
  return e ? e->run(p, tile, at) : cudaErrorInvalidValue;
}

Tile choose_tile_sm90(const Product& p, int sms) { return sm90::choose(kEntries, p, sms); }

}  // namespace vla::cuda
