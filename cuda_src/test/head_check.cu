// The persistent action head on a GPU against double precision: sizes of every kind, the variants of the
// table, the same bits each time, stale memory, and the packing of weights. Exit code 0 when all hold, 3
// where a wait was given up.
//   head_check [quick]    quick: the smallest sizes once, for compute-sanitizer
#include <cstring>

#include "head_case.h"
#include "head_run.h"

namespace vla::test {
namespace {

using cuda::head::Bits;
using cuda::head::Settings;
using loop::Head;
using loop::Sizes;

// A pointer into the case's memory becomes one into its copy on the device.
struct Move {
  const std::byte* from;
  std::byte* to;
  size_t bytes;
  template <typename T>
  void operator()(T*& p) const {
    const auto* at = reinterpret_cast<const std::byte*>(p);
    if (p == nullptr) return;
    if (at < from || at >= from + bytes) {
      std::printf("a pointer that is not the case's\n");
      std::exit(2);
    }
    p = reinterpret_cast<T*>(to + (at - from));
  }
};

void relocate(Table& t, const Move& move) {
  move(t.sample), move(t.actions);
  for (int i = 0; i < t.phases; ++i) {
    Phase& p = t.phase[i];
    move(p.x), move(p.w), move(p.out), move(p.squares_in), move(p.squares_out);
    move(p.shift.p), move(p.bias.p), move(p.gate.p), move(p.next.p);
    if (p.kind == Kind::kQkv) {
      move(p.qkv.rope), move(p.qkv.positions), move(p.qkv.fresh_k), move(p.qkv.fresh_v);
    } else if (p.kind == Kind::kAttention) {
      auto& a = p.attention;
      move(a.k), move(a.v), move(a.packed_k), move(a.packed_v), move(a.fresh_k), move(a.fresh_v),
          move(a.q_block), move(a.k_block);
    } else if (p.kind == Kind::kEuler) {
      auto& e = p.euler;
      move(e.sample), move(e.previous), move(e.weight), move(e.gain.p), move(e.time.p);
    }
  }
}

struct Suite {
  Report report;
  Extras extras;
  bool quick = false, stuck = false;

  void packing(Head& head, std::byte* device) {
    bool same = true;
    for (const Head::PackedWeight& w : head.weights()) {
      const Phase& p = head.table().phase[w.phase];
      const size_t bytes = cuda::head::packed_elements(p) * 2;
      Bits *from, *to;
      TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&from), w.from.size() * 2));
      TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&to), bytes));
      TEST_CUDA(cudaMemcpy(from, w.from.data(), w.from.size() * 2, cudaMemcpyHostToDevice));
      TEST_CUDA(cudaMemset(to, 0xff, bytes));
      TEST_CUDA(cuda::head::pack(to, p, from, w.n, w.parts, w.interleaved, w.k, nullptr));
      std::vector<Bits> got(bytes / 2);
      TEST_CUDA(cudaMemcpy(got.data(), to, bytes, cudaMemcpyDeviceToHost));
      same &= std::memcmp(got.data(), w.data, bytes) == 0;
      cudaFree(from), cudaFree(to);
    }
    (void)device;
    report.require("weights packed on the device as on the host", same);
  }

  void one(Head& head, const Sizes& s, const Settings& settings, int repetitions) {
    const std::string name =
        std::string(s.name) + ", clusters of " + std::to_string(settings.cluster) + " x " +
        std::to_string(settings.clusters) + ", barrier " + std::to_string(settings.barrier) + ", units " +
        std::to_string(settings.min_units) + ", slots " + std::to_string(settings.max_slots);
    if (const std::string why = head.build_table(settings); !why.empty()) {
      std::printf("%s: refused: %s\n", name.c_str(), why.c_str());
      return;
    }
    const size_t bytes = head.heap().used;
    std::byte* device;
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&device), bytes));
    TEST_CUDA(cudaMemcpy(device, head.heap().base, bytes, cudaMemcpyHostToDevice));
    const auto t = std::make_unique<Table>(head.table());
    relocate(*t, {head.heap().base, device, bytes});
    extras.give(*t);
    const size_t at = head.actions().base - head.heap().base;
    std::vector<float> first, got(size_t(s.m) * 32);
    bool same = true;
    for (int i = 0; i < repetitions; ++i) {
      // memory but for the actions is as the run before has left it
      TEST_CUDA(cudaMemcpy(device + at, head.heap().base + at, got.size() * 4, cudaMemcpyHostToDevice));
      TEST_CUDA(cuda::head::launch(*t, nullptr));
      const cudaError_t error = cudaDeviceSynchronize();
      if (error != cudaSuccess) {
        std::printf("%s: %s\n", name.c_str(), cudaGetErrorString(error));
        std::exit(2);
      }
      if (!extras.well(*t, name)) {
        stuck = true, report.require(name + ": no wait is given up", false);
        break;
      }
      TEST_CUDA(cudaMemcpy(got.data(), device + at, got.size() * 4, cudaMemcpyDeviceToHost));
      if (i == 0) {
        first = got;
        if (settings.cluster == 8 && settings.barrier == 0 && settings.min_units == 1) packing(head, device);
        const double error = head.error(got);
        std::printf("  %s: error %.2e\n", name.c_str(), error);
        report.check(name, error, 6e-3);
      }
      same &= got == first;
    }
    report.require(name + ": the same bits each time", same);
    cudaFree(device);
  }

  int all() {
    const Sizes sizes[] = {
        {"tiny, adaptive", 2, 96, 136, 2, 1, 64, 21, 10, 2, true, false, false},
        {"tiny, cross", 2, 80, 72, 3, 1, 64, 33, 17, 2, false, true, true},
        {"tiny, heads of 256", 1, 128, 64, 2, 1, 256, 40, 50, 2, true, false, false},
        {"tiny, 64 rows", 2, 72, 200, 4, 2, 128, 9, 64, 1, false, false, true},
        {"two layers of SmolVLA", 2, 720, 2048, 15, 5, 64, 177, 50, 2, false, true, true},
        {"a layer of pi0.5", 1, 1024, 4096, 8, 1, 256, 560, 50, 2, true, false, false},
        {"a layer of pi0.5, H=10", 1, 1024, 4096, 8, 1, 256, 560, 10, 2, true, false, false},
        {"a layer of pi0.5, 3 cameras", 1, 1024, 4096, 8, 1, 256, 816, 51, 1, true, false, false},
    };
    for (const Sizes& s : sizes) {
      Head head(s);
      for (int cluster : {8, 4}) {
        Settings settings;
        settings.cluster = cluster,
        settings.clusters = cuda::head::resident_clusters(cluster, cuda::head::kSharedOfBlock);
        if (settings.clusters > 128 / cluster) settings.clusters = 128 / cluster;
        if (settings.clusters == 0) {
          std::printf("clusters of %d do not run here\n", cluster);
          continue;
        }
        one(head, s, settings, quick ? 1 : 20);
        if (stuck) return 3;
        if (quick) break;
        Settings other = settings;
        other.barrier = 1;
        one(head, s, other, 20);
        other = settings, other.min_units = 2;
        one(head, s, other, 3);
        other = settings, other.max_slots = 3;
        one(head, s, other, 3);
        other = settings, other.clusters = settings.clusters - 1;
        one(head, s, other, 3);
        if (stuck) return 3;
      }
      if (quick && s.m == 17) break;
    }
    std::printf("head_check: %d checks, %d failures, worst error %.2e\n", report.checks, report.failures,
                report.worst);
    return report.failures ? 1 : 0;
  }
};

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  vla::test::Suite suite;
  suite.quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  return suite.all();
}
