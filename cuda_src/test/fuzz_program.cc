// Programs that are wrong in places, built and run under sanitizers: what is wrong has to be refused with one
// line, what is not has to stay within its memory.
//
//   fuzz_program CASES [SEED [FIRST]]      cases FIRST to FIRST + CASES - 1 of a seed; each is always the
//   same
//
// Compiled with -DVLA_LIBFUZZER and clang's -fsanitize=fuzzer it is a libFuzzer target instead.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

#include <sanitizer/common_interface_defs.h>

#include "engine.h"
#include "errors.h"
#include "ops/check.h"
#include "ops/parse.h"

namespace {

using vla::DType;
using vla::Packing;
using vla::Phase;
using vla::Place;

// Choices drawn from the bytes of a case, zeros after them.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint32_t below(size_t n) {
    const uint32_t low = next(), high = next();
    return n ? (low | high << 8) % n : 0;
  }
  bool one_in(size_t n) { return below(n) == n - 1; }
  template <typename T, size_t N>
  T of(const T (&values)[N]) {
    return values[below(N)];
  }

 private:
  uint32_t next() { return at_ < size_ ? data_[at_++] : 0; }
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

struct Matrix {
  int rows, cols;
  DType dtype;
};
struct Pack {
  Packing packing;
  std::vector<Matrix> parts;
  bool fp8 = false;
};
struct Store {
  Matrix values;
  DType as;
};
struct Step {
  Phase phase;
  std::string kind;
  std::map<std::string, Place> operands;
  std::vector<int> weights;
  std::map<std::string, double> attrs;
};
struct Description {
  std::string device = "cpu";
  DType act = DType::kF32;
  size_t arena = 0, tables = 0;
  std::vector<Pack> packs;
  std::vector<Store> stores;
  std::vector<Step> ops;
  std::vector<Place> inputs, outputs;
  int steps = 3;
};

// A program with every operation in it, small, and right.
class Right {
 public:
  explicit Right(DType act) : act_(act) {
    d_.act = act;
    const Place frames = arena(1, 192, DType::kU8), geometry = arena(1, 8, DType::kI32);
    const Place tokens = arena(3, 1, DType::kI32);
    const Place patches = arena(4, 48, act), x = arena(4, 16, act), wide = arena(4, 24, act);
    const Place q = arena(4, 16, act), k = arena(4, 8, act), v = arena(4, 8, act), seen = arena(4, 16, act);
    const Place square = arena(1, 64, act), words = arena(3, 16, act);
    const Place actions = arena(4, 6, DType::kF32), previous = arena(4, 6, DType::kF32);
    const Place weight = arena(4, 1, DType::kF32), gain = arena(1, 1, DType::kF32);
    Place table = arena(3, 16, DType::kF32);
    table.store = Place::kTables, table.offset = 0, d_.tables = 256;
    Place row = table;
    row.rows = 1, row.step_bytes = 64;
    const Place ones = stored(1, 16, DType::kF32), many = stored(1, 48, DType::kF32);
    const Place six = stored(1, 6, DType::kF32), embedding = stored(10, 16, act);
    const Place rope = stored(5, 8, DType::kF32), positions = stored(4, 1, DType::kI32);
    const Place times = stored(3, 16, DType::kF32);
    Place time = stored(3, 1, DType::kF32);
    time.rows = 1, time.step_bytes = 4;
    using Views = std::map<std::string, Place>;
    add(Phase::kAtLoad, "linear", Views{{"x", times}, {"bias", ones}, {"out", table}}, pack({{16, 16}}),
        {{"norm", 0}, {"act", 2}, {"scale", 1}});
    add(Phase::kBefore, "image_patches", Views{{"frames", frames}, {"geometry", geometry}, {"out", patches}},
        {}, {{"height", 8}, {"width", 8}, {"patch", 4}});
    add(Phase::kBefore, "linear",
        Views{{"x", patches}, {"bias", ones}, {"out", x}, {"norm_weight", many}, {"norm_bias", many}},
        pack({{16, 48}}), {{"norm", 1}, {"eps", 1e-5}, {"plus", 0}, {"act", 1}, {"scale", 0.5}});
    add(Phase::kBefore, "space_to_depth", Views{{"x", x}, {"out", square}}, {},
        {{"norm", 0}, {"factor", 2}, {"height", 2}, {"width", 2}});
    add(Phase::kBefore, "embed", Views{{"tokens", tokens}, {"table", embedding}, {"out", words}}, {},
        {{"scale", 4}});
    add(Phase::kLoop, "gated_linear", Views{{"x", x}, {"out", wide}, {"norm_weight", row}},
        pack({{24, 16}, {24, 16}}, Packing::kInterleaved),
        {{"norm", 2}, {"eps", 1e-6}, {"plus", 1}, {"act", 1}});
    add(Phase::kLoop, "linear", Views{{"x", wide}, {"gate", row}, {"residual", x}, {"out", x}},
        pack({{16, 24}}), {{"norm", 0}, {"act", 0}, {"scale", 1}});
    add(Phase::kLoop, "qkv",
        Views{{"x", x}, {"q", q}, {"k", k}, {"v", v}, {"rope", rope}, {"positions", positions}},
        pack({{16, 16}, {8, 16}, {8, 16}}), {{"norm", 2}, {"eps", 1e-6}, {"plus", 0}, {"head_dim", 8}});
    add(Phase::kLoop, "attention",
        Views{{"q", q}, {"k", k}, {"v", v}, {"q_block", positions}, {"k_block", positions}, {"out", seen}},
        {}, {{"head_dim", 8}, {"batch", 1}});
    add(Phase::kLoop, "euler",
        Views{{"h", seen},
              {"bias", six},
              {"x", actions},
              {"previous", previous},
              {"weight", weight},
              {"gain", gain},
              {"time", time}},
        pack({{6, 16}}), {{"norm", 0}, {"dt", -0.25}});
    d_.inputs = {frames, geometry, tokens, actions};
    d_.outputs = {actions};
  }
  Description take() { return std::move(d_); }

