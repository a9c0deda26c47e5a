// The persistent prefix on a GPU against double precision: sizes of every kind, the variants of the table,
// the same bits each time and in a graph, stale and poisoned memory, NaN, and the packing of weights. Exit
// code 0 when all hold, 1 where something is wrong, 2 on an error of CUDA's, 3 where a wait was given up.
//   prefix_check [quick]    quick: the smallest sizes once, for compute-sanitizer
#include <algorithm>
#include <cstring>

#include "prefix_run.h"

namespace vla::test {
namespace {

using layers::Sizes;

constexpr double kLimit =
    8e-3;  // of the worst result; the host's walk over the same tables comes to 2 to 4e-3

struct Suite {
  Report report;
  bool quick = false, stuck = false;
  int refused = 0;

  void packing(Prefix& prefix) {
    bool same = true;
    for (const Prefix::Packed& w : prefix.packed) {
      const size_t bytes = pre::packed_elements(w.phase) * 2;
      Bits *from, *to;
      TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&from), bytes));
      TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&to), bytes));
      TEST_CUDA(cudaMemcpy(from, w.from, bytes, cudaMemcpyHostToDevice));  // nothing is padded
      TEST_CUDA(cudaMemset(to, 0xff, bytes));
      TEST_CUDA(pre::pack(to, w.phase, from, w.n, w.parts, w.k, nullptr));
      std::vector<Bits> got(bytes / 2);
      TEST_CUDA(cudaMemcpy(got.data(), to, bytes, cudaMemcpyDeviceToHost));
      same &= std::memcmp(got.data(), w.data, bytes) == 0;
      cudaFree(from), cudaFree(to);
    }
    report.require("weights packed on the device as on the host", same);
  }

  bool graph(Copy& c, const std::vector<Bits>& want, const std::string& name) {
    cudaStream_t stream;
    cudaGraph_t made;
    cudaGraphExec_t exec;
    TEST_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    TEST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    TEST_CUDA(pre::launch(*c.table, stream));
    TEST_CUDA(cudaStreamEndCapture(stream, &made));
    TEST_CUDA(cudaGraphInstantiate(&exec, made, 0));
    bool same = true;
    for (int i = 0; i < 3 && same; ++i) {
      c.poison();
      TEST_CUDA(cudaGraphLaunch(exec, stream));
      same = c.ended(name) && c.all() == want;
    }
    TEST_CUDA(cudaGraphExecDestroy(exec));
    TEST_CUDA(cudaGraphDestroy(made));
    TEST_CUDA(cudaStreamDestroy(stream));
    return same;
  }

  void one(Prefix& prefix, const Sizes& s, const pre::Settings& settings, int repetitions) {
    const std::string name = std::string(s.name) + ", " + std::to_string(settings.ctas) + " blocks, split " +
                             std::to_string(settings.split) + ", slots " + std::to_string(settings.max_slots);
    if (const std::string why = prefix.build_table(settings); !why.empty()) {
      std::printf("%s: refused: %s\n", name.c_str(), why.c_str());
      ++refused;
      return;
    }
    Copy c(prefix);
    std::vector<Bits> first;
    bool same = true, well = true;
    for (int i = 0; i < repetitions && well; ++i) {
      c.poison();
      well = c.run(name);
      const std::vector<Bits> got = c.all();
      if (i == 0) first = got;
      same &= got == first;
    }
    report.require(name + ": no wait is given up", well);
    if (!well) {
      stuck = true;
      return;
    }
    const double error = prefix.error([&](const View& v) { return c.values(v); });
    std::printf("  %s: error %.2e\n", name.c_str(), error);
    report.check(name, error, kLimit);
    report.require(name + ": the same bits each time", same);
    if (!(error <= kLimit)) blame(prefix, c);
    if (error <= kLimit && !quick) {
      report.require(name + ": the same bits in a graph", graph(c, first, name + ", a graph"));
      // a NaN comes out as NaN, hangs nothing, and is gone with the next run
      c.set_input(NAN);
      report.require(name + ": a run on NaN ends", c.run(name + ", NaN"));
      const std::vector<Bits> nan = c.all();
      report.require(name + ": NaN passes through", std::any_of(nan.begin(), nan.end(), [](Bits b) {
                       return std::isnan(layers::from_bits(b));
                     }));
      c.set_input(c.first_input());
      report.require(name + ": nothing of a NaN stays", c.run(name) && c.all() == first);
    }
    if (settings.max_slots == pre::kMaxSlots && settings.split == pre::kPair) packing(prefix);
  }

  // Each result's error: which is the first that is wrong.
  void blame(Prefix& prefix, const Copy& c) {
    for (size_t i = 0; i < prefix.results.size(); ++i) {
      const layers::Values got = c.values(prefix.results[i]), &want = prefix.expected()[i];
      const int cols = prefix.results[i].cols;
      double worst = 0.0;
      size_t where = 0;
      for (size_t j = 0; j < got.size(); ++j) {
        const double d = std::abs(got[j] - want[j]);
        if (!(d <= worst)) worst = d, where = j;
      }
      std::printf("    result %zu: error %.2e; worst at row %zu, column %zu: %g for %g\n", i,
                  relative_error(got, want), where / cols, where % cols, got[where], want[where]);
    }
  }

  int all() {
    const int held = pre::resident_blocks();
    cudaDeviceProp properties;
    TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
    std::printf("%s, %d multiprocessors; %d blocks at once\n", properties.name,
                properties.multiProcessorCount, held);
    report.require("pairs of blocks run here", held > 0);
    if (held == 0) return 1;
    const Sizes sizes[] = {
        {"tiny", 3, 128, 256, 2, 1, 21, true},
        {"tiny, 65 rows", 2, 192, 128, 6, 2, 65, false},
        {"tiny, long", 3, 128, 320, 3, 3, 250, true},
        {"4 layers of SmolVLA", 4, 960, 2560, 15, 5, 177, true},
        {"2 layers, 1 camera", 2, 960, 2560, 15, 5, 113, true},
        {"2 layers, 3 cameras", 2, 960, 2560, 15, 5, 241, true},
        {"2 layers, 16 tokens", 2, 960, 2560, 15, 5, 145, true},
    };
    for (const Sizes& s : sizes) {
      if (quick && s.width > 128) continue;
      Prefix prefix(s);
      for (const int split : {2, 1}) {
        for (const int ctas : {held, held - 12}) {
          for (const int slots : {pre::kMaxSlots, pre::kStages + 1}) {
            if (quick && (ctas != held || slots != pre::kMaxSlots)) continue;
            if (ctas != held && slots != pre::kMaxSlots) continue;
            pre::Settings settings;
            settings.ctas = ctas, settings.split = split, settings.max_slots = slots;
            one(prefix, s, settings, quick ? 1 : split == 2 && ctas == held ? 20 : 3);
            if (stuck) break;  // every other would wait as long
          }
        }
      }
      if (stuck) break;
    }
    std::printf("prefix_check: %d checks, %d failures, %d tables refused, worst error %.2e\n", report.checks,
                report.failures, refused, report.worst);
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
