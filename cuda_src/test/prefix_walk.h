// The second half of prefix_case.h: the layers by their operations and by the table.
#pragma once

namespace vla::test::layers {

// The operations one after another; what one writes is kept in double precision, not rounded.
inline void Prefix::reference() {
  const auto value = [&](const View& v) -> Values {
    const auto it = exact_.find(v.base);
    return it != exact_.end() ? it->second : read(v);
  };
  const auto normed = [&](const View& v, const Norm& n) {
    Values x = value(v);
    if (n.kind == NormKind::kNone) return x;
    for (int i = 0; i < v.rows; ++i) {
      double sum = 0.0;
      for (int j = 0; j < v.cols; ++j) sum += x[i * v.cols + j] * x[i * v.cols + j];
      const double inverse = 1.0 / std::sqrt(sum / v.cols + double(n.eps));
      for (int j = 0; j < v.cols; ++j)
        x[i * v.cols + j] *= inverse * (Heap::get(n.weight, 0, j) + double(n.plus));
    }
    return x;
  };
  const auto times = [&](const Values& x, int m, const View& w) {  // x W^T
    const Values numbers = read(w);
    Values y(size_t(m) * w.rows);
    parallel_for(w.rows, [&](int n) {
      for (int i = 0; i < m; ++i) {
        double sum = 0.0;
        for (int c = 0; c < w.cols; ++c) sum += x[size_t(i) * w.cols + c] * numbers[size_t(n) * w.cols + c];
        y[size_t(i) * w.rows + n] = sum;
      }
    });
    return y;
  };
  for (const Op& op : ops) {
    if (const auto* o = std::get_if<Qkv>(&op)) {
      const Values x = normed(o->x, o->norm);
      const std::vector<View>& parts = raw_[o->w.data];
      const View* const outs[3] = {&o->q, &o->k, &o->v};
      for (int part = 0, at = 0; part < 3; ++part) {
        if (!*outs[part]) continue;
        const View& out = *outs[part];
        Values y = times(x, out.rows, parts[at++]);
        for (int i = 0; i < out.rows && part < 2; ++i) {
          int position = int(Heap::get(o->positions, i, 0));
          if (position < 0 || position >= o->rope.rows) position = 0;
          for (int c = 0; c < out.cols; c += c % 64 == 31 ? 33 : 1) {
            double &a = y[i * out.cols + c], &b = y[i * out.cols + c + 32];
            const double cosine = Heap::get(o->rope, position, c % 64),
                         sine = Heap::get(o->rope, position, c % 64 + 32);
            const double first = a * cosine - b * sine;
            b = b * cosine + a * sine, a = first;
          }
        }
        exact_[out.base] = y;
      }
    } else if (const auto* o = std::get_if<Attention>(&op)) {
      const Values q = value(o->q), k = value(o->k), v = value(o->v);
      const int m = o->q.rows, n = o->k.rows, heads = o->q.cols / 64, each = heads / (o->k.cols / 64);
      Values y(q.size());
      parallel_for(heads * m, [&](int work) {
        const int head = work / m, i = work % m, kv = head / each;
        Values s(n);
        double sum = 0.0;
        for (int j = 0; j < n; ++j) {
          double dot = 0.0;
          for (int c = 0; c < 64; ++c)
            dot += q[i * o->q.cols + head * 64 + c] * k[j * o->k.cols + kv * 64 + c];
          s[j] = Heap::get(o->k_block, j, 0) <= Heap::get(o->q_block, i, 0) ? std::exp(dot / 8.0) : 0.0;
          sum += s[j];
        }
        for (int c = 0; c < 64; ++c) {
          double out = 0.0;
          for (int j = 0; j < n; ++j) out += s[j] * v[j * o->k.cols + kv * 64 + c];
          y[i * o->q.cols + head * 64 + c] = sum > 0.0 ? out / sum : 0.0;
        }
      });
      exact_[o->out.base] = y;
    } else if (const auto* o = std::get_if<GatedLinear>(&op)) {
      const Values x = normed(o->x, o->norm);
      Values g = times(x, o->x.rows, raw_[o->w.data][0]);
      const Values u = times(x, o->x.rows, raw_[o->w.data][1]);
      for (size_t i = 0; i < g.size(); ++i) g[i] = loop::act_of(g[i], int(o->act)) * u[i];
      exact_[o->out.base] = g;
    } else {
      const auto& linear = std::get<Linear>(op);
      Values y = times(value(linear.x), linear.x.rows, raw_[linear.w.data][0]);
      if (linear.residual) {
        const Values r = value(linear.residual);
        for (size_t i = 0; i < y.size(); ++i) y[i] += r[i];
      }
      exact_[linear.out.base] = y;
    }
  }
}

// The table, block by block, as the kernel does it: what is stored is rounded as there, sums are exact.
inline void Prefix::walk() {
  const Table& t = *table;
  std::vector<Values> state(t.ctas,
                            Values(size_t(64) * t.owned, 0.0));  // [row][column] of what a block finishes
  const auto number = [](Bits b) { return double(from_bits(b)); };
  const auto bits = [](double v) { return to_bits(float(v)); };
  const auto inverse = [&](const Phase& p, int row) {
    double sum = 0.0;
    for (int i = 0; i < pre::kSquareParts; ++i) sum += t.squares[row * pre::kSquareParts + i];
    return 1.0 / std::sqrt(sum * p.mean + p.eps);
  };
  const auto end_state = [&](const Phase& p, int cta, int column, int row0,
                             const std::function<double(int, int)>& z) {
    for (int r = 0; r < t.owned && row0 + r < t.m; ++r) {
      double parts[4] = {};
      for (int c = 0; c < 64; ++c) {
        double& its = state[cta][size_t(r) * 64 + c];
        its += z(r, c);
        parts[c / 16] += its * its;
        const double next = p.next ? double(p.next[column * 64 + c]) + p.next_plus : 1.0;
        p.out[pre::act_index(t.rows, row0 + r, column * 64 + c)] = bits(its * next);
      }
      for (int i = 0; i < 4; ++i)
        t.squares[(row0 + r) * pre::kSquareParts + column * 4 + i] = float(parts[i]);
    }
  };
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    // [tile][row][packed row of W], of both blocks of a pair together where they share k
    std::vector<Values> sums(pre::is_product(p) ? pre::tiles_of(p) : 0);
    const auto multiply = [&](int cta, int tile, Values& sum) {
      const pre::Tile at = pre::tile_at(p, tile, cta);
      const int height = pre::tile_rows(p);
      if (sum.empty()) sum.assign(size_t(p.rows) * height, 0.0);
      for (int stage = 0; stage < pre::stages_of(p, at); ++stage)
        for (int j = 0; j < pre::chunks_of_stage(p, at, stage); ++j) {
          const Bits* w = p.w + pre::weights_at(p, at, stage) + size_t(j) * height * 64;
          const Bits* x = p.x + (size_t(at.first + stage * p.stage_chunks + j) * p.x_rows + at.row) * 64;
          Values weights(size_t(height) * 64), row(64);
          for (int r = 0; r < height; ++r)
            for (int e = 0; e < 64; ++e)
              weights[r * 64 + e] = number(w[r * 64 + ((e / 8) ^ (r & 7)) * 8 + e % 8]);
          for (int r = 0; r < p.rows && at.row + r < t.m; ++r) {
            for (int e = 0; e < 64; ++e) row[e] = number(x[r * 64 + ((e / 8) ^ (r & 7)) * 8 + e % 8]);
            for (int n = 0; n < height; ++n) {
              double dot = 0.0;
              for (int e = 0; e < 64; ++e) dot += row[e] * weights[n * 64 + e];
              sum[size_t(r) * height + n] += dot;
            }
          }
        }
    };
    const auto tiles = [&](const std::function<void(int cta, int tile)>& f) {
      for (int cta = 0; cta < t.ctas; ++cta)
        for (int tile = pre::first_tile(p, cta); tile < pre::tiles_of(p); tile += p.ctas) f(cta, tile);
    };
    if (pre::is_product(p)) tiles([&](int cta, int tile) { multiply(cta, tile, sums[tile]); });
    tiles([&](int cta, int tile) {
      const pre::Tile at = pre::tile_at(p, tile, cta);
      if (p.kind == Kind::kPrepare) {
        end_state(p, cta, at.column, at.row, [&](int r, int c) {
          return number(t.prefix[(at.row + r) * t.ld_prefix + at.column * 64 + c]);
        });
      } else if (p.kind == Kind::kLinear) {
        const int first = p.split == pre::kPair ? cta % pre::kPair * t.owned : 0;
        end_state(p, cta, at.column, at.row + first,
                  [&](int r, int c) { return sums[tile][size_t(first + r) * 64 + c]; });
      } else if (p.kind == Kind::kAttention) {
        const int kv = at.column / t.heads_per_key, keys = 2 * t.key_rows;
        for (int r = at.row; r < at.row + 64 && r < t.m; ++r) {
          Values s(t.m), q(64), y(64, 0.0);
          double sum = 0.0;
          for (int c = 0; c < 64; ++c) q[c] = number(p.x[pre::act_index(t.rows, r, at.column * 64 + c)]);
          for (int j = 0; j < t.m; ++j) {
            double dot = 0.0;
            for (int c = 0; c < 64; ++c) dot += q[c] * number(t.k[pre::act_index(keys, j, kv * 64 + c)]);
            const bool seen = !t.k_block || t.k_block[j * t.ld_k_block] <= t.q_block[r * t.ld_q_block];
            s[j] = seen ? std::exp2(dot * t.scale) : 0.0, sum += s[j];
          }
          for (int j = 0; j < t.m; ++j)
            for (int c = 0; c < 64; ++c) y[c] += s[j] * number(t.v[pre::act_index(keys, j, kv * 64 + c)]);
          for (int c = 0; c < 64; ++c)
            p.out[pre::act_index(t.rows, r, at.column * 64 + c)] = bits(sum > 0.0 ? y[c] / sum : 0.0);
        }
      } else {
        const int height = pre::tile_rows(p);
        for (int r = 0; r < p.rows && at.row + r < t.m; ++r) {
          const int row = at.row + r;
          const double* z = &sums[tile][size_t(r) * height];
          const double scale = p.kind == Kind::kProject ? 1.0 : inverse(p, row);
          for (int n = 0; n < height; ++n) {
            const int c = n / 16 * 8 + n % 8;  // of the units' first groups; n + 8 is the second
            if (p.kind == Kind::kProject) {
              p.out[row * p.ld_out + at.column * 64 + n] = bits(z[n]);
            } else if (n % 16 >= 8) {
              continue;
            } else if (p.kind == Kind::kGated) {
              p.out[pre::act_index(t.rows, row, at.column * 64 + c)] =
                  bits(loop::act_of(z[n] * scale, p.act) * z[n + 8] * scale);
            } else {
              const pre::HeadOf of = pre::head_of(p.heads, at.column);
              double a = z[n] * scale, b = z[n + 8] * scale;
              if (of.part < 2 && t.rope) {
                int position = t.positions[row * t.ld_positions];
                if (position < 0 || position >= t.rope_rows) position = 0;
                const float* rope = t.rope + position * t.ld_rope;
                const double first = a * rope[c] - b * rope[c + 32];
                b = b * rope[c] + a * rope[c + 32], a = first;
              }
              Bits* out = of.part == 0 ? p.out : of.part == 1 ? t.k : t.v;
              const int rows = of.part == 0 ? t.rows : 2 * t.key_rows, column = of.head * 64 + c;
              out[pre::act_index(rows, row, column)] = bits(a),
                                            out[pre::act_index(rows, row, column + 32)] = bits(b);
              if (of.part == 0) continue;
              Bits* cache = (of.part == 1 ? p.cache_k : p.cache_v) + row * (of.part == 1 ? p.ld_k : p.ld_v);
              cache[column] = bits(a), cache[column + 32] = bits(b);
            }
          }
        }
      }
    });
  }
}

}  // namespace vla::test::layers