 private:
  Place arena(int rows, int cols, DType dtype) {
    const Place place{Place::kArena, int64_t(d_.arena), rows, cols, cols, 0, dtype};
    d_.arena += (size_t(rows) * cols * vla::size_of(dtype) + 63) / 64 * 64;
    return place;
  }
  Place stored(int rows, int cols, DType dtype) {
    const DType host = dtype == DType::kBF16 ? DType::kF32 : dtype;
    d_.stores.push_back({{rows, cols, host}, dtype});
    return {int(d_.stores.size()) - 1, 0, rows, cols, cols, 0, dtype};
  }
  std::vector<int> pack(const std::vector<std::pair<int, int>>& sizes, Packing packing = Packing::kStacked) {
    Pack pack{packing, {}};
    for (const auto& [n, k] : sizes) pack.parts.push_back({n, k, act_});
    d_.packs.push_back(pack);
    return {int(d_.packs.size()) - 1};
  }
  void add(Phase phase, const char* kind, std::map<std::string, Place> operands, std::vector<int> weights,
           std::map<std::string, double> attrs) {
    d_.ops.push_back({phase, kind, std::move(operands), std::move(weights), std::move(attrs)});
  }

  DType act_;
  Description d_;
};

template <typename Map>
typename Map::iterator pick(Choices& c, Map& map) {
  auto it = map.begin();
  std::advance(it, map.empty() ? 0 : c.below(map.size()));
  return it;
}

int64_t odd(Choices& c, int64_t was) {
  const auto u = static_cast<uint64_t>(was);  // which may overflow
  const uint64_t values[] = {u + 1,
                             u - 1,
                             0,
                             ~uint64_t{0},
                             1,
                             2,
                             u * 2,
                             u / 2,
                             0 - u,
                             64,
                             1 << 20,
                             INT32_MAX,
                             uint64_t{1} << 31,
                             uint64_t{1} << 33,
                             INT64_MAX,
                             uint64_t{1} << 63,
                             u + 4,
                             u + 64};
  return static_cast<int64_t>(c.of(values));
}

