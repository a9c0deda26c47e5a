// The persistent vision encoder on a GPU against double precision, beside today's launches: sizes of every
// kind, the same bits each time and in a graph, poisoned memory, NaN. Exit code 0 when all hold, 1 where
// something is wrong, 2 on an error of CUDA's, 3 where a wait was given up.
//   vision_check [quick]    quick: the smallest size once, for compute-sanitizer
#include "vision_run.h"

namespace vla::test {
namespace {

using vision::Case;
using vision::Kind;
using vision::Sizes;
namespace vis = vision::vis;

constexpr double kLimit = 2e-2;  // of 27 layers; of a few less comes out

struct Suite {
  Report report;
  cuda::Launch at;
  bool quick = false, stuck = false;

  // What each phase of a single layer is off: which is the first that is wrong.
  void blame(Case& c, const Case::Exact& exact) {
    const vis::Table& t = c.table;
    std::printf("    q, k and v %.2e, attention %.2e, fc1 %.2e\n",
                relative_error(Case::doubles(t.qkv, 3 * t.width, t.rows, 3 * t.width), exact.qkv),
                relative_error(Case::doubles(t.a, t.width, t.rows, t.width), exact.attention),
                relative_error(Case::doubles(t.h, t.mlp, t.rows, t.mlp), exact.fc1));
  }

  bool graph(Case& c, const std::vector<vis::Bits>& want, const std::string& name) {
    cudaStream_t stream;
    TEST_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaGraphExec_t exec = capture(stream, [&] { TEST_CUDA(c.encoder.launch(stream)); });
    bool same = true;
    for (int i = 0; i < 10 && same; ++i) {
      c.poison();
      TEST_CUDA(cudaGraphLaunch(exec, stream));
      same = c.ended(name) && c.bits() == want;
    }
    TEST_CUDA(cudaGraphExecDestroy(exec));
    TEST_CUDA(cudaStreamDestroy(stream));
    return same;
  }

  void one(const Sizes& s, const vis::Settings& settings, int repetitions) {
    const std::string name = std::string(s.name) + ", " + std::to_string(settings.ctas) +
                             (settings.apiece ? " blocks" : " blocks, tiles in turn");
    Case c(s);
    if (const std::string why = c.make(settings); !why.empty()) {
      std::printf("%s: refused: %s\n", name.c_str(), why.c_str());
      report.require(name + ": is built", false);
      return;
    }
    std::vector<vis::Bits> first;
    bool same = true, well = true;
    for (int i = 0; i < repetitions && well; ++i) {
      c.poison();
      well = c.run(name);
      if (i == 0) first = c.bits();
      same &= c.bits() == first;
    }
    report.require(name + ": no wait is given up", well);
    if (!well) {
      stuck = true;
      return;
    }
    const Case::Exact exact = c.exact();
    const double error = relative_error(Case::doubles(c.output), exact.out);
    if (s.layers == 1 || !(error <= kLimit)) blame(c, exact);
    double theirs = NAN;
    if (!quick) {
      c.launches(at);
      TEST_CUDA(cudaDeviceSynchronize());
      theirs = relative_error(Case::doubles(c.output), exact.out);
    }
    std::printf("  %s: error %.2e, of launches %.2e\n", name.c_str(), error, theirs);
    report.check(name, error, kLimit);
    if (!quick) report.check(name + ", against launches", error, 1.2 * theirs);
    report.require(name + ": the same bits each time", same);
    if (!(error <= kLimit) || quick) return;
    report.require(name + ": the same bits in a graph", graph(c, first, name + ", a graph"));
    // a NaN comes out as NaN, hangs nothing, and is gone with the next run
    const vis::Bits before = c.get_input();
    c.set_input(0x7fff);
    report.require(name + ": a run on NaN ends", c.run(name + ", NaN"));
    const std::vector<double> nan = Case::doubles(c.output);
    report.require(name + ": NaN passes through",
                   std::any_of(nan.begin(), nan.end(), [](double v) { return std::isnan(v); }));
    c.set_input(before);
    report.require(name + ": nothing of a NaN stays", c.run(name) && c.bits() == first);
  }

  int all() {
    cudaDeviceProp properties;
    TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
    const int held = vis::resident_blocks();
    std::printf("%s, %d multiprocessors; %d blocks at once\n", properties.name,
                properties.multiProcessorCount, held);
    report.require("pairs of blocks run here", held > 0);
    if (held == 0) return 1;
    TEST_CUDA(cudaStreamCreateWithFlags(&at.stream, cudaStreamNonBlocking));
    at.sms = properties.multiProcessorCount, at.arch = properties.major * 10 + properties.minor;
    at.scratch_bytes = size_t{32} << 20;
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&at.scratch), at.scratch_bytes));
    const Sizes sizes[] = {
        {"tiny", 2, 1, 256, 2, 72, 200},
        {"tiny, long", 3, 2, 256, 4, 72, 1160},
        {"1 layer, 2 cameras", 1, 2, 256, 16, 72, 4304},
        {"2 layers, 1 camera", 2, 1, 256, 16, 72, 4304},
        {"2 layers, 3 cameras", 2, 3, 256, 16, 72, 4304},
        {"27 layers, 2 cameras", 27, 2, 256, 16, 72, 4304},
    };
    for (const Sizes& s : sizes) {
      if (quick && s.heads > 2) continue;
      for (const int ctas : {held, held - 12}) {
        if (ctas != held && (quick || s.layers > 3)) continue;
        one(s, {ctas, ctas == held && s.name[0] == '2'}, quick ? 1 : 20);
        if (stuck) break;  // every other would wait as long
      }
      if (stuck) break;
    }
    std::printf("vision_check: %d checks, %d failures, worst error %.2e\n", report.checks, report.failures,
                report.worst);
    return stuck ? 3 : report.failures ? 1 : 0;
  }
};

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was printed before a time limit is not lost
  vla::test::Suite suite;
  suite.quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  return suite.all();
}
