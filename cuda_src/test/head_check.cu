// The persistent action head on a GPU against double precision: sizes of every kind, the variants of the
// table, the same bits each time and in a graph, stale memory, NaN, and the packing of weights. Where
// something is wrong it says what: which part of the kernel alone already waits for ever, and which phase of
// the first step is the first to write something else than the host's walk over the same table. Exit code 0
// when all hold, 1 where something is wrong, 2 on an error of CUDA's, 3 where a wait was given up.
//   head_check [quick] [NAME]    quick: the smallest sizes once, for compute-sanitizer; NAME: of sizes that
//                                have it in theirs
#include <algorithm>
#include <cstring>

#include "head_case.h"
#include "head_run.h"

namespace vla::test {
namespace {

using cuda::head::Bits;
using cuda::head::Settings;
using loop::Head;
using loop::Sizes;

constexpr double kLimit = 6e-3;  // of the actions' error; two bf16 roundings a layer come to 1e-3

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
    } else if (p.kind == Kind::kLinear) {
      move(p.linear.fixed);
    } else if (p.kind == Kind::kEuler) {
      auto& e = p.euler;
      move(e.sample), move(e.previous), move(e.weight), move(e.gain.p), move(e.time.p);
    }
  }
}

// What a phase writes, in the case's memory.
struct Region {
  const char* name;
  const std::byte* at;
  size_t bytes;
  bool f32;
};
std::vector<Region> written(const Table& t, const Phase& p) {
  const auto bytes_of = [](const void* at) { return static_cast<const std::byte*>(at); };
  const size_t row = size_t(t.rows) * cuda::head::kChunkBytes;
  const bool queries = p.kind == Kind::kQkv;
  if (queries && p.joined) return {};  // in shared memory alone
  std::vector<Region> all{
      {queries ? "queries" : "out", bytes_of(p.out),
       queries ? cuda::head::query_elements(p) * 2 : cuda::head::divide_up(p.n, cuda::head::kChunk) * row,
       false}};
  if (p.squares_out)
    all.push_back({"squares", bytes_of(p.squares_out), size_t(64) * cuda::head::kSquareParts * 4, true});
  if (p.kind == Kind::kQkv && p.qkv.fresh_k) {
    const size_t fresh = size_t(p.qkv.units[1]) * 16 * cuda::head::kCluster * cuda::head::kFreshRows * 2;
    all.push_back({"k", bytes_of(p.qkv.fresh_k), fresh, false});
    all.push_back({"v", bytes_of(p.qkv.fresh_v), fresh, false});
  }
  if (p.kind == Kind::kEuler)
    all.push_back({"actions", bytes_of(p.euler.sample), size_t(t.m - t.first) * p.euler.ld_sample * 4, true});
  return all;
}
double difference(const std::byte* got, const std::byte* want, size_t bytes, bool f32) {
  double sum = 0.0, norm = 1e-30;
  for (size_t i = 0; i < bytes / (f32 ? 4 : 2); ++i) {
    const double a = f32 ? double(reinterpret_cast<const float*>(got)[i])
                         : double(loop::from_bits(reinterpret_cast<const Bits*>(got)[i]));
    const double b = f32 ? double(reinterpret_cast<const float*>(want)[i])
                         : double(loop::from_bits(reinterpret_cast<const Bits*>(want)[i]));
    sum += (a - b) * (a - b), norm += b * b;
  }
  return std::sqrt(sum / norm);
}

// A case's table and memory on the device.
class Copy {
 public:
  Copy(Head& head, const Sizes& s, Extras& extras) : head_(head), s_(s), extras_(extras) {
    bytes_ = head.heap().used;
    TEST_CUDA(cudaMalloc(reinterpret_cast<void**>(&device_), bytes_));
    send();
    table = std::make_unique<Table>(head.table());
    relocate(*table, {head.heap().base, device_, bytes_});
    extras.give(*table);
    actions_ = head.actions().base - head.heap().base;
  }
  ~Copy() { cudaFree(device_); }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;

