#include <algorithm>
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

// Whether the copy engine can read memory of the host where it is.
bool is_pinned(const Bytes& b) {
  for (const std::byte* p : {b.data, b.data + b.size - 1}) {
    cudaPointerAttributes is;
    if (cudaPointerGetAttributes(&is, p) != cudaSuccess) return cudaGetLastError(), false;
    if (is.type != cudaMemoryTypeHost) return false;
  }
  return true;
}

struct Port {
  View view;
  std::unique_ptr<Pinned> host;  // (rows, ld): as the view is strided
  std::vector<Bytes> elsewhere;  // rows whose bytes are in pinned memory of the caller's, no data for others
  size_t row_bytes;
  bool by_kernel;

  explicit Port(const View& v)
      : view(v),
        host(std::make_unique<Pinned>(v.rows * v.ld * size_of(v.dtype))),
        elsewhere(static_cast<size_t>(v.rows)),
        row_bytes(v.cols * size_of(v.dtype)),
        by_kernel(v.rows * row_bytes <= kMovedByKernel && row_bytes % 4 == 0 && stride() % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(v.base) % 4 == 0) {
    std::memset(host->data(), 0, host->bytes());
  }
  int64_t stride() const { return view.ld * static_cast<int64_t>(size_of(view.dtype)); }
};

class CudaPlan final : public Plan {
 public:
  CudaPlan(Script plan, const Context& context, std::vector<Known> what, std::unique_ptr<PersistentLoop> loop,
           AllLayers layers)
      : context_(context),
        script_(std::move(plan)),
        known_(std::move(what)),
        loop_(std::move(loop)),
        layers_(std::move(layers)) {
    const Script& script = script_;
    const std::vector<Known>& known = known_;
    for (const View& v : script.inputs) inputs_.emplace_back(v);
    for (const View& v : script.outputs) outputs_.emplace_back(v);
    size_t slices = 0;
    for (const Port& p : inputs_) slices = std::max(slices, p.view.rows * Filling::slices(p.row_bytes));
    context.filling->reserve(slices);
    cudaGraph_t graph = nullptr;
    VLA_CHECK(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal), "capturing");
    try {
      Sequence at;
      move(inputs_, true, at.first);
      enqueue_before(script, context, layers_, at);
      at.first = true;  // what comes before the loop is done when any kernel of the loop begins: stable_keys
                        // rests on it
      if (loop_) {
        loop_->enqueue(context.stream);  // (and what follows waits for all of it)
      } else {
        for (int step = 0; step < script.steps; ++step) {
          at.parts = 0;
          enqueue(script.body, context, step, at, known);
        }
      }
      at.parts = 0;
      enqueue(script.after, context, 0, at);
      move(outputs_, false, at.first);
    } catch (...) {
      cudaStreamEndCapture(context.stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    VLA_CHECK(cudaStreamEndCapture(context.stream, &graph), "capturing");
    const cudaError_t counted = cudaGraphGetNodes(graph, nullptr, &nodes_);
    const cudaError_t made = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    VLA_CHECK(counted, "counting the graph's nodes");
    VLA_CHECK(made, "making the graph");
    VLA_CHECK(cudaGraphUpload(graph_, context.stream), "uploading the graph");
    VLA_CHECK(cudaStreamSynchronize(context.stream), "uploading the graph");
  }
  ~CudaPlan() override {
    context_.filling->clear();
    cudaStreamSynchronize(context_.stream);  // the pinned memory goes next
    if (graph_) cudaGraphExecDestroy(graph_);
  }

  std::byte* input(int index) override { return inputs_.at(index).host->data(); }
  const std::byte* output(int index) override { return outputs_.at(index).host->data(); }

  void stage(int index, const std::vector<Bytes>& rows) override {
    Port& p = inputs_.at(index);
    Filling& filling = *context_.filling;
    filling.clear();
    std::fill(p.elsewhere.begin(), p.elsewhere.end(), Bytes{});
    for (size_t i = 0; i < rows.size(); ++i) {
      std::byte* to = p.host->data() + i * p.stride();
      if (!rows[i].data || rows[i].size == 0) continue;
      if (p.by_kernel) {
        std::memcpy(to, rows[i].data, rows[i].size);
      } else if (is_pinned(rows[i])) {
        p.elsewhere[i] = rows[i];
        send(p, i);
      } else {
        filling.add(rows[i].data, to, p.view.base + i * p.stride(), rows[i].size);
      }
    }
    if (!p.by_kernel) filling.begin(context_.stream, &p);
  }
  void settle() override { context_.filling->finish(); }

  size_t graph_nodes() const override { return nodes_; }

  std::vector<double> profile() override {
    run();  // inputs are where they belong
    return cuda::profile(script_, context_, known_, loop_.get(), layers_);
  }

  void run() override {
    const void* sent = context_.filling->take();
    for (const Port& p : inputs_) {
      if (!p.by_kernel && &p != sent) {
        VLA_CHECK(cudaMemcpy2DAsync(p.view.base, p.stride(), p.host->data(), p.stride(), p.row_bytes,
                                    p.view.rows, cudaMemcpyHostToDevice, context_.stream),
                  "copying an input");
        for (size_t i = 0; i < p.elsewhere.size(); ++i) send(p, i);
      }
    }
    VLA_CHECK(cudaGraphLaunch(graph_, context_.stream), "running");
    for (const Port& p : outputs_) {
      if (!p.by_kernel) {
        VLA_CHECK(cudaMemcpy2DAsync(p.host->data(), p.stride(), p.view.base, p.stride(), p.row_bytes,
                                    p.view.rows, cudaMemcpyDeviceToHost, context_.stream),
                  "copying an output");
      }
    }
    VLA_CHECK(cudaStreamSynchronize(context_.stream), "running");
    for (const auto& layers : layers_) layers->check();
    if (loop_) loop_->check();
  }

 private:
  // A row that the copy engine reads where the caller has it.
  void send(const Port& p, size_t row) {
    const Bytes& from = p.elsewhere[row];
    if (!from.data) return;
    VLA_CHECK(cudaMemcpyAsync(p.view.base + row * p.stride(), from.data, from.size, cudaMemcpyHostToDevice,
                              context_.stream),
              "copying an input");
  }

  void move(const std::vector<Port>& ports, bool in, bool& first) {
    Moves moves;
    const auto flush = [&] {
      if (moves.count == 0) return;
      // a thread for each number of an action chunk: one more reading of host memory takes over 1 us
      const dim3 grid(8, static_cast<unsigned>(moves.count));
      VLA_CHECK(launch_kernel(move_rows, grid, 256, 0, context_.launch(0, !first), 1, moves),
                "moving inputs or outputs");
      moves.count = 0;
      first = false;
    };
    for (const Port& p : ports) {
      if (!p.by_kernel) continue;
      const std::byte* from = in ? p.host->data() : p.view.base;
      std::byte* to = in ? p.view.base : p.host->data();
      moves.move[moves.count++] = {from,       to,        p.view.rows, static_cast<int>(p.row_bytes),
                                   p.stride(), p.stride()};
      if (moves.count == kMaxMoves) flush();
    }
    flush();
  }

  Context context_;
  Script script_;
  std::vector<Known> known_;
  std::unique_ptr<PersistentLoop> loop_;  // null: the loop is launched operation by operation
  AllLayers layers_;
  std::vector<Port> inputs_, outputs_;
  cudaGraphExec_t graph_ = nullptr;
  size_t nodes_ = 0;
};

}  // namespace