void change(Choices& c, Place& p) {
  switch (c.below(7)) {
    case 0:
      p.store = int(odd(c, p.store));
      break;
    case 1:
      p.offset = odd(c, p.offset);
      break;
    case 2:
      p.rows = int(odd(c, p.rows));
      break;
    case 3:
      p.cols = int(odd(c, p.cols));
      break;
    case 4:
      p.ld = odd(c, p.ld);
      break;
    case 5:
      p.step_bytes = odd(c, p.step_bytes);
      break;
    default:
      p.dtype = static_cast<DType>(c.below(7));
      break;
  }
}

void change(Choices& c, Step& op) {
  const double nan = std::nan("");
  switch (c.below(9)) {
    case 0:
    case 1:
      if (!op.operands.empty()) change(c, pick(c, op.operands)->second);
      break;
    case 2:
      if (!op.operands.empty()) std::swap(pick(c, op.operands)->second, pick(c, op.operands)->second);
      break;
    case 3:
      if (!op.operands.empty()) op.operands.erase(pick(c, op.operands));
      break;
    case 4: {
      const char* const names[] = {"",          "x",      "bias",        "residual", "gate", "rope",
                                   "positions", "q_bias", "norm_weight", "k_block",  "out"};
      if (!op.operands.empty()) op.operands[c.of(names)] = pick(c, op.operands)->second;
      break;
    }
    case 5: {
      const double values[] = {0, 1, 2, 3, -1, 0.5, 1e9, 1e300, nan, 4, 7, 16, 1e-300, -HUGE_VAL};
      if (!op.attrs.empty()) pick(c, op.attrs)->second = c.of(values);
      break;
    }
    case 6:
      if (c.one_in(2) && !op.attrs.empty()) {
        op.attrs.erase(pick(c, op.attrs));
      } else {
        const char* const names[] = {"more", "x_scale", "out_scale", "int8"};
        op.attrs[c.of(names)] = 1;
      }
      break;
    case 7: {
      const char* const kinds[] = {"linear", "gated_linear",   "qkv",           "attention", "embed",
                                   "euler",  "space_to_depth", "image_patches", "",          "softmax"};
      op.kind = c.of(kinds);
      break;
    }
    default:
      if (c.one_in(2)) {
        op.phase = static_cast<Phase>(int(c.below(6)) - 1);
      } else {
        op.weights.assign(c.below(3), int(c.below(12)) - 2);
      }
  }
}

int small(Choices& c, int was) {
  const int values[] = {was + 1, was - 1, 0, -1, 1, was * 2, 17, 64};
  return c.of(values);
}

void change(Choices& c, Description& d) {
  const size_t most = std::numeric_limits<size_t>::max();
  switch (c.below(12)) {
    case 0: {
      Pack& pack = d.packs[c.below(d.packs.size())];
      Matrix& part = pack.parts[c.below(pack.parts.size())];
      (c.one_in(2) ? part.rows : part.cols) = small(c, part.rows);
      if (c.one_in(4)) pack.packing = static_cast<Packing>(int(c.below(4)) - 1);
      pack.fp8 = c.one_in(20);
      break;
    }
    case 1: {
      Store& store = d.stores[c.below(d.stores.size())];
      (c.one_in(2) ? store.values.rows : store.values.cols) = small(c, store.values.rows);
      if (c.one_in(4)) store.as = static_cast<DType>(int(c.below(8)) - 1);
      break;
    }
    case 2: {
      const size_t sizes[] = {0, 1, d.arena - 1, d.arena / 2, d.arena * 2, most, most - 100, most / 2};
      (c.one_in(2) ? d.arena : d.tables) = c.of(sizes);
      break;
    }
    case 3: {
      const int steps[] = {0, 1, 2, 4, -1, INT32_MAX, INT32_MIN, 1 << 20};
      d.steps = c.of(steps);
      break;
    }
    case 4:
      change(c, (c.one_in(2) ? d.inputs : d.outputs)[0]);
      break;
    case 5:
      std::swap(d.ops[c.below(d.ops.size())], d.ops[c.below(d.ops.size())]);
      break;
    default:
      change(c, d.ops[c.below(d.ops.size())]);
  }
}

