// Times the persistent action head against today's kernels, in the same run on the same weights.
//   head_persist_time [all] [NAME]    all: every variant of the table; NAME: only loops whose name has it
// Prints for each loop: today's kernels, the variants, and for the best of them its phases (clocks of block
// 0), the barriers alone, the weights alone, and what leaves one thing out. The last lines are a table of the
// whole loops. Exit code 1 where a variant's actions are not today's kernels' or not the same bits each time,
// 3 where a wait was given up.
#include "head_loop.h"
#include "head_run.h"

namespace vla::test {
namespace {

using cuda::head::Fact;
using cuda::head::Memory;
using cuda::head::Settings;

// Of the actions from those of today's kernels: two bf16 pipelines over a whole loop are some 1e-2 apart.
constexpr double kApart = 5e-2;

float median(const std::vector<float>& t) { return t.empty() ? NAN : t[t.size() / 2]; }
float part(const std::vector<float>& t, double q) { return t.empty() ? NAN : t[size_t(q * (t.size() - 1))]; }

class Persistent {
 public:
  Persistent(const Head& head, const Settings& settings, cudaStream_t stream) : stream_(stream) {
    std::vector<Op> body;
    std::vector<Fact> facts;
    for (const Timed& t : head.ops()) {
      body.push_back(t.op);
      facts.push_back({head.sizes().prefix, t.shift, 0});
    }
    const Memory memory{
        [this](size_t bytes) { return take(bytes); },
        [this](const Phase& p, const Weight& w) {
          auto* to = reinterpret_cast<cuda::head::Bits*>(take(cuda::head::packed_elements(p) * 2));
          TEST_CUDA(cuda::head::pack(to, p, static_cast<const cuda::head::Bits*>(w.data), w.n.data(),
                                     int(w.n.size()), w.packing == Packing::kInterleaved, w.k, stream_));
          packed_bytes += cuda::head::packed_elements(p) * 2;
          return to;
        }};
    table = std::make_unique<Table>();
    std::memset(static_cast<void*>(table.get()), 0, sizeof(Table));
    refused = cuda::head::build(*table, body, head.sizes().steps, facts, settings, memory);
    TEST_CUDA(cudaStreamSynchronize(stream_));
    extras.give(*table);
  }
  ~Persistent() {
    for (void* p : memory_) cudaFree(p);
  }

  // Replays of one graph, microseconds, sorted; empty where a wait was given up. `parts`: see Table.
  std::vector<float> time(int warm_up, int count, int parts = 15) {
    table->parts = parts;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    // once without a graph: a wait that is given up would take seconds in each replay
    TEST_CUDA(cuda::head::launch(*table, stream_));
    TEST_CUDA(cudaStreamSynchronize(stream_));
    std::vector<float> times;
    if (!extras.well(*table, "parts " + std::to_string(parts))) {
      table->parts = 15;
      return times;
    }
    TEST_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    TEST_CUDA(cuda::head::launch(*table, stream_));
    TEST_CUDA(cudaStreamEndCapture(stream_, &graph));
    TEST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    times = replay_times(exec, stream_, warm_up, count);
    TEST_CUDA(cudaGraphExecDestroy(exec));
    TEST_CUDA(cudaGraphDestroy(graph));
    table->parts = 15;
    if (!extras.well(*table, "parts " + std::to_string(parts))) times.clear();
    return times;
  }
  std::vector<float> result(Head& head) {
    head.reset();
    TEST_CUDA(cuda::head::launch(*table, stream_));
    TEST_CUDA(cudaStreamSynchronize(stream_));
    if (!extras.well(*table, "a whole loop")) return {};
    return head.actions();
  }
  // By kind of phase, on block 0: from the end of the phase before to the barrier passed, x there, sums done,
  // said done.
  void phases() {
    extras.give(*table, true);
    for (int i = 0; i < 3; ++i) TEST_CUDA(cuda::head::launch(*table, stream_));
    TEST_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<int64_t> s = extras.stamps(*table);
    const std::vector<float> t = time(3, 20);
    const size_t count = s.size() / 4;
    const double to_us = double(median(t)) / double(s[count * 4 - 4 + 3] - s[0]);
    std::printf(
        "    block 0, us (barrier + x + sums + end), by kind of phase; clock %.2f GHz; with stamps %.1f us\n",
        1e-3 / to_us, double(median(t)));
    for (int kind = 0; kind < 5; ++kind) {
      double sums[4] = {}, total = 0.0;
      int n = 0;
      for (size_t i = 1; i < count; ++i) {
        const int64_t *at = &s[i * 4], before = s[i * 4 - 1];
        if (int(table->phase[i % table->phases].kind) != kind || !at[3] || !at[2] || !at[1] || !before)
          continue;
        const int64_t from[4] = {before, at[0], at[1], at[2]};
        for (int k = 0; k < 4; ++k) sums[k] += double(at[k] - from[k]) * to_us;
        total += double(at[3] - before) * to_us;
        ++n;
      }
      if (n > 0) {
        std::printf("    %-10s %5.2f = %.2f + %.2f + %.2f + %.2f  (%d)\n", kind_name(Kind(kind)), total / n,
                    sums[0] / n, sums[1] / n, sums[2] / n, sums[3] / n, n);
      }
    }
    // single phases of one step, to tell o from down and self from cross attention
    const size_t step = size_t(table->phases) * (table->steps > 1 ? 1 : 0);
    for (int i = 1; i < 14 && i < table->phases; ++i) {
      const int64_t* at = &s[(step + i) * 4];
      std::printf("    number %2d %-10s %5.2f = %.2f + %.2f + %.2f + %.2f\n", i,
                  kind_name(table->phase[i].kind), double(at[3] - at[-1]) * to_us,
                  double(at[0] - at[-1]) * to_us, double(at[1] - at[0]) * to_us,
                  double(at[2] - at[1]) * to_us, double(at[3] - at[2]) * to_us);
    }
    extras.give(*table);
  }

