// The operations of the tape, as the executors get them: everything resolved, nothing left to look up.
// Formulas and shapes are those of vla_infer/tape.py, repeated here next to the structures that carry them.
// "act" is float32 or bfloat16; sums, norms and softmax are float32 in both.
//
// E4M3 (on devices that have it): a value v is held as the nearest E4M3 number to v / scale, saturating.
// x_scale, of a product whose W is E4M3: norm(x) is multiplied as E4M3 with this scale; x itself is either
// not yet quantised or, without a norm, E4M3 with this scale already. out_scale: out is E4M3 with this scale.
// 0 where there is none.
#pragma once

#include <variant>

#include "tensor.h"

namespace vla {

// out (cameras * patches, 3 * patch^2) act = bilinear resize (half-pixel centres), pad, pixel / 127.5 - 1,
// cut into patches with columns (c, y, x); padding and absent pictures are -1. frames (cameras, bytes) u8.
// geometry (cameras, 8) i32: h, w, row stride in bytes, resized h, resized w, top pad, left pad, present.
struct ImagePatches {
  View frames, geometry, out;
  int height = 0, width = 0, patch = 0;
  float out_scale = 0.0f;
};

// out (m, n) = residual + gate * act(scale * (norm(x) W^T + bias)).
// x (m, k) act or f32; bias, gate (1, n) f32; residual (r, n), row i of out takes row i mod r; may alias out.
struct Linear {
  View x, bias, residual, gate, out;
  Norm norm;
  Weight w;
  Act act = Act::kNone;
  float scale = 1.0f;
  float x_scale = 0.0f, out_scale = 0.0f;
};

// out (m, n) = act(norm(x) G^T) * (norm(x) U^T); W holds G and U interleaved.
struct GatedLinear {
  View x, out;
  Norm norm;
  Weight w;
  Act act = Act::kNone;
  float x_scale = 0.0f, out_scale = 0.0f;
};

// q, k, v (m, heads * d) = norm(x) W^T + bias, with rotary embedding on the heads of q and k:
// [h1 | h2] -> [h1 cos - h2 sin | h2 cos + h1 sin], cos and sin from row positions[i] of rope (positions, d)
// = [cos | sin] f32 (out of range: row 0). Any of q, k, v may be absent (W then has no rows for it); q, k, v
// may have their own stride.
struct Qkv {
  View x, q, k, v, q_bias, k_bias, v_bias, rope, positions;
  Norm norm;
  Weight w;
  int head_dim = 0;
  float x_scale = 0.0f;
};

// out (batch * m, heads * d) = softmax(q k^T / sqrt(d) + mask) v by head; kv heads are shared by heads /
// kv_heads query heads. q_block (m, 1), k_block (n, 1) i32 or absent: query i sees key j when k_block[j] <=
// q_block[i]. A row that sees no key gives zeros.
struct Attention {
  View q, k, v, q_block, k_block, out;
  int head_dim = 0, batch = 1;
  bool int8 = false;  // q and k by row, v by column and the probabilities as 8-bit integers
  float out_scale = 0.0f;
};

// out (batch * height * width / f^2, d * f^2): norm(x), then squares of f x f rows of the grid become one
// row.
struct SpaceToDepth {
  View x, out;
  Norm norm;
  int factor = 1, height = 0, width = 0;
  float out_scale = 0.0f;
};

// out[i] (m, d) = scale * table[tokens[i]]; tokens (m, 1) i32 (out of range: row 0), table (vocabulary, d)
// act.
struct Embed {
  View tokens, table, out;
  float scale = 1.0f;
};

// v = norm(h) W^T + bias;  x += dt * (v - gain * weight * (previous - (x - time * v))).
// h (m, k) act; x, previous (m, n) f32; weight (m, 1), gain and time (1, 1) f32.
struct Euler {
  View h, bias, x, previous, weight, gain, time;
  Norm norm;
  Weight w;
  float dt = 0.0f;
};

using Op = std::variant<ImagePatches, Linear, GatedLinear, Qkv, Attention, SpaceToDepth, Embed, Euler>;

}  // namespace vla