// Values of a matrix in memory of exactly its size.
std::unique_ptr<std::byte[]> values_of(const Matrix& m) {
  const size_t count = m.rows > 0 && m.cols > 0 ? size_t(m.rows) * m.cols : 0;
  auto values = std::make_unique<std::byte[]>(count * vla::size_of(m.dtype));
  for (size_t i = 0; i < count; ++i) {
    if (m.dtype == DType::kBF16) {
      reinterpret_cast<uint16_t*>(values.get())[i] = 0x3e80;  // 0.25
    } else if (m.dtype == DType::kF32) {
      reinterpret_cast<float*>(values.get())[i] = 0.25f * float(i % 5);
    } else {
      reinterpret_cast<int32_t*>(values.get())[i] = int32_t(i % 5);
    }
  }
  return values;
}

// Pictures of 8 x 8; nothing else that the kernels take for granted.
void fill(vla::Program& program, const Description& d) {
  const Place& geometry = d.inputs[1];
  if (geometry.dtype != DType::kI32 || geometry.rows != 1 || geometry.cols != 8) return;
  const int32_t right[] = {8, 8, 24, 8, 8, 0, 0, 1};
  for (int i = 0; i < 8; ++i) reinterpret_cast<int32_t*>(program.input(1))[i] = right[i];
}

void build_and_run(Choices& c, const Description& d) {
  vla::Engine engine(d.device, d.act, 1);
  for (const Pack& pack : d.packs) {
    std::vector<std::unique_ptr<std::byte[]>> memory;
    std::vector<vla::HostMatrix> parts;
    for (const Matrix& m : pack.parts) {
      memory.push_back(values_of(m));
      parts.push_back({memory.back().get(), m.dtype, m.rows, m.cols, m.cols});
    }
    if (pack.fp8) {
      engine.pack_fp8(pack.packing, parts);  // the CPU has none
      std::fprintf(stderr, "the CPU packed fp8\n");
      std::abort();
    }
    engine.pack(pack.packing, parts, 4);
  }
  for (const Store& store : d.stores) {
    const auto memory = values_of(store.values);
    const Matrix& m = store.values;
    if (m.dtype == DType::kI32) {
      engine.store_ints(reinterpret_cast<const int32_t*>(memory.get()), m.rows, m.cols);
    } else {
      engine.store({memory.get(), m.dtype, m.rows, m.cols, m.cols}, store.as);
    }
  }
  if (!c.one_in(200)) engine.reserve(d.arena);
  vla::Program program(engine, d.tables);
  for (const Step& op : d.ops) program.add(op.phase, op.kind, op.operands, op.weights, op.attrs);
  if (!c.one_in(200)) program.finish(d.steps, d.inputs, d.outputs);
  if (c.one_in(200)) program.finish(d.steps, d.inputs, d.outputs);
  fill(program, d);
  if (d.steps <= 4) program.run();
  program.output(c.one_in(200) ? -1 : 0);
}

// ---- E4M3, which no device here has: operations as one that has it would get them, wrong in places. What
// passes has to be what the kernels take for granted.

alignas(256) std::byte somewhere[1 << 16];

vla::View quantised_view(int rows, int cols, DType dtype, int at) {
  return {somewhere + 4096 * at, rows, cols, cols, 0, dtype};
}