  std::string refused;
  std::unique_ptr<Table> table;
  Extras extras;
  size_t packed_bytes = 0;

 private:
  std::byte* take(size_t bytes) {
    void* p;
    TEST_CUDA(cudaMalloc(&p, bytes + 256));
    TEST_CUDA(cudaMemset(p, 0, bytes + 256));
    TEST_CUDA(cudaDeviceSynchronize());
    memory_.push_back(p);
    return static_cast<std::byte*>(p);
  }
  cudaStream_t stream_;
  std::vector<void*> memory_;
};

std::string name_of(const Settings& s) {
  return std::to_string(s.clusters) + " clusters, units " + std::to_string(s.min_units) + ", slots " +
         std::to_string(s.max_slots) + ", stages of " +
         (s.stage ? std::to_string(s.stage / 1024) + " KB" : "its own choice") +
         (s.joins ? "" : ", nothing joined");
}

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  using namespace vla::test;
  bool all = false;
  std::string only;
  for (int i = 1; i < argc; ++i) std::strcmp(argv[i], "all") == 0 ? void(all = true) : void(only = argv[i]);
  cudaDeviceProp properties;
  TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
  vla::cuda::Launch at;
  TEST_CUDA(cudaStreamCreateWithFlags(&at.stream, cudaStreamNonBlocking));
  at.sms = properties.multiProcessorCount, at.arch = properties.major * 10 + properties.minor;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was printed before a time limit is not lost
  const int held = vla::cuda::head::resident_clusters();
  std::printf("%s, %d multiprocessors; %d clusters at once\n", properties.name, at.sms, held);
  bool good = true;
  std::string table;
  for (const Sizes& s : kLoops) {
    if (std::string(s.name).find(only) == std::string::npos) continue;
    Head head(s, at);
    at.pdl = true;
    std::printf("%s\n", s.name);
    const std::vector<float> wanted = head.result(at), today = head.time(at, 10, 100);
    at.pdl = false;
    std::printf("  today's kernels: p50 %.1f p99 %.1f us, %zu launches\n", median(today), part(today, 0.99),
                head.launches());
    std::vector<Settings> variants;
    Settings v;
    v.clusters = held;
    variants.push_back(v);
    if (s.d == 64) {
      v.joins = false;
      variants.push_back(v);
      v.joins = true;
    }
    for (int stage : {8192, 16384, 20480, 24576}) {
      v.stage = stage;
      if (all) variants.push_back(v);
    }
    float best = INFINITY;
    Settings chosen;
    for (const Settings& v : variants) {
      Persistent p(head, v, at.stream);
      if (!p.refused.empty()) {
        std::printf("  %s: refused: %s\n", name_of(v).c_str(), p.refused.c_str());
        continue;
      }
      const std::vector<float> result = p.result(head);
      if (result.empty()) return 3;
      double difference = 0.0, norm = 0.0;
      for (size_t i = 0; i < result.size(); ++i) {
        difference += (double(result[i]) - wanted[i]) * (double(result[i]) - wanted[i]),
            norm += double(wanted[i]) * wanted[i];
      }
      bool same = true;
      for (int i = 0; i < 20; ++i) same &= p.result(head) == result;
      const std::vector<float> t = p.time(10, 100);
      std::printf("  %s: p50 %.1f p99 %.1f us, %.2f a phase; from today's %.1e; the same bits: %s\n",
                  name_of(v).c_str(), median(t), part(t, 0.99), median(t) / float(p.table->phases * s.steps),
                  std::sqrt(difference / norm), same ? "yes" : "NO");
      if (!(same && std::sqrt(difference / norm) < kApart)) {
        std::printf("  FAIL: limit %.0e, and the same bits\n", kApart), good = false;
        continue;
      }
      if (median(t) < best) best = median(t), chosen = v;
    }
    if (!(best < INFINITY)) continue;
    Persistent p(head, chosen, at.stream);
    std::printf("  best: %s; %d KB of x, %d slots of weights\n", name_of(chosen).c_str(),
                p.table->x_bytes / 1024, p.table->slots);
    p.phases();
    const double phases = double(p.table->phases) * s.steps;
    const float barriers = median(p.time(3, 20, 2)), weights = median(p.time(3, 20, 1));
    std::printf("    barriers alone %.1f us (%.2f each); weights alone %.1f us (%.2f TB/s)\n", barriers,
                barriers / phases, weights, double(p.packed_bytes) * s.steps / weights * 1e-6);
    std::printf("    barriers and x %.1f; all but sums and ends %.1f; all but weights %.1f us\n",
                median(p.time(3, 20, 6)), median(p.time(3, 20, 7)), median(p.time(3, 20, 14)));
    head.reset();  // the parts above leave nonsense in the actions
    const std::vector<float> whole = p.time(20, 200);
    char line[200];
    std::snprintf(line, sizeof line, "| %-12s | %7.1f | %7.1f | %7.1f | %.2f | %s |\n", s.name, median(today),
                  median(whole), part(whole, 0.99), median(whole) / phases, name_of(chosen).c_str());
    table += line;
  }
  std::printf("\n| loop | today, us | persistent, us | p99 | a phase | variant |\n%s", table.c_str());
  return good ? 0 : 1;
}