  void send() { TEST_CUDA(cudaMemcpy(device_, head_.heap().base, bytes_, cudaMemcpyHostToDevice)); }
  // The noise back; all other memory stays as the run before has left it.
  void reset(float last = 0.0f) {
    std::vector<float> noise(size_t(s_.actions()) * 32);
    std::memcpy(noise.data(), head_.heap().base + actions_, noise.size() * 4);
    noise.back() += last;
    TEST_CUDA(cudaMemcpy(device_ + actions_, noise.data(), noise.size() * 4, cudaMemcpyHostToDevice));
  }
  std::vector<float> actions() const {
    std::vector<float> got(size_t(s_.actions()) * 32);
    TEST_CUDA(cudaMemcpy(got.data(), device_ + actions_, got.size() * 4, cudaMemcpyDeviceToHost));
    return got;
  }
  // Waits for the kernel; false where a wait was given up.
  bool ended(const std::string& what) {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) {
      std::printf("FAIL %s: %s\n", what.c_str(), cudaGetErrorString(error));
      std::exit(2);
    }
    return extras_.well(*table, what);
  }
  bool run(const std::string& what) {
    TEST_CUDA(cuda::head::launch(*table, nullptr));
    return ended(what);
  }
  // Replays of one graph give the bits of `want`.
  bool replays(const std::vector<float>& want, int count, const std::string& what) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    TEST_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    TEST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    TEST_CUDA(cuda::head::launch(*table, stream));
    TEST_CUDA(cudaStreamEndCapture(stream, &graph));
    TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    bool same = true;
    for (int i = 0; i < count && same; ++i) {
      reset();
      TEST_CUDA(cudaGraphLaunch(exec, stream));
      same = ended(what) && actions() == want;
    }
    TEST_CUDA(cudaGraphExecDestroy(exec));
    TEST_CUDA(cudaGraphDestroy(graph));
    TEST_CUDA(cudaStreamDestroy(stream));
    return same;
  }
  // The first step phase by phase, each time from the start: which is the first to write what the walk does
  // not.
  void blame() {
    loop::Heap& heap = head_.heap();
    const Table& here = head_.table();
    const std::vector<std::byte> clean(heap.base, heap.base + bytes_);
    std::vector<std::vector<std::byte>> want(here.phases);
    head_.walk_and_look([&](int phase) {
      for (const Region& r : written(here, here.phase[phase]))
        want[phase].insert(want[phase].end(), r.at, r.at + r.bytes);
    });
    std::memcpy(heap.base, clean.data(), bytes_);
    const int phases = table->phases, steps = table->steps;
    table->steps = 1;
    for (int n = 1; n <= phases; ++n) {
      if (here.phase[n - 1].joined && here.phase[n - 1].kind == Kind::kQkv) continue;  // with what follows
      table->phases = n;
      send();
      const std::string what = "phases 0 to " + std::to_string(n - 1) + " of the first step";
      if (!run(what)) break;
      std::printf("    phase %2d %-9s", n - 1, kind_name(here.phase[n - 1].kind));
      size_t at = 0;
      for (const Region& r : written(here, here.phase[n - 1])) {
        std::vector<std::byte> got(r.bytes);
        TEST_CUDA(cudaMemcpy(got.data(), device_ + (r.at - heap.base), r.bytes, cudaMemcpyDeviceToHost));
        std::printf("  %s %.1e", r.name, difference(got.data(), want[n - 1].data() + at, r.bytes, r.f32));
        at += r.bytes;
      }
      std::printf("\n");
    }
    table->phases = phases, table->steps = steps;
    send();
  }

  std::unique_ptr<Table> table;

 private:
  Head& head_;
  const Sizes& s_;
  Extras& extras_;
  std::byte* device_ = nullptr;
  size_t bytes_ = 0, actions_ = 0;
};

struct Suite {
  Report report;
  Extras extras;
  bool quick = false, stuck = false;
  std::string only;
  int refused = 0, ran = 0, joined = 0;  // tables

  void packing(Head& head) {
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
    report.require("weights packed on the device as on the host", same);
  }

  // Parts of the kernel alone, the simplest first: the first that gives up names what does not work.
  bool mechanisms(Copy& c, const std::string& name) {
    static const struct {
      int parts;
      const char* what;
    } kAll[] = {{2, "barriers"},           {1, "weights"},          {6, "barriers and x"},
                {7, "all but sums, ends"}, {14, "all but weights"}, {15, "all"}};
    bool good = true;
    for (const auto& one : kAll) {
      c.table->parts = one.parts;
      const bool well = c.run(name + ": " + one.what);
      std::printf("  %s: %s alone: %s\n", name.c_str(), one.what, well ? "ends" : "GIVES UP");
      report.require(name + ": " + one.what + " alone ends", well);
      good &= well;
    }
    c.table->parts = 15;
    c.send();
    return good;
  }

  void one(Head& head, const Sizes& s, const Settings& settings, int repetitions, bool first_of_all) {
    const std::string name = std::string(s.name) + ", " + std::to_string(settings.clusters) +
                             " clusters, units " + std::to_string(settings.min_units) + ", slots " +
                             std::to_string(settings.max_slots) + (settings.joins ? "" : ", nothing joined");
    if (const std::string why = head.build_table(settings); !why.empty()) {
      std::printf("%s: refused: %s\n", name.c_str(), why.c_str());
      ++refused;
      return;
    }
    ++ran;
    const bool is_joined = std::any_of(head.table().phase, head.table().phase + head.table().phases,
                                       [](const Phase& p) { return p.joined != 0; });
    joined += is_joined;
    Copy c(head, s, extras);
    bool good = !first_of_all || mechanisms(c, name);
    std::vector<float> first;
    bool same = true, well = true;
    for (int i = 0; i < repetitions && well; ++i) {
      c.reset();
      well = c.run(name);
      if (i == 0) first = c.actions();
      same &= well && c.actions() == first;
    }
    report.require(name + ": no wait is given up", well);
    if (!well) stuck = true;
    const double error = head.error(first);
    std::printf("  %s%s: error %.2e\n", name.c_str(), is_joined ? ", joined" : "", error);
    report.check(name, error, kLimit);
    report.require(name + ": the same bits each time", same);
    good &= well && same && error <= kLimit;
    if (good && !quick) {
      report.require(name + ": the same bits in a graph", c.replays(first, 3, name + ", a graph"));
      // a NaN comes out as NaN, hangs nothing, and is gone with the next run
      c.reset(NAN);
      report.require(name + ": a run on NaN ends", c.run(name + ", NaN"));
      const std::vector<float> nan = c.actions();
      report.require(name + ": NaN passes through",
                     std::all_of(nan.end() - 32, nan.end(), [](float v) { return std::isnan(v); }));
      c.reset();
      report.require(name + ": nothing of a NaN stays", c.run(name) && c.actions() == first);
    }
    if (!good) c.blame();
    if (settings.min_units == 1 && settings.max_slots == cuda::head::kMaxSlots && !stuck) {
      packing(head);
    }
  }