vla::Recorded right_quantised(Choices& c) {
  const DType wide = c.one_in(2) ? DType::kE4M3 : DType::kBF16, act = DType::kBF16;
  const auto weight = [](Packing packing, int k, std::vector<int> n) {
    return vla::Weight{somewhere, DType::kE4M3, packing, k, std::move(n)};
  };
  vla::Recorded r;
  const auto out = [&](int rows, int cols) {
    r.operands["out"] = quantised_view(rows, cols, wide, 8);
    if (wide == DType::kE4M3) r.attrs["out_scale"] = 0.5;
  };
  switch (c.below(6)) {
    case 0:
      r.kind = "linear", r.weights = {weight(Packing::kStacked, 32, {48})};
      r.operands["x"] = quantised_view(5, 32, c.one_in(2) ? DType::kE4M3 : act, 0);
      r.operands["bias"] = quantised_view(1, 48, DType::kF32, 1);
      r.operands["residual"] = quantised_view(5, 48, act, 2);
      r.attrs = {{"norm", 0}, {"act", 1}, {"scale", 1}, {"x_scale", 0.25}};
      out(5, 48);
      break;
    case 1:
      r.kind = "gated_linear", r.weights = {weight(Packing::kInterleaved, 32, {48, 48})};
      r.operands["x"] = quantised_view(5, 32, act, 0);
      r.operands["norm_weight"] = quantised_view(1, 32, DType::kF32, 1);
      r.attrs = {{"norm", 2}, {"eps", 1e-6}, {"plus", 1}, {"act", 2}, {"x_scale", 0.25}};
      out(5, 48);
      break;
    case 2:
      r.kind = "qkv", r.weights = {weight(Packing::kStacked, 32, {32, 16, 16})};
      r.operands["x"] = quantised_view(5, 32, c.one_in(2) ? DType::kE4M3 : act, 0);
      r.operands["q"] = quantised_view(5, 32, act, 1), r.operands["k"] = quantised_view(5, 16, act, 2);
      r.operands["v"] = quantised_view(5, 16, act, 3);
      r.attrs = {{"norm", 0}, {"head_dim", 16}, {"x_scale", 0.25}};
      break;
    case 3:
      r.kind = "attention";
      r.operands["q"] = quantised_view(6, 32, act, 0), r.operands["k"] = quantised_view(8, 16, act, 1);
      r.operands["v"] = quantised_view(8, 16, act, 2);
      r.attrs = {{"head_dim", 16}, {"batch", 2}};
      out(6, 32);
      break;
    case 4:
      r.kind = "space_to_depth";
      r.operands["x"] = quantised_view(8, 16, act, 0);
      r.attrs = {{"norm", 0}, {"factor", 2}, {"height", 2}, {"width", 4}};
      out(2, 64);
      break;
    default:
      r.kind = "image_patches";
      r.operands["frames"] = quantised_view(2, 192, DType::kU8, 0);
      r.operands["geometry"] = quantised_view(2, 8, DType::kI32, 1);
      r.attrs = {{"height", 8}, {"width", 8}, {"patch", 4}};
      out(8, 48);
  }
  return r;
}

void change(Choices& c, vla::Recorded& r) {
  vla::View& v = pick(c, r.operands)->second;
  const double scales[] = {0.5, 0, -1, 1e-40, 1e40, std::nan(""), HUGE_VAL, 1e-30};
  const char* const names[] = {"x_scale", "out_scale", "norm"};
  switch (c.below(8)) {
    case 0:
      v.base += 1 << c.below(6);
      break;
    case 1:
      v.ld += int(c.below(40)) - 4;
      break;
    case 2:
    case 3:
      v.dtype = static_cast<DType>(c.below(6));
      break;
    case 4:
      v.step_bytes = 1 << c.below(8);
      break;
    case 5:
      r.attrs[c.of(names)] = c.of(scales);
      break;
    case 6:
      r.attrs.erase(c.of(names));
      break;
    default:
      if (!r.weights.empty()) r.weights[0].dtype = static_cast<DType>(c.below(6));
  }
}

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "passed the check: %s\n", what);
  std::abort();
}

void must_be_quantised(const vla::View& v, float scale) {
  must(scale >= 0.99e-37f && scale <= 1.01e37f, "a scale out of range");
  must(reinterpret_cast<uintptr_t>(v.base) % 16 == 0 && v.ld % 16 == 0 && v.step_bytes % 16 == 0,
       "an E4M3 operand that is not aligned");
}