void enqueue(const std::vector<Op>& ops, const Context& context, int step, Sequence& at,
             const std::vector<Known>& known) {
  for (size_t i = 0; i < ops.size(); ++i) {
    const Layout layout = context.layout(ops[i]);
    Launch here = context.launch(step, !at.first);
    if (!known.empty()) {
      here.stable_keys = known[i].stable_keys;
      here.norm_constant = known[i].norm_constant;
      if (known[i].shift) here.shift = known[i].shift + step * known[i].shift_step;
    }
    // what the launch before has left belongs to this operation only if it reads what that one wrote
    if (at.parts > 0 && i > 0 && normalises_output_of(ops[i], ops[i - 1])) {
      here.squares_in = context.squares, here.square_parts = at.parts;
    }
    at.parts = 0;
    if (const auto* linear = std::get_if<Linear>(&ops[i]); linear && is_small(ops[i], layout)) {
      at.parts = small_square_parts(*linear, here);
      if (at.parts > 0) here.squares_out = context.squares;
    }
    VLA_CHECK(launch_op(ops[i], layout, here), describe(ops[i]));
    at.first = false;
  }
}

void enqueue_before(const Script& script, const Context& context, const AllLayers& layers, Sequence& at) {
  const auto part = [&](size_t begin, size_t end) {
    enqueue({script.before.begin() + static_cast<int64_t>(begin),
             script.before.begin() + static_cast<int64_t>(end)},
            context, 0, at);
  };
  size_t done = 0;
  for (const auto& run : layers) {
    part(done, run->begin);
    run->enqueue(context.stream);  // (waits for all of what was before, and what follows for all of it)
    at = {};
    done = run->end;
  }
  part(done, script.before.size());
}

namespace {

// What is known of the loop's operations: see Known. Tables of norm biases times weights are computed here.
std::vector<Known> look_at_loop(const Script& script, const Context& context, Pool& pool) {
  std::vector<Known> all;
  for (const Op& op : script.body) {
    Known known;
    if (const auto* a = std::get_if<Attention>(&op)) {
      known.stable_keys = stable_keys(*a, script.body, script.steps);
    }
    const Norm* norm = norm_of(op);
    const Weight* w = norm ? product_weight(op) : nullptr;
    if (w && context.layout(op) == Layout::kFragments && norm->kind == NormKind::kRms) {
      known.norm_constant = !norm->weight || is_constant(norm->weight, script);
      if (norm->bias && is_constant(norm->bias, script)) {
        const int steps = norm->bias.step_bytes != 0 ? script.steps : 1, columns = packed_rows_small(*w);
        auto* table =
            reinterpret_cast<float*>(pool.take(sizeof(float) * static_cast<size_t>(steps) * columns));
        VLA_CHECK(cudaStreamSynchronize(nullptr), "clearing memory");
        VLA_CHECK(make_shift(norm->bias, steps, *w, table, context.launch(0, false)), describe(op));
        known.shift = table;
        known.shift_step = steps > 1 ? columns : 0;
      }
    }
    all.push_back(known);
  }
  VLA_CHECK(cudaStreamSynchronize(context.stream), "computing tables");
  return all;
}

}  // namespace

std::unique_ptr<Plan> capture(Script script, const Context& context, Pool& pool) {
  std::vector<Known> known = look_at_loop(script, context, pool);
  std::unique_ptr<PersistentLoop> loop = persistent_loop(script, context, known, pool);
  AllLayers layers;
  for (auto& run : {persistent_vision, persistent_prefix}) {
    if (auto made = run(script, context, pool)) layers.push_back(std::move(made));
  }
  VLA_CHECK(cudaStreamSynchronize(context.stream), "packing for the persistent kernels");
  return std::make_unique<CudaPlan>(std::move(script), context, std::move(known), std::move(loop),
                                    std::move(layers));
}

}  // namespace vla::cuda
