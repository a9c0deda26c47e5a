// The persistent prefix's tables, on the host: no GPU, no CUDA library. A walk over exactly the tables,
// packings and index functions that the kernel uses is compared with the operations in double precision; and
// the kernel's waiting is played with several schedules.
//   prefix_host [quick]
//   g++ -std=c++20 -O2 -I cuda_src cuda_src/test/prefix_host.cc cuda_src/cuda/prefix/build.cc -pthread
#include "prefix_case.h"
#include "prefix_protocol.h"

int main(int argc, char** argv) {
  using namespace vla::test::layers;
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;  // tiny sizes and one schedule
  int failures = 0;
  const Sizes sizes[] = {
      {"tiny", 3, 128, 256, 2, 1, 21, true},
      {"tiny, many heads", 2, 192, 128, 6, 2, 113, false},
      {"tiny, long", 3, 128, 320, 3, 3, 250, true},
      {"two layers of SmolVLA", 2, 960, 2560, 15, 5, 177, true},
  };
  for (const Sizes& s : sizes) {
    if (quick && s.width > 200) continue;
    Prefix prefix(s);
    for (const int ctas : {132, 114}) {
      for (const int split : {1, 2}) {
        pre::Settings settings;
        settings.ctas = ctas, settings.split = split;
        if (const std::string why = prefix.build_table(settings); !why.empty()) {
          std::printf("     %s, %d blocks: refused: %s\n", s.name, ctas, why.c_str());
          continue;
        }
        const Table& t = *prefix.table;
        for (const vla::View& v : prefix.results)
          for (int i = 0; i < v.rows; ++i)
            for (int j = 0; j < v.cols; ++j) Heap::set(v, i, j, NAN);
        prefix.walk();
        const double error = prefix.error(Prefix::read);
        const bool ok = error < 6e-3;  // where the table is wrong it is near 1
        failures += !ok;
        std::printf("%s %s, %d blocks, split %d: error %.2e; %d phases, %d slots of %d KB, %d rows owned\n",
                    ok ? "ok  " : "FAIL", s.name, ctas, split, error, t.phases, t.slots, t.slot / 1024,
                    t.owned);
      }
    }
  }
  const Sizes real[] = {
      {"SmolVLA, 1 camera", 16, 960, 2560, 15, 5, 113, true},
      {"SmolVLA, 2 cameras", 16, 960, 2560, 15, 5, 177, true},
      {"SmolVLA, 3 cameras", 16, 960, 2560, 15, 5, 241, true},
      {"tiny, ragged", 4, 128, 320, 3, 3, 100, true},
  };
  for (Sizes s : real) {
    if (quick && s.m != 177) continue;
    s.layers = 4;  // the protocol needs the shape of the table only
    Prefix prefix(s);
    for (const int ctas : {132, 120, 114}) {
      for (const int slots : {4, 5, 12, 48 * 1024}) {
        pre::Settings settings;
        settings.ctas = ctas, settings.max_slots = std::min(slots, 12),
        settings.slot = slots > 12 ? slots : 0;
        if (const std::string why = prefix.build_table(settings); !why.empty()) {
          std::printf("     %s, %d blocks: refused: %s\n", s.name, ctas, why.c_str());
          failures += ctas >= 120 && std::string(s.name).find("SmolVLA") == 0;
          continue;
        }
        const std::string wrong = vla::test::play_prefix(*prefix.table, quick ? 1 : 3);
        failures += !wrong.empty();
        std::printf("%s %s, %d blocks, %d slots: protocol of %d phases%s\n", wrong.empty() ? "ok  " : "FAIL",
                    s.name, ctas, prefix.table->slots, prefix.table->phases,
                    wrong.empty() ? "" : (": " + wrong).c_str());
      }
    }
  }
  std::printf("prefix_host: %d failures\n", failures);
  return failures ? 1 : 0;
}
