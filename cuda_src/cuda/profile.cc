// Where the time of a plan goes, for `vla-infer bench`: events inside captured graphs.
#include <algorithm>
#include <functional>
#include <numeric>
#include <random>

#include "plan.h"

namespace vla::cuda {

namespace {

// Captures what `record` launches and marks, runs it twice, and gives the seconds between the marks of the
// second run.
std::vector<double> time_between_marks(const Context& context,
                                       const std::function<void(std::function<void()>)>& record) {
  std::vector<cudaEvent_t> events;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  const auto clean = [&] {
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
    for (cudaEvent_t event : events) cudaEventDestroy(event);
  };
  VLA_CHECK(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal), "profiling");
  try {
    record([&] {
      cudaEvent_t event = nullptr;
      VLA_CHECK(cudaEventCreate(&event), "profiling");
      events.push_back(event);
      VLA_CHECK(cudaEventRecordWithFlags(event, context.stream, cudaEventRecordExternal), "profiling");
    });
  } catch (...) {
    cudaStreamEndCapture(context.stream, &graph);
    clean();
    throw;
  }
  cudaError_t error = cudaStreamEndCapture(context.stream, &graph);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&exec, graph, 0);
  for (int i = 0; i < 2 && error == cudaSuccess; ++i) error = cudaGraphLaunch(exec, context.stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(context.stream);
  std::vector<double> seconds;
  for (size_t i = 0; i + 1 < events.size() && error == cudaSuccess; ++i) {
    float milliseconds = 0.0f;
    error = cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]);
    seconds.push_back(milliseconds * 1e-3);
  }
  clean();
  VLA_CHECK(error, "profiling");
  return seconds;
}

}  // namespace

// The three parts of the script are timed as they run, one launch overlapping the next, the loop as one
// kernel where it is; a part's operations are timed one by one, and share the part's time in proportion.
std::vector<double> profile(const Script& script, const Context& context, const std::vector<Known>& known,
                            PersistentLoop* loop) {
  const std::vector<double> parts = time_between_marks(context, [&](const std::function<void()>& mark) {
    Sequence at;
    mark();
    enqueue(script.before, context, 0, at);
    mark();
    at.first = true;
    if (loop) loop->enqueue(context.stream);
    for (int step = 0; step < (loop ? 0 : script.steps); ++step) {
      at.parts = 0;
      enqueue(script.body, context, step, at, known);
    }
    mark();
    at = {};
    enqueue(script.after, context, 0, at);
    mark();
  });
  std::vector<double> all;
  const std::vector<Op>* lists[3] = {&script.before, &script.body, &script.after};
  for (int part = 0; part < 3; ++part) {
    std::vector<double> each = time_between_marks(context, [&](const std::function<void()>& mark) {
      mark();
      for (size_t i = 0; i < lists[part]->size(); ++i) {
        Sequence at;
        std::vector<Known> its;
        if (part == 1) its = {known[i]};
        enqueue({(*lists[part])[i]}, context, 0, at, its);
        mark();
      }
    });
    const double sum = std::accumulate(each.begin(), each.end(), 0.0);
    for (double s : each) all.push_back(sum > 0.0 ? s * parts[part] / sum : 0.0);
  }
  return all;
}

double copy_rate(const Context& context, size_t bytes) {
  constexpr int kCopies = 8;
  Pool pool;
  std::byte *from = pool.take(bytes), *to = pool.take(bytes);
  std::vector<uint64_t> random(size_t{1} << 21);  // zeros would take less power, and power limits clocks
  std::mt19937_64 generator;
  for (uint64_t& v : random) v = generator();
  const size_t some = random.size() * sizeof(uint64_t);
  for (size_t at = 0; at < bytes; at += some) {
    VLA_CHECK(cudaMemcpyAsync(from + at, random.data(), std::min(some, bytes - at), cudaMemcpyHostToDevice,
                              context.stream),
              "filling memory");
  }
  const std::vector<double> seconds = time_between_marks(context, [&](const std::function<void()>& mark) {
    mark();
    for (int i = 0; i < kCopies; ++i) {
      VLA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, context.stream), "copying");
      mark();
    }
  });
  return 2.0 * static_cast<double>(bytes) / *std::min_element(seconds.begin(), seconds.end());
}

}  // namespace vla::cuda