// Throws what parse and check throw.
void check_quantised(Choices& c) {
  vla::Recorded r = right_quantised(c);
  const uint32_t changes = c.below(4);
  for (uint32_t i = 0; i < changes; ++i) change(c, r);
  try {
    vla::check(vla::parse(r), {DType::kBF16, true}, r.kind);
  } catch (const std::invalid_argument&) {
    must(changes > 0, "nothing: an operation without a fault was refused");
    throw;
  }
  const auto attr = [&](const char* name) { return r.attrs.count(name) ? float(r.attrs[name]) : 0.0f; };
  const bool e4m3_weight = !r.weights.empty() && r.weights[0].dtype == DType::kE4M3;
  must(e4m3_weight == (attr("x_scale") != 0.0f), "x_scale and the weight's type differ");
  for (const auto& [name, v] : r.operands) {
    if (v.dtype != DType::kE4M3) {
      must(name != "out" || attr("out_scale") == 0.0f, "out_scale of what is not E4M3");
      continue;
    }
    must(name == "out" || (name == "x" && e4m3_weight && attr("norm") == 0), "E4M3 where nothing takes it");
    must_be_quantised(v, attr(name == "out" ? "out_scale" : "x_scale"));
    must(name != "out" || r.weights.empty() || e4m3_weight, "an E4M3 out of a product in bfloat16");
  }
  bool refused = false;  // by a device without E4M3
  try {
    vla::check(vla::parse(r), {DType::kBF16, false}, r.kind);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  bool any = e4m3_weight;
  for (const auto& [name, v] : r.operands) any |= v.dtype == DType::kE4M3;
  must(refused || !any, "E4M3 on a device without it");
}

enum class End { kRan, kRefused };

End run_case(const uint8_t* data, size_t size) {
  Choices c(data, size);
  const bool quantised = c.one_in(4);
  Description d = Right(c.one_in(2) ? DType::kBF16 : DType::kF32).take();
  for (uint32_t changes = c.below(5); changes > 0; --changes) change(c, d);
  const auto sets = vla::cpu_instruction_sets();
  d.device = c.one_in(100) ? "tpu" : "cpu:" + sets[c.below(sets.size())];
  std::string problem;
  try {
    if (quantised) {
      check_quantised(c);
    } else {
      build_and_run(c, d);
    }
    return End::kRan;
  } catch (const std::logic_error& error) {
    problem = error.what();
  } catch (const std::runtime_error& error) {
    problem = error.what();
  } catch (const std::bad_alloc&) {
    problem = "out of memory";
  }
  if (problem.empty() || problem.size() > 400 || problem.find('\n') != std::string::npos) {
    std::fprintf(stderr, "no line of text: '%s'\n", problem.c_str());
    std::abort();
  }
  return End::kRefused;
}

}  // namespace

#ifdef VLA_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  run_case(data, size);
  return 0;
}
#else
namespace {
unsigned long long current_case = 0, current_seed = 0;

void say_which() { std::fprintf(stderr, "again: fuzz_program 1 %llu %llu\n", current_seed, current_case); }
}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, uint64_t otherwise) {
    return argc > i ? std::strtoull(argv[i], nullptr, 10) : otherwise;
  };
  const uint64_t cases = number(1, 1000), seed = number(2, 0), first = number(3, 0);
  uint64_t ran = 0;
  current_seed = seed;
  __sanitizer_set_death_callback(say_which);
  for (uint64_t i = first; i < first + cases; ++i) {
    // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t state = seed * 0xaf251af3b0f025b5u + i * 0xd1342543de82ef95u;
    uint8_t data[96];
    for (uint8_t& byte : data) {
      uint64_t z = state += 0x9e3779b97f4a7c15u;
      z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
      z = (z ^ z >> 27) * 0x94d049bb133111ebu;
      byte = uint8_t(z >> 56 ^ z >> 31);
    }
    current_case = i;
    ran += run_case(data, sizeof data) == End::kRan;
  }
  std::printf("%llu cases: %llu ran, %llu refused\n", (unsigned long long)cases, (unsigned long long)ran,
              (unsigned long long)(cases - ran));
  return ran == 0 || (cases > 100 && ran == cases);  // both have to happen, or nothing was tried
}
#endif
