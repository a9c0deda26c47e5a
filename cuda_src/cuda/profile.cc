// Where the time of a plan goes, for `vla-infer bench`: events inside captured graphs.
#include <algorithm>
#include <functional>
#include <numeric>

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

// The parts of the script are timed as they run, one launch overlapping the next, layers and the
// loop as one kernel where they are; a part's operations are timed one by one, and share the part's time in
// proportion.
std::vector<double> profile(const Script& script, const Context& context, const std::vector<Known>& known,
                            PersistentLoop* loop, const AllLayers& layers) {
  struct Part {
    std::vector<Op> ops;
    PersistentLoop* kernel = nullptr;
    int steps = 1;
    bool body = false;
  };
  std::vector<Part> parts;
  const auto before = [&](size_t begin, size_t end, PersistentLoop* kernel) {
    parts.push_back({{script.before.begin() + static_cast<int64_t>(begin),
                      script.before.begin() + static_cast<int64_t>(end)},
                     kernel});
  };
  size_t done = 0;
  for (const auto& run : layers) {
    before(done, run->begin, nullptr), before(run->begin, run->end, run.get());
    done = run->end;
  }
  before(done, script.before.size(), nullptr);
  parts.push_back({script.body, loop, script.steps, true});
  parts.push_back({script.after});
  const std::vector<double> seconds = time_between_marks(context, [&](const std::function<void()>& mark) {
    for (const Part& part : parts) {
      mark();
      Sequence at;
      if (part.kernel) part.kernel->enqueue(context.stream);
      for (int step = 0; step < (part.kernel ? 0 : part.steps); ++step) {
        at.parts = 0;
        enqueue(part.ops, context, step, at, part.body ? known : std::vector<Known>{});
      }
    }
    mark();
  });
  std::vector<double> all;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const std::vector<double> each = time_between_marks(context, [&](const std::function<void()>& mark) {
      mark();
      for (size_t n = 0; n < part.ops.size(); ++n) {
        Sequence at;
        std::vector<Known> its;
        if (part.body) its = {known[n]};
        enqueue({part.ops[n]}, context, 0, at, its);
        mark();
      }
    });
    const double sum = std::accumulate(each.begin(), each.end(), 0.0);
    for (double s : each) all.push_back(sum > 0.0 ? s * seconds[i] / sum : 0.0);
  }
  return all;
}

}  // namespace vla::cuda
