// From an operation to its launcher: which kernels run it, and what it is called in an error.
#pragma once

#include <string>

#include "../device.h"
#include "kernels.h"

namespace vla::cuda {

// "linear (50, 1024) x (2560, 1024)": the operation and its shapes.
std::string describe(const Op& op);

// True where the operation runs on the kernels for few rows. `layout` is that of its packed weight, if it has
// one.
bool is_small(const Op& op, Layout layout);

// Throws Unsupported where the operation cannot run on the kernels chosen for it.
void check_supported(const Op& op, Layout layout);

cudaError_t launch_op(const Op& op, Layout layout, const Launch& at);

// What the operation writes, and what it reads beside weights.
std::vector<View> writes_of(const Op& op);
std::vector<View> reads_of(const Op& op);

// Rows of k and v, from the first, that none of `ops` writes in any of `steps` iterations; 0 where one writes
// blocks.
int stable_keys(const Attention& op, const std::vector<Op>& ops, int steps);

// The norm and the weight of a product, nullptr where there is none.
const Norm* norm_of(const Op& op);
const Weight* product_weight(const Op& op);

// True where the rows that `op` normalises are the whole of what `before` writes.
bool normalises_output_of(const Op& op, const Op& before);

// True where running the script never changes what `v` shows.
bool is_constant(const View& v, const Script& script);

bool overlap(const View& a, const View& b);

// Whether an operation from before[first] on reads one of `places`, or the script gives it out, ere something
// else has been written there.
bool is_read_later(std::vector<View> places, const Script& script, size_t first);

// The packed weight of an operation, nullptr where it has none.
const void* weight_of(const Op& op);

}  // namespace vla::cuda
