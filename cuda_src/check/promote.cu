#include "promote.h"

#include "../cuda/large/product_sm90.cuh"

namespace vla::check {

cudaError_t product_promoted(int promote, const cuda::QuantisedProduct& p, const cuda::Launch& at) {
  using cuda::e4m3;
  const cuda::Tile tile{2, 128, 1};
  switch (promote) {
    case 0:
      return cuda::product_e4m3(p, tile, at);
    case 1:
      return cuda::sm90::run<e4m3, 2, 128, false, 1>(p, tile, at);
    case 2:
      return cuda::sm90::run<e4m3, 2, 128, false, 2>(p, tile, at);
    case 4:
      return cuda::sm90::run<e4m3, 2, 128, false, 4>(p, tile, at);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace vla::check
