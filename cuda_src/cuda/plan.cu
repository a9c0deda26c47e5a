#include <cstring>

#include "common.cuh"
#include "plan.h"

namespace vla::cuda {

namespace {

// Small inputs and outputs cross in one kernel each that reads (writes) pinned host memory: a copy node for
// each would cost more than the bytes. Larger ones are copied by the copy engine.
constexpr size_t kMovedByKernel = 64 * 1024;
constexpr int kMaxMoves = 24;

struct Moves {
  struct One {
    const std::byte* from;
    std::byte* to;
    int rows, row_bytes;             // row_bytes: a multiple of 4
    int64_t from_stride, to_stride;  // bytes
  } move[kMaxMoves];
  int count = 0;
};

// to[i][:] = from[i][:] for each pair of matrices, one a block row.
__global__ void move_rows(const __grid_constant__ Moves moves) {
  pdl_trigger();
  pdl_wait();
  const Moves::One m = moves.move[blockIdx.y];
  const int words = m.row_bytes / 4;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < m.rows * words; i += gridDim.x * blockDim.x) {
    const int row = i / words, c = i % words;
    reinterpret_cast<uint32_t*>(m.to + row * m.to_stride)[c] =
        reinterpret_cast<const uint32_t*>(m.from + row * m.from_stride)[c];
  }
}

struct Port {
  View view;
  std::unique_ptr<Pinned> host;  // (rows, ld): as the view is strided
  size_t used;                   // bytes of each row that are in use
  bool by_kernel;

  explicit Port(const View& v)
      : view(v),
        host(std::make_unique<Pinned>(v.rows * v.ld * size_of(v.dtype))),
        used(v.cols * size_of(v.dtype)),
        by_kernel(v.rows * used <= kMovedByKernel && used % 4 == 0 && stride() % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(v.base) % 4 == 0) {
    std::memset(host->data(), 0, host->bytes());
  }
  int64_t stride() const { return view.ld * static_cast<int64_t>(size_of(view.dtype)); }
};

class CudaPlan final : public Plan {
 public:
  CudaPlan(Script script, const Context& context) : context_(context) {
    for (const View& v : script.inputs) inputs_.emplace_back(v);
    for (const View& v : script.outputs) outputs_.emplace_back(v);
    cudaGraph_t graph = nullptr;
    VLA_CHECK(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal), "capturing");
    try {
      bool first = true;
      move(inputs_, true, first);
      enqueue(script.before, context, 0, first);
      std::vector<int> stable;
      for (const Op& op : script.body) {
        const auto* a = std::get_if<Attention>(&op);
        stable.push_back(a ? stable_keys(*a, script.body, script.steps) : 0);
      }
      first = true;  // what comes before the loop is done when any kernel of the loop begins: stable_keys
                     // rests on it
      for (int step = 0; step < script.steps; ++step) enqueue(script.body, context, step, first, stable);
      enqueue(script.after, context, 0, first);
      move(outputs_, false, first);
    } catch (...) {
      cudaStreamEndCapture(context.stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    VLA_CHECK(cudaStreamEndCapture(context.stream, &graph), "capturing");
    const cudaError_t made = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    VLA_CHECK(made, "making the graph");
    VLA_CHECK(cudaGraphUpload(graph_, context.stream), "uploading the graph");
    VLA_CHECK(cudaStreamSynchronize(context.stream), "uploading the graph");
  }
  ~CudaPlan() override {
    if (graph_) cudaGraphExecDestroy(graph_);
  }

  std::byte* input(int index) override { return inputs_.at(index).host->data(); }
  const std::byte* output(int index) override { return outputs_.at(index).host->data(); }

  void use(int index, size_t bytes) override {
    Port& p = inputs_.at(index);
    const size_t whole = p.view.cols * size_of(p.view.dtype);
    p.used = bytes < whole ? bytes : whole;
  }

  void run() override {
    for (const Port& p : inputs_) {
      if (!p.by_kernel && p.used > 0) {
        VLA_CHECK(cudaMemcpy2DAsync(p.view.base, p.stride(), p.host->data(), p.stride(), p.used, p.view.rows,
                                    cudaMemcpyHostToDevice, context_.stream),
                  "copying an input");
      }
    }
    VLA_CHECK(cudaGraphLaunch(graph_, context_.stream), "running");
    for (const Port& p : outputs_) {
      if (!p.by_kernel) {
        VLA_CHECK(cudaMemcpy2DAsync(p.host->data(), p.stride(), p.view.base, p.stride(), p.used, p.view.rows,
                                    cudaMemcpyDeviceToHost, context_.stream),
                  "copying an output");
      }
    }
    VLA_CHECK(cudaStreamSynchronize(context_.stream), "running");
  }

 private:
  void move(const std::vector<Port>& ports, bool in, bool& first) {
    Moves moves;
    const auto flush = [&] {
      if (moves.count == 0) return;
      const dim3 grid(4, static_cast<unsigned>(moves.count));
      VLA_CHECK(launch_kernel(move_rows, grid, 256, 0, context_.launch(0, !first), 1, moves),
                "moving inputs or outputs");
      moves.count = 0;
      first = false;
    };
    for (const Port& p : ports) {
      if (!p.by_kernel) continue;
      const std::byte* from = in ? p.host->data() : p.view.base;
      std::byte* to = in ? p.view.base : p.host->data();
      moves.move[moves.count++] = {from, to, p.view.rows, static_cast<int>(p.used), p.stride(), p.stride()};
      if (moves.count == kMaxMoves) flush();
    }
    flush();
  }

  Context context_;
  std::vector<Port> inputs_, outputs_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace

void enqueue(const std::vector<Op>& ops, const Context& context, int step, bool& first,
             const std::vector<int>& stable) {
  for (size_t i = 0; i < ops.size(); ++i) {
    const Layout layout = context.layout(ops[i]);
    Launch at = context.launch(step, !first);
    if (!stable.empty()) at.stable_keys = stable[i];
    VLA_CHECK(launch_op(ops[i], layout, at), describe(ops[i]));
    first = false;
  }
}

std::unique_ptr<Plan> capture(Script script, const Context& context) {
  return std::make_unique<CudaPlan>(std::move(script), context);
}

}  // namespace vla::cuda
