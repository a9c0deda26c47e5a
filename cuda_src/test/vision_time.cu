// Times of a vision encoder's layers on a GPU: today's launches, and the layers as one kernel, in one run on
// the same weights; by kind of phase. Both in a graph, weights larger than the second-level cache. Exit code
// 1 where the results are too far apart or change, 3 where a wait was given up.
//   vision_time [all]    all: with one and three cameras, too
#include "vision_run.h"

namespace vla::test {
namespace {

using vision::Case;
namespace vis = vision::vis;

constexpr double kApart = 3e-2;  // two bf16 pipelines of 27 layers

// Block 0's microseconds by kind of phase, mean over the layers but the first.
void phases(Case& c, cudaStream_t stream) {
  static const char* const names[] = {"q, k and v", "attention", "out", "fc1", "fc2"};
  c.stamp(true);
  const Times with = times(stream, [&] { TEST_CUDA(c.encoder.launch(stream)); }, 20);
  const std::vector<int64_t> s = c.stamps();
  const vis::Table& t = c.table;
  const int phases = 1 + t.layers * vis::kKinds;
  constexpr int n = vis::kStamps;
  const double to_us = double(with.median - 6.0f) / double(s[phases * n - 1] - s[n - 1]);
  std::printf("    block 0, us; with stamps %.1f, clock some %.2f GHz\n", with.median, 1e-3 / to_us);
  std::printf("    barrier + first x + products + meeting + sums or math + stores + end of tile + done\n");
  double layer = 0.0;
  for (int k = 0; k < vis::kKinds; ++k) {
    double part[n] = {}, all = 0.0;
    for (int l = 1; l < t.layers; ++l) {
      const int64_t* at = &s[(1 + l * vis::kKinds + k) * n];
      for (int i = 0; i < n; ++i) {
        int before = i - 1;  // a phase may leave out some
        while (before >= 0 && at[before] == 0) --before;
        if (at[i] != 0) part[i] += double(at[i] - at[before]);
      }
    }
    std::printf("    %-10s", names[k]);
    for (double& p : part) all += p *= to_us / (t.layers - 1);
    std::printf(" %5.2f =", all);
    for (const double p : part) std::printf(" %.2f", p);
    std::printf("\n");
    layer += all;
  }
  std::printf("    a layer %.2f\n", layer);
  c.stamp(false);
}

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  using namespace vla::test;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool all = argc > 1 && std::strcmp(argv[1], "all") == 0;
  cudaDeviceProp properties;
  TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
  vla::cuda::Launch at;
  TEST_CUDA(cudaStreamCreateWithFlags(&at.stream, cudaStreamNonBlocking));
  at.sms = properties.multiProcessorCount, at.arch = properties.major * 10 + properties.minor;
  at.scratch_bytes = size_t{32} << 20;
  TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&at.scratch), at.scratch_bytes));
  const int held = vis::resident_blocks();
  std::printf("%s, %d multiprocessors; %d blocks at once\n", properties.name, at.sms, held);
  bool good = true;
  const vla::test::vision::Sizes sizes[] = {{"2 cameras", 27, 2, 256, 16, 72, 4304},
                                            {"1 camera", 27, 1, 256, 16, 72, 4304},
                                            {"3 cameras", 27, 3, 256, 16, 72, 4304}};
  for (const auto& s : sizes) {
    if (s.cameras != 2 && !all) continue;
    Case c(s);
    if (const std::string why = c.make({held, true}); !why.empty()) {
      std::printf("%s: refused: %s\n", s.name, why.c_str());
      continue;
    }
    c.launches(at);
    TEST_CUDA(cudaDeviceSynchronize());
    const std::vector<double> want = Case::doubles(c.output);
    c.poison();
    if (!c.run("the first run")) return 3;
    const std::vector<double> got = Case::doubles(c.output);
    const std::vector<vis::Bits> bits = c.bits();
    bool same = true;
    for (int i = 0; i < 20; ++i) {
      if (!c.run("again")) return 3;
      same &= c.bits() == bits;
    }
    // in turn: the clock falls as the chip warms
    Times today[2], now[2];
    for (int i = 0; i < 2; ++i) {
      today[i] = times(at.stream, [&] { c.launches(at); }, 60);
      now[i] = times(at.stream, [&] { TEST_CUDA(c.encoder.launch(at.stream)); }, 60);
    }
    if (!c.ended("a graph")) return 3;
    const double apart = relative_error(got, want);
    std::printf(
        "| %s | launches %.1f, %.1f | one kernel %.1f, %.1f (p99 %.1f) us | apart %.1e | the same bits: %s "
        "|\n",
        s.name, today[0].median, today[1].median, now[0].median, now[1].median, now[1].p99, apart,
        same ? "yes" : "NO");
    good &= same && apart < kApart;
    phases(c, at.stream);
    if (!c.ended("stamps")) return 3;
  }
  return good ? 0 : 1;
}
