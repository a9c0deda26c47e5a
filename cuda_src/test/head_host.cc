// The persistent head's tables, on the host: no GPU, no CUDA library. A scalar walk over exactly the tables,
// packings and index functions that the kernel uses is compared with the operations in double precision; and
// the kernel's waiting (rings, multicast, sums, the barrier between blocks) is played with several schedules.
//   head_host [quick]
//   g++ -std=c++20 -O2 -I cuda_src cuda_src/test/head_host.cc cuda_src/cuda/head/build.cc -o head_host &&
//   ./head_host
#include "head_case.h"
#include "head_protocol.h"

// Clusters that devices hold: 132 multiprocessors in groups of 16 and 18, and with smaller groups among them.
constexpr int kHeld[] = {16, 15, 14};

// Whether every qkv of the table is joined to its attention, none, or (a mistake) some: 1, 0, -1.
int joined(const vla::cuda::head::Table& t) {
  int qkv = 0, joined = 0;
  for (int i = 0; i < t.phases; ++i) {
    if (t.phase[i].kind != vla::cuda::head::Kind::kQkv) continue;
    ++qkv, joined += t.phase[i].joined && t.phase[i + 1].joined;
  }
  return joined == 0 ? 0 : joined == qkv ? 1 : -1;
}

int main(int argc, char** argv) {
  using namespace vla::test::loop;
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;  // tiny sizes and one schedule
  int failures = 0;
  const Sizes sizes[] = {
      {"tiny, adaptive", 2, 96, 136, 2, 1, 64, 21, 10, 2, true, false, false},
      {"tiny, cross", 2, 80, 72, 3, 1, 64, 33, 17, 2, false, true, true},
      {"tiny, heads of 256", 1, 128, 64, 2, 1, 256, 40, 50, 2, true, false, false},
      {"tiny, 64 rows", 2, 72, 200, 4, 2, 128, 9, 64, 1, false, false, true},
      {"tiny, a state", 2, 96, 136, 4, 1, 64, 40, 18, 3, false, false, true, 1},
      {"tiny, three rows before", 2, 80, 72, 3, 1, 64, 33, 51, 2, false, false, false, 3},
      {"tiny, heads stacked", 1, 128, 64, 8, 1, 256, 40, 17, 2, true, false, false},
      {"tiny, two stacks, cross", 2, 72, 64, 10, 2, 128, 27, 20, 2, false, true, false},
      {"tiny, 256 columns", 1, 64, 40, 8, 1, 256, 70, 64, 1, false, false, true},
      {"one layer of SmolVLA", 2, 720, 2048, 15, 5, 64, 177, 50, 1, false, true, true},
      {"one layer of pi0.5", 1, 1024, 4096, 8, 1, 256, 560, 50, 1, true, false, false},
  };
  for (const Sizes& s : sizes) {
    if (quick && s.width > 128) continue;
    Head head(s);
    for (const int clusters : kHeld) {
      Settings settings;
      settings.clusters = clusters;
      for (int variant : {0, 1, 2}) {  // units of two, nothing joined
        settings.min_units = variant == 1 ? 2 : 1, settings.joins = variant != 2;
        if (variant > 0 && (s.width > 128 || (variant == 2 && s.d != 64))) continue;
        if (const std::string why = head.build_table(settings); !why.empty()) {
          std::printf("     %s, %d clusters: refused: %s\n", s.name, clusters, why.c_str());
          continue;
        }
        const auto& t = head.table();
        const double error = head.error(head.walked());
        // where the table is wrong it is near 1; SmolVLA's and only heads of its size are joined
        const bool ok = error < 2e-3 && joined(t) == (s.d == 64 && settings.joins);
        failures += !ok;
        std::printf("%s %s, %d clusters, units %d%s: error %.2e; x %d KB, %d slots of %d KB\n",
                    ok ? "ok  " : "FAIL", s.name, clusters, settings.min_units, joined(t) ? ", joined" : "",
                    error, t.x_bytes / 1024, t.slots, t.stage / 1024);
      }
    }
  }
  const Sizes real[] = {
      {"SmolVLA", 16, 720, 2048, 15, 5, 64, 177, 50, 10, false, true, true},
      {"pi0.5", 18, 1024, 4096, 8, 1, 256, 560, 50, 10, true, false, false},
      {"pi0.5 H=10", 18, 1024, 4096, 8, 1, 256, 560, 10, 10, true, false, false},
      {"pi0", 18, 1024, 4096, 8, 1, 256, 560, 51, 10, false, false, true, 1},
      {"pi0.5, 3 cameras", 18, 1024, 4096, 8, 1, 256, 816, 50, 10, true, false, false},
      {"pi0, 64 rows", 18, 1024, 4096, 8, 1, 256, 561, 64, 10, false, false, true},
  };
  for (Sizes s : real) {
    if (quick && (s.m == 10 || s.m == 64 || s.prefix > 560)) continue;
    // the protocol needs the shape of the table only: two layers stand for all, in more steps
    s.layers = 2, s.steps = 30;
    Head head(s);
    bool runs = false;
    for (const int clusters : kHeld) {
      Settings settings;
      settings.clusters = clusters;
      if (const std::string why = head.build_table(settings); !why.empty()) {
        std::printf("     %s, %d clusters: refused: %s\n", s.name, clusters, why.c_str());
        continue;
      }
      runs |= clusters == 15;
      const auto play = [&](int seeds) {
        std::string wrong = vla::test::play(head.table(), seeds);
        if (joined(head.table()) != (s.d == 64)) wrong += "qkv is not joined as it should be";
        failures += !wrong.empty();
        std::printf("%s %s, %d clusters, %d slots: protocol of %d phases%s\n",
                    wrong.empty() ? "ok  " : "FAIL", s.name, clusters, head.table().slots,
                    head.table().phases * head.table().steps, wrong.empty() ? "" : (": " + wrong).c_str());
      };
      play(quick ? 1 : 3);
      settings.max_slots = 5;  // a ring of an odd number of slots, if it were made
      if (clusters != 15 || !head.build_table(settings).empty()) continue;
      play(1);
    }
    if (!runs) std::printf("FAIL %s: no table for 15 clusters\n", s.name), ++failures;
  }
  std::printf("head_host: %d failures\n", failures);
  return failures ? 1 : 0;
}