  int all() {
    cudaDeviceProp properties;
    TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
    const int held = cuda::head::resident_clusters();
    std::printf("%s, %d multiprocessors; %d clusters at once\n", properties.name,
                properties.multiProcessorCount, held);
    report.require("clusters of 8 blocks run here", held > 0);
    if (held == 0) return 1;
    const Sizes sizes[] = {
        {"tiny, adaptive", 2, 96, 136, 2, 1, 64, 21, 10, 2, true, false, false},
        {"tiny, cross", 2, 80, 72, 3, 1, 64, 33, 17, 2, false, true, true},
        {"tiny, heads stacked", 1, 128, 64, 8, 1, 256, 40, 17, 2, true, false, false},
        {"tiny, heads of 256", 1, 128, 64, 2, 1, 256, 40, 50, 2, true, false, false},
        {"tiny, 64 rows", 2, 72, 200, 4, 2, 128, 9, 64, 1, false, false, true},
        {"tiny, a state", 2, 96, 136, 4, 1, 64, 40, 18, 3, false, false, true, 1},
        {"tiny, three rows before", 2, 80, 72, 3, 1, 64, 33, 51, 2, false, false, false, 3},
        {"tiny, two stacks, cross", 2, 72, 64, 10, 2, 128, 27, 20, 2, false, true, false},
        {"tiny, 256 columns", 1, 64, 40, 8, 1, 256, 70, 64, 1, false, false, true},
        {"tiny, 30 steps", 2, 96, 136, 4, 1, 64, 40, 50, 30, true, false, false},
        {"tiny, a layer of each, adaptive", 2, 96, 136, 6, 2, 64, 100, 23, 3, true, true, false},
        {"two layers of SmolVLA", 2, 720, 2048, 15, 5, 64, 177, 50, 2, false, true, true},
        {"two layers of SmolVLA, H=10", 2, 720, 2048, 15, 5, 64, 177, 10, 2, false, true, true},
        {"two layers of SmolVLA, 1 camera", 2, 720, 2048, 15, 5, 64, 113, 50, 2, false, true, true},
        {"two layers of SmolVLA, 3 cameras", 2, 720, 2048, 15, 5, 64, 241, 50, 2, false, true, true},
        {"two layers of SmolVLA, odd", 2, 720, 2048, 15, 5, 64, 305, 63, 2, false, true, true},
        {"a layer of pi0.5", 1, 1024, 4096, 8, 1, 256, 560, 50, 2, true, false, false},
        {"a layer of pi0, H=10", 1, 1024, 4096, 8, 1, 256, 560, 11, 2, false, false, true, 1},
        {"a layer of pi0.5, 3 cameras", 1, 1024, 4096, 8, 1, 256, 816, 51, 1, true, false, false},
    };
    for (const Sizes& s : sizes) {
      if (std::string(s.name).find(only) == std::string::npos) continue;
      Head head(s);
      const int before = ran;
      Settings settings;
      settings.clusters = held;
      one(head, s, settings, quick ? 1 : 20, &s == sizes);
      if (!quick) {
        Settings other = settings;
        other.clusters = held - 1;
        one(head, s, other, 3, false);
        if (s.d == 64) {
          other = settings, other.joins = false;
          one(head, s, other, 3, false);
        }
        if (s.width <= 128) {
          other = settings, other.min_units = 2;
          one(head, s, other, 3, false);
          other = settings, other.max_slots = 5;
          one(head, s, other, 3, false);
        }
      }
      report.require(std::string(s.name) + ": some table can express it here", ran > before);
      if (stuck) break;  // every variant of these sizes has had its turn; the others would not say more
      if (quick && &s == sizes + 2) break;
    }
    if (only.empty()) report.require("some loop has qkv joined to its attention", joined > 0);
    std::printf("head_check: %d checks, %d failures, %d tables refused, worst error %.2e\n", report.checks,
                report.failures, refused, report.worst);
    return stuck ? 3 : report.failures ? 1 : 0;
  }
};

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was printed before a time limit is not lost
  vla::test::Suite suite;
  for (int i = 1; i < argc; ++i)
    std::strcmp(argv[i], "quick") == 0 ? void(suite.quick = true) : void(suite.only = argv[i]);
  return suite.all();
}
