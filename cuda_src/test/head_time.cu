// Times a whole denoising loop of random weights under one CUDA graph, and what each operation's split is
// worth.
//   head_time [sweep]     sweep: tries every split of every product in place, one operation after another
#include "head_loop.h"

namespace vla::test {
namespace {

float median(const std::vector<float>& t) { return t[t.size() / 2]; }

void print(const char* name, const std::vector<float>& t, const Head& head) {
  const auto at = [&](double q) { return t[size_t(q * (t.size() - 1))]; };
  std::printf("%-28s p50 %7.1f p95 %7.1f p99 %7.1f max %7.1f us  %.2f us a launch  %.2f TB/s of weights\n",
              name, at(0.5), at(0.95), at(0.99), t.back(), at(0.5) / float(head.launches()),
              double(head.weight_bytes()) * 10 / at(0.5) * 1e-6);
}

void sweep(Head& head, const Launch& at, const std::vector<std::string>& kinds) {
  float best = median(head.time(at, 3, 15));
  for (const std::string& kind : kinds) {
    const auto before = head.chosen(kind, at);
    std::vector<std::tuple<float, int, int>> found;
    for (int wn = 1; wn <= 2; ++wn) {
      for (int split = 1; split <= cuda::small::kMaxCluster; ++split) {
        head.splits[kind] = {wn, split};
        const std::vector<float> t = head.time(at, 2, 9);
        if (!t.empty()) found.emplace_back(median(t), wn, split);
      }
    }
    std::sort(found.begin(), found.end());
    std::printf("  %-6s chosen %dx%d, loop %.1f; best", kind.c_str(), before.first, before.second, best);
    for (size_t i = 0; i < found.size() && i < 6; ++i) {
      std::printf("  %dx%d %.1f", std::get<1>(found[i]), std::get<2>(found[i]), std::get<0>(found[i]));
    }
    std::printf("\n");
    best = std::get<0>(found[0]);
    head.splits[kind] = {std::get<1>(found[0]), std::get<2>(found[0])};
  }
}

}  // namespace
}  // namespace vla::test

int main(int argc, char** argv) {
  using namespace vla::test;
  const bool sweeping = argc > 1 && std::strcmp(argv[1], "sweep") == 0;
  cudaDeviceProp properties;
  TEST_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n", properties.name);
  vla::cuda::Launch at;
  TEST_CUDA(cudaStreamCreateWithFlags(&at.stream, cudaStreamNonBlocking));
  at.sms = properties.multiProcessorCount;
  at.arch = properties.major * 10 + properties.minor;
  for (const Sizes& s : kLoops) {
    Head head(s, at);
    std::printf("%s: %.1f MB of weights a step, %zu launches\n", s.name, double(head.weight_bytes()) * 1e-6,
                head.launches());
    print("  plain launches", head.time(at, 5, 50), head);
    const std::vector<float> plain = head.result(at);
    at.pdl = true;
    bool same = true, finite = true;
    for (int i = 0; i < 20; ++i) same &= head.result(at) == plain;
    for (float f : plain) finite &= std::isfinite(f);
    std::printf("  the same bits with dependent launches: %s; finite: %s\n", same ? "yes" : "NO",
                finite ? "yes" : "NO");
    const std::vector<float> times = head.time(at, 20, 200);
    const float whole = median(times);
    print("  dependent launches", times, head);
    for (const char* kind : {"qkv", "q", "attention", "o", "gated", "down"}) {
      const std::vector<float> t = head.time(at, 3, 20, kind);
      const int count = std::strcmp(kind, "q") == 0 && !s.cross
                            ? 0
                            : (s.cross && kind[0] == 'q' ? s.layers / 2 : s.layers) * s.steps;
      if (count == 0) continue;
      const std::vector<float> without = head.time(at, 3, 20, std::string("-") + kind);
      std::printf("    %s alone: %.2f us, its share of the loop: %.2f us\n", kind, median(t) / float(count),
                  (whole - median(without)) / float(count));
    }
    if (sweeping && s.rows >= 50) {
      sweep(head, at,
            s.cross ? std::vector<std::string>{"gated", "down", "qkv", "q", "o", "euler"}
                    : std::vector<std::string>{"gated", "down", "qkv", "o", "euler"});
      print("  after the sweep", head.time(at, 20, 200), head);
    }
    at.pdl = false;
  }
  return 0;
}
