// How the builders of the persistent kernels' tables turn down what their kernel is not made for.
#pragma once

#include <string>

#include "../../ops/ops.h"

namespace vla::cuda::head {

struct Refused {
  std::string why;
};
inline void require(bool holds, const std::string& why) {
  if (!holds) throw Refused{why};
}
// Whether two views show the same.
inline bool same(const View& a, const View& b) {
  return a.base == b.base && a.rows == b.rows && a.cols == b.cols && a.ld == b.ld && a.dtype == b.dtype;
}

}  // namespace vla::cuda::head
