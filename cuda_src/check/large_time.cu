// Times the large kernels on the sizes of the policies, in bf16 and in E4M3 (what a product reads in E4M3 is
// E4M3 already, as the kernel before it leaves it), and the whole of vision and prefix as one graph. Usage:
// large_time; or large_time sweep CAMERAS bf16|e4m3: every tile of the Hopper product on the sizes for so
// many cameras, with pauses, since a GPU that works without one lowers its clock and whatever is timed late
// looks slow; or large_time probe NAME GROUPS COLUMNS SPLIT: two launches of one product in bf16, for a
// profiler. Times are of launches inside a CUDA graph, weights rotating among sets larger than the
// second-level cache.
#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>

#include "../cuda/common.cuh"
#include "../cuda/large/product.cuh"
#include "../cuda/large/rows.cuh"
#include "device.cuh"
#include "promote.h"

namespace vla::check {
namespace {

using cuda::bf16;
using cuda::e4m3;
using cuda::Launch;

Launch base;

// An H200's, measured: a large product in bf16, twice as much in E4M3, and a copy.
constexpr double kOperations = 780e12, kBytes = 4.2e12;

__global__ void fill_kernel(bf16* to, int64_t n, uint32_t seed, float size) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += gridDim.x * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    h ^= h >> 16;
    to[i] = __float2bfloat16(size * (static_cast<float>(h) * 0x1p-31f - 1.0f));
  }
}
std::byte* random_bf16(int64_t n, float size) {
  std::byte* to = device(n * 2);
  fill_kernel<<<1024, 256>>>(reinterpret_cast<bf16*>(to), n, generator()(), size);
  CUDA_OK(cudaGetLastError());
  return to;
}
View matrix(int rows, int cols, float size = 1.0f) {
  View v;
  v.rows = rows;
  v.cols = cols;
  v.ld = cuda::round_up(cols, 8);
  v.dtype = DType::kBF16;
  v.base = random_bf16(rows * v.ld, size);
  return v;
}
// The same rows as E4M3.
View in_e4m3(const View& from) {
  View v = from;
  v.ld = cuda::round_up(v.cols, 16);
  v.dtype = DType::kE4M3;
  v.base = device(v.rows * v.ld);
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cuda::normalise_rows_e4m3(from, {}, v.at<e4m3>(0), v.ld, 448.0f, base));
  CUDA_OK(cudaDeviceSynchronize());
  return v;
}
View floats(int rows, int cols) {
  Matrix m = Matrix::random(rows, cols, DType::kF32, 0, -1, 1);
  return m.view;
}
Weight weight(Packing packing, std::vector<int> n, int k, bool quantised) {
  if (!quantised) {
    const size_t bytes = cuda::packed_bytes_large(packing, n, k);
    return {random_bf16(bytes / 2, std::sqrt(3.0f / k)), DType::kBF16, packing, k, n};
  }
  std::vector<cuda::RawMatrix> raw;
  for (int rows : n) {
    raw.push_back({random_bf16(int64_t{rows} * k, std::sqrt(3.0f / k)), DType::kBF16, rows, k, k});
  }
  std::byte* to = device(cuda::packed_bytes_e4m3(packing, n, k));
  CUDA_OK(cuda::pack_e4m3(to, packing, raw, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  for (const cuda::RawMatrix& m : raw) {
    CUDA_OK(cudaFree(const_cast<void*>(m.data)));
    std::erase(owned(), const_cast<void*>(m.data));
  }
  return {to, DType::kE4M3, packing, k, n};
}

// Whether the GPU rests after each replay that is long enough to heat it, twice as long as that was.
bool rests = false;
constexpr float kHeatsMs = 0.8f;

// Seconds of one pass of `record`, which launches on the stream it is given: median of replays.
double time_graph(const std::function<void(Launch)>& record, int replays) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Launch at = base;
  CUDA_OK(cudaStreamBeginCapture(at.stream, cudaStreamCaptureModeThreadLocal));
  record(at);
  CUDA_OK(cudaStreamEndCapture(at.stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  CUDA_OK(cudaEventCreate(&start));
  CUDA_OK(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < replays + 2; ++i) {
    CUDA_OK(cudaEventRecord(start, at.stream));
    CUDA_OK(cudaGraphLaunch(executable, at.stream));
    CUDA_OK(cudaEventRecord(stop, at.stream));
    CUDA_OK(cudaEventSynchronize(stop));
    float ms;
    CUDA_OK(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 2) times.push_back(ms);
    if (rests && ms > kHeatsMs) std::this_thread::sleep_for(std::chrono::duration<float, std::milli>(2 * ms));
  }
  CUDA_OK(cudaGetLastError());
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e-3;
}
// Seconds of one launch among `count`.
double time_each(const std::function<cudaError_t(const Launch&, int)>& launch, int count, int replays = 5) {
  return time_graph(
             [&](Launch at) {
               for (int i = 0; i < count; ++i) {
                 at.pdl = i > 0;
                 CUDA_OK(launch(at, i));
               }
             },
             replays) /
         count;
}

struct Size {
  const char* name;
  cuda::ProductKind kind;
  int m, k;
  std::vector<int> n;
  int head_dim;
  Act act;
};
constexpr auto kL = cuda::ProductKind::kLinear;
constexpr auto kG = cuda::ProductKind::kGated;
constexpr auto kQ = cuda::ProductKind::kQkv;

// One launch of one tile, for a profiler; otherwise times.
void time_product(const Size& s, bool quantised, bool sweep, const cuda::Tile* probe = nullptr) {
  int64_t rows = 0;
  for (int n : s.n) rows += n;
  const double operations = 2.0 * s.m * s.k * rows, bytes = (quantised ? 1.0 : 2.0) * rows * s.k;
  const int sets = std::max(2, static_cast<int>(200e6 / bytes) + 1), count = std::max(16, std::min(sets, 64));
  std::vector<Weight> weights;
  for (int i = 0; i < std::min(sets, 64); ++i) {
    weights.push_back(weight(s.kind == kG ? Packing::kInterleaved : Packing::kStacked, s.n, s.k, quantised));
  }
  View x = matrix(s.m, s.k), out = matrix(s.m, static_cast<int>(s.kind == kG ? s.n[0] : rows)),
       residual = matrix(s.m, out.cols);
  const float x_scale = quantised ? 1 / 448.0f : 0.0f;
  const bool narrow_out = quantised && s.act != Act::kNone;  // for the product after it
  if (quantised) x = in_e4m3(x);
  if (narrow_out) out = in_e4m3(out);
  View bias = floats(1, out.cols), rope = floats(s.m, std::max(2, s.head_dim)), positions = floats(s.m, 1);
  CUDA_OK(cudaMemset(positions.base, 0, s.m * 4));
  const auto product = [&](int i) {
    Launch at = base;
    cuda::QuantisedProduct p;
    const Weight& w = weights[i % weights.size()];
    if (s.kind == kL) {
      Linear op;
      op.x = x, op.w = w, op.out = out, op.act = s.act, op.bias = bias;
      if (s.act == Act::kNone) op.residual = residual;
      op.x_scale = x_scale, op.out_scale = narrow_out ? 0.01f : 0.0f;
      CUDA_OK(cuda::make_product(op, at, &p));
    } else if (s.kind == kG) {
      GatedLinear op;
      op.x = x, op.w = w, op.out = out, op.act = s.act;
      op.x_scale = x_scale, op.out_scale = narrow_out ? 0.01f : 0.0f;
      CUDA_OK(cuda::make_product(op, at, &p));
    } else {
      Qkv op;
      op.x = x, op.w = w, op.head_dim = s.head_dim, op.x_scale = x_scale;
      int column = 0;
      View* const parts[3] = {&op.q, &op.k, &op.v};
      for (int part = 0; part < 3; ++part) {
        *parts[part] = out;
        parts[part]->cols = s.n[part];
        parts[part]->base += 2 * column;
        column += s.n[part];
      }
      if (s.head_dim != 72) op.rope = rope, op.positions = positions;
      CUDA_OK(cuda::make_product(op, at, &p));
    }
    return p;
  };
  if (probe) {
    for (int i = 0; i < 2; ++i) CUDA_OK(cuda::product_sm90(product(i), *probe, base));
    CUDA_OK(cudaDeviceSynchronize());
    release_all();
    return;
  }
  struct Timed {
    cuda::Tile tile;
    double seconds;
  };
  std::vector<Timed> all;
  const auto timed = [&](const cuda::Tile& tile) {
    return time_each(
        [&](const Launch& at, int i) {
          return quantised ? cuda::product_e4m3(product(i), tile, at)
                           : cuda::product_sm90(product(i), tile, at);
        },
        count);
  };
  const cuda::Tile chosen =
      quantised ? cuda::choose_tile_e4m3(product(0), base.sms) : cuda::choose_tile_sm90(product(0), base.sms);
  const double seconds = timed(chosen), again = timed(chosen);
  const double read = (s.m * (quantised ? 1.0 : 2.0)) * s.k,
               written = out.rows * 1.0 * out.cols * size_of(out.dtype);
  std::printf(
      "%-18s %s m=%-4d n=%-5lld k=%-5d %7.2f us (again %7.2f) %dx%d/%d %5.0f TFLOP/s; floors %6.2f us of "
      "operations, %5.2f of bytes",
      s.name, quantised ? "e4m3" : "bf16", s.m, static_cast<long long>(rows), s.k, seconds * 1e6, again * 1e6,
      64 * chosen.groups, chosen.columns, chosen.split, operations / seconds / 1e12,
      operations / kOperations / (quantised ? 2 : 1) * 1e6, (bytes + read + written) / kBytes * 1e6);
  if (quantised && s.k >= 2048) {
    std::printf("; 128x128 promoting never, 4, 2, 1:");
    for (int promote : {0, 4, 2, 1}) {
      const double each = time_each(
          [&](const Launch& at, int i) { return product_promoted(promote, product(i), at); }, count);
      std::printf(" %.2f", each * 1e6);
    }
  } else if (!quantised) {
    std::printf(
        "; mma %.2f us",
        1e6 * time_each([&](const Launch& at, int i) { return cuda::product_sm80(product(i), at); }, count));
  }
  std::printf("\n");
  if (sweep) {
    for (int groups = 1; groups <= 4; ++groups) {
      for (int columns = 32; columns <= 256; columns += 32) {
        for (int split = 1; split <= 8; ++split) {
          const cuda::Tile tile{groups, columns, split};
          const bool in_pairs = s.kind == kG || (s.kind == kQ && s.head_dim % 64 == 0);
          if (columns % 64 && in_pairs) continue;
          if (split > s.k / 128 || !(quantised ? cuda::has_tile_e4m3 : cuda::has_tile_sm90)(tile)) continue;
          const int64_t blocks = static_cast<int64_t>(cuda::ceil_div(s.m, 64 * groups)) *
                                 cuda::ceil_div(static_cast<int>(rows), columns) * split;
          if (blocks > 8 * base.sms || (split > 1 && blocks > base.sms)) continue;
          all.push_back({tile, timed(tile)});
        }
      }
    }
    std::sort(all.begin(), all.end(), [](const Timed& a, const Timed& b) { return a.seconds < b.seconds; });
    for (size_t i = 0; i < all.size(); ++i) {
      const cuda::Tile& t = all[i].tile;
      std::printf("    %dx%d/%d %.2f", 64 * t.groups, t.columns, t.split, all[i].seconds * 1e6);
    }
    std::printf("\n");
  }
  std::fflush(stdout);
  release_all();
}

void time_attention(const char* name, bool quantised, int m, int n, int heads, int kv, int d, int batch) {
  Attention op;
  op.q = matrix(batch * m, heads * d, 2.0f);
  op.k = matrix(batch * n, kv * d, 2.0f);
  op.v = matrix(batch * n, kv * d);
  op.out = matrix(batch * m, heads * d);
  if (quantised) op.out = in_e4m3(op.out), op.out_scale = 0.01f;
  op.head_dim = d;
  op.batch = batch;
  const double seconds = time_each([&](const Launch& at, int) { return cuda::launch_large(op, at); }, 40);
  std::printf("attention %-10s to %s m=%d n=%d heads=%d/%d d=%d batch=%d: %.2f us %.0f TFLOP/s\n", name,
              quantised ? "e4m3" : "bf16", m, n, heads, kv, d, batch, seconds * 1e6,
              4.0 * batch * heads * m * n * d / seconds / 1e12);
  release_all();
}

void time_rows() {
  for (const auto& [m, k] : {std::pair{2048, 768}, {512, 1152}, {560, 2048}, {177, 960}}) {
    View x = matrix(m, k), w = floats(1, k), out = matrix(m, k);
    Norm norm;
    norm.kind = NormKind::kRms;
    norm.weight = w;
    const double seconds = time_each(
        [&](const Launch& at, int) { return cuda::normalise_rows(x, norm, out.at<bf16>(0), out.ld, k, at); },
        100);
    const double narrow = time_each(
        [&](const Launch& at, int) {
          return cuda::normalise_rows_e4m3(x, norm, out.at<e4m3>(0), out.ld, 100.0f, at);
        },
        100);
    std::printf("norm m=%d k=%d: %.2f us, to e4m3 %.2f us\n", m, k, seconds * 1e6, narrow * 1e6);
  }
  release_all();
}

// A model's vision and prefix as operations, with its sizes.
struct Model {
  const char* name;
  int cameras, image, patch, hidden, vision_layers, vision_heads, vision_mlp;  // SigLIP
  int factor;                                                                  // space to depth, 1: none
  int width, layers, mlp, heads, kv_heads, head_dim, other_rows;  // prefix; rows beside the images
  Act act;
};
struct Recorder {
  bool quantised;
  std::vector<Op> ops;
  float x_scale() const { return quantised ? 0.01f : 0.0f; }
  View out(int rows, int cols) {  // of what the next product reads as it is
    return quantised ? in_e4m3(matrix(rows, cols)) : matrix(rows, cols);
  }
  Norm norm(NormKind kind, int k) {
    Norm n;
    n.kind = kind;
    n.eps = 1e-6f;
    n.weight = floats(1, k);
    if (kind == NormKind::kLayer) n.bias = floats(1, k);
    return n;
  }
  View linear(View x, int n, Norm norm, Act act, View residual, bool bias) {
    Linear op;
    op.x = x, op.norm = norm, op.act = act, op.residual = residual, op.x_scale = x_scale();
    op.w = weight(Packing::kStacked, {n}, x.cols, quantised);
    op.out = act == Act::kNone ? matrix(x.rows, n) : out(x.rows, n);
    if (op.out.dtype == DType::kE4M3) op.out_scale = x_scale();
    if (bias) op.bias = floats(1, n);
    ops.push_back(op);
    return op.out;
  }
};
int record_vision(Recorder& r, const Model& c, View* images) {
  ImagePatches patches;
  const int grid = c.image / c.patch, rows = c.cameras * grid * grid;
  patches.frames.base = device(c.cameras * 640 * 480 * 3);
  patches.frames.rows = c.cameras, patches.frames.cols = 640 * 480 * 3, patches.frames.ld = 640 * 480 * 3;
  Matrix geometry = Matrix::empty(c.cameras, 8, DType::kI32, 0);
  for (int i = 0; i < c.cameras; ++i) {
    for (int v : {480, 640, 1920, c.image * 3 / 4, c.image, c.image / 8, 0, 1})
      geometry.values.push_back(float(v));
  }
  geometry.upload();
  patches.geometry = geometry.view;
  const int values = 3 * c.patch * c.patch;
  patches.out = values % 16 ? matrix(rows, values) : r.out(rows, values);
  if (patches.out.dtype == DType::kE4M3) patches.out_scale = r.x_scale();
  patches.height = patches.width = c.image, patches.patch = c.patch;
  r.ops.push_back(patches);
  View x = r.linear(patches.out, c.hidden, {}, Act::kNone, matrix(grid * grid, c.hidden), true);
  for (int i = 0; i < c.vision_layers; ++i) {
    Qkv qkv;
    qkv.x = x, qkv.norm = r.norm(NormKind::kLayer, c.hidden), qkv.head_dim = c.hidden / c.vision_heads;
    qkv.w = weight(Packing::kStacked, {c.hidden, c.hidden, c.hidden}, c.hidden, r.quantised);
    qkv.x_scale = r.x_scale();
    qkv.q = matrix(rows, c.hidden), qkv.k = matrix(rows, c.hidden), qkv.v = matrix(rows, c.hidden);
    qkv.q_bias = qkv.k_bias = qkv.v_bias = floats(1, c.hidden);
    r.ops.push_back(qkv);
    Attention a;
    a.q = qkv.q, a.k = qkv.k, a.v = qkv.v, a.out = r.out(rows, c.hidden), a.head_dim = qkv.head_dim,
    a.batch = c.cameras, a.out_scale = r.x_scale();
    r.ops.push_back(a);
    x = r.linear(a.out, c.hidden, {}, Act::kNone, x, true);
    const View h = r.linear(x, c.vision_mlp, r.norm(NormKind::kLayer, c.hidden), Act::kGeluTanh, {}, true);
    x = r.linear(h, c.hidden, {}, Act::kNone, x, true);
  }
  const Norm last = r.norm(NormKind::kLayer, c.hidden);
  if (c.factor > 1) {
    SpaceToDepth s;
    s.x = x, s.norm = last, s.factor = c.factor, s.height = s.width = grid;
    s.out = r.out(rows / (c.factor * c.factor), c.hidden * c.factor * c.factor);
    s.out_scale = r.x_scale();
    r.ops.push_back(s);
    *images = r.linear(s.out, c.width, {}, Act::kNone, {}, false);
  } else {
    *images = r.linear(x, c.width, last, Act::kNone, {}, true);
  }
  return images->rows;
}
void record_prefix(Recorder& r, const Model& c, int rows) {
  View x = matrix(rows, c.width);
  View rope = floats(rows, c.head_dim), positions = floats(rows, 1), blocks = floats(rows, 1);
  for (const View& v : {positions, blocks}) CUDA_OK(cudaMemset(v.base, 0, rows * 4));
  for (int i = 0; i < c.layers; ++i) {
    const bool last = i == c.layers - 1;
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    Qkv qkv;
    qkv.x = x, qkv.norm = r.norm(NormKind::kRms, c.width), qkv.head_dim = c.head_dim;
    qkv.rope = rope, qkv.positions = positions;
    qkv.w = weight(Packing::kStacked, last ? std::vector<int>{kv, kv} : std::vector<int>{q, kv, kv}, c.width,
                   r.quantised);
    qkv.x_scale = r.x_scale();
    if (!last) qkv.q = matrix(rows, q);
    qkv.k = matrix(rows, kv), qkv.v = matrix(rows, kv);
    r.ops.push_back(qkv);
    if (last) break;
    Attention a;
    a.q = qkv.q, a.k = qkv.k, a.v = qkv.v, a.out = r.out(rows, q), a.head_dim = c.head_dim;
    a.out_scale = r.x_scale();
    a.q_block = a.k_block = blocks;
    r.ops.push_back(a);
    x = r.linear(a.out, c.width, {}, Act::kNone, x, false);
    GatedLinear g;
    g.x = x, g.norm = r.norm(NormKind::kRms, c.width), g.act = c.act, g.out = r.out(rows, c.mlp);
    g.w = weight(Packing::kInterleaved, {c.mlp, c.mlp}, c.width, r.quantised);
    g.x_scale = g.out_scale = r.x_scale();
    r.ops.push_back(g);
    x = r.linear(g.out, c.width, {}, Act::kNone, x, false);
  }
}
double operations_of(const std::vector<Op>& ops) {
  double total = 0;
  for (const Op& op : ops) {
    if (const auto* o = std::get_if<Linear>(&op)) total += 2.0 * o->x.rows * o->w.k * o->w.rows();
    if (const auto* o = std::get_if<GatedLinear>(&op)) total += 2.0 * o->x.rows * o->w.k * o->w.rows();
    if (const auto* o = std::get_if<Qkv>(&op)) total += 2.0 * o->x.rows * o->w.k * o->w.rows();
    if (const auto* o = std::get_if<Attention>(&op))
      total += 4.0 * o->q.rows * o->q.cols * (o->k.rows / o->batch);
  }
  return total;
}
double run_ops(const std::vector<Op>& ops, const std::function<bool(const Op&)>& wanted) {
  return time_graph(
      [&](Launch at) {
        for (const Op& op : ops) {
          if (!wanted(op)) continue;
          std::visit(
              [&](const auto& o) {
                using T = std::decay_t<decltype(o)>;
                if constexpr (std::is_same_v<T, ImagePatches> || std::is_same_v<T, SpaceToDepth> ||
                              std::is_same_v<T, Embed>) {
                  CUDA_OK(cuda::launch(o, at));
                } else if constexpr (!std::is_same_v<T, Euler>) {
                  CUDA_OK(cuda::launch_large(o, at));
                }
              },
              op);
          at.pdl = true;
        }
      },
      15);
}
void time_model(const Model& c, bool quantised) {
  Recorder vision{quantised, {}}, prefix{quantised, {}};
  View images;
  const int rows = record_vision(vision, c, &images) + c.other_rows;
  record_prefix(prefix, c, rows);
  const auto every = [](const Op&) { return true; };
  for (const auto& [name, r] : {std::pair{"vision", &vision}, {"prefix", &prefix}}) {
    const double seconds = run_ops(r->ops, every), again = run_ops(r->ops, every);
    const double products =
        run_ops(r->ops, [](const Op& op) { return !std::holds_alternative<Attention>(op); });
    std::printf(
        "%-8s %s %s (%d rows): %.3f ms (again %.3f; without attention %.3f), %.2f TFLOP, %.0f TFLOP/s\n",
        c.name, quantised ? "e4m3" : "bf16", name,
        r == &vision ? c.cameras * (c.image / c.patch) * (c.image / c.patch) : rows, seconds * 1e3,
        again * 1e3, products * 1e3, operations_of(r->ops) / 1e12, operations_of(r->ops) / seconds / 1e12);
    std::fflush(stdout);
  }
  release_all();
}

// The products of vision and prefix; 48 tokens of a prompt, and SmolVLA's state.
std::vector<Size> sizes(int cameras) {
  const Act gelu = Act::kGeluTanh, silu = Act::kSilu, none = Act::kNone;
  const int pi = 256 * cameras, pi_prefix = pi + 48, smol = 1024 * cameras, smol_prefix = 64 * cameras + 49;
  return {
      {"pi vision qkv", kQ, pi, 1152, {1152, 1152, 1152}, 72, none},
      {"pi vision out", kL, pi, 1152, {1152}, 0, none},
      {"pi vision fc1", kL, pi, 1152, {4304}, 0, gelu},
      {"pi vision fc2", kL, pi, 4304, {1152}, 0, none},
      {"pi prefix qkv", kQ, pi_prefix, 2048, {2048, 256, 256}, 256, none},
      {"pi prefix out", kL, pi_prefix, 2048, {2048}, 0, none},
      {"pi prefix gate-up", kG, pi_prefix, 2048, {16384, 16384}, 0, gelu},
      {"pi prefix down", kL, pi_prefix, 16384, {2048}, 0, none},
      {"smol vision qkv", kQ, smol, 768, {768, 768, 768}, 72, none},
      {"smol vision out", kL, smol, 768, {768}, 0, none},
      {"smol vision fc1", kL, smol, 768, {3072}, 0, gelu},
      {"smol vision fc2", kL, smol, 3072, {768}, 0, none},
      {"smol connector", kL, 64 * cameras, 12288, {960}, 0, none},
      {"smol prefix qkv", kQ, smol_prefix, 960, {960, 320, 320}, 64, none},
      {"smol prefix out", kL, smol_prefix, 960, {960}, 0, none},
      {"smol prefix g-up", kG, smol_prefix, 960, {2560, 2560}, 0, silu},
      {"smol prefix down", kL, smol_prefix, 2560, {960}, 0, none},
  };
}
void probe_product(const char* name, const cuda::Tile& tile) {
  for (const Size& s : sizes(2)) {
    if (s.name == std::string(name)) time_product(s, false, false, &tile);
  }
}
void sweep_tiles(int cameras, bool quantised) {
  rests = true;
  for (const Size& s : sizes(cameras)) time_product(s, quantised, true);
}

void everything() {
  const Act gelu = Act::kGeluTanh, silu = Act::kSilu;
  for (const Size& s : sizes(2)) {
    for (bool quantised : {false, true}) time_product(s, quantised, false);
  }
  for (bool quantised : {false, true}) {
    time_attention("smol vision", quantised, 1024, 1024, 12, 12, 64, 2);
    time_attention("smol prefix", quantised, 177, 177, 15, 5, 64, 1);
    time_attention("pi vision", quantised, 256, 256, 16, 16, 72, 2);
    time_attention("pi prefix", quantised, 560, 560, 8, 1, 256, 1);
  }
  time_rows();
  for (bool quantised : {false, true}) {
    time_model({"smolvla", 2, 512, 16, 768, 12, 12, 3072, 4, 960, 16, 2560, 15, 5, 64, 49, silu}, quantised);
    time_model({"pi05", 2, 224, 14, 1152, 27, 16, 4304, 1, 2048, 18, 16384, 8, 1, 256, 48, gelu}, quantised);
  }
}

}  // namespace
}  // namespace vla::check

int main(int count, char** arguments) {
  using namespace vla::check;
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  base = launch_on(stream, 64 << 20);
  owned().clear();
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "probe" && count == 6) {
    const vla::cuda::Tile tile{std::atoi(arguments[3]), std::atoi(arguments[4]), std::atoi(arguments[5])};
    probe_product(arguments[2], tile);
  } else if (mode == "sweep" && count == 4) {
    sweep_tiles(std::atoi(arguments[2]), arguments[3] == std::string("e4m3"));
  } else if (count > 1) {
    std::fprintf(stderr, "usage: large_time [sweep CAMERAS bf16|e4m3 | probe NAME GROUPS COLUMNS SPLIT]\n");
    return 2;
  } else {
    everything();
  }
}
