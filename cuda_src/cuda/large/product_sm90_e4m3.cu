// The tiles that the product of many rows in E4M3 is compiled for on Hopper: those that the count of cycles
// names for the policies' products with one to three cameras, and their neighbours.
#include "product_sm90.cuh"

namespace vla::cuda {
namespace {

using sm90::entry;

constexpr sm90::Entry<e4m3> kEntries[] = {
    entry<e4m3, 3, 192, false>(), entry<e4m3, 3, 128, true>(),  entry<e4m3, 3, 64, false>(),
    entry<e4m3, 3, 64, true>(),   entry<e4m3, 2, 256, false>(), entry<e4m3, 2, 256, true>(),
    entry<e4m3, 2, 192, false>(), entry<e4m3, 2, 128, false>(), entry<e4m3, 2, 128, true>(),
    entry<e4m3, 2, 64, false>(),  entry<e4m3, 1, 64, false>(),  entry<e4m3, 1, 64, true>(),
};

}  // namespace

bool has_tile_e4m3(const Tile& tile) { return sm90::find(kEntries, tile) != nullptr; }

cudaError_t product_e4m3(const QuantisedProduct& p, const Tile& tile, const Launch& at) {
  const auto* e = sm90::find(kEntries, tile);
  return e ? e->run(p, tile, at) : cudaErrorInvalidValue;
}

Tile choose_tile_e4m3(const QuantisedProduct& p, int sms) { return sm90::choose(kEntries, p, sms); }

}  // namespace vla::cuda
