// Part of head_case.h: the loop by the table, as the kernel does it, and by the operations themselves.

inline const std::vector<double>& numbers() {  // of every bf16 pattern
  static const std::vector<double> all = [] {
    std::vector<double> v(65536);
    for (int i = 0; i < 65536; ++i) v[i] = from_bits(Bits(i));
    return v;
  }();
  return all;
}
inline double rounded(double x) { return from_bits(to_bits(float(x))); }

inline void Head::walk() {
  const Table& t = *table_;
  const int C = kCluster, R = t.rows;
  const std::vector<double>& number = numbers();
  std::vector<float> residual(size_t(t.ctas) * kConsumers * 4, 0.0f);
  // a swizzled element of a row of 64
  const auto at = [](const Bits* rows, int row, int col) {
    return rows[row * kChunk + ((col / 8) ^ (row & 7)) * 8 + col % 8];
  };
  // before the loop
  for (int i = 0; i < t.phases; ++i) {
    const Phase& p = t.phase[i];
    if (p.kind != Kind::kAttention) continue;
    const AttentionPart& a = p.attention;
    for (int head = 0; head < a.kv_heads; ++head)
      for (int rank = 0; rank < C; ++rank)
        for (int row = 0; row < a.prefix_rows; ++row)
          for (int col = 0; col < p.head_dim; ++col) {
            const int key = rank * a.prefix_rows + row;
            const unsigned to = key_index(head, rank, p.chunks, a.prefix_rows, row, col);
            const int its = p.joined ? joined_column(1, col / 8, col % 8) : col;
            a.packed_k[to] = key < a.prefix ? a.k[int64_t(key) * a.ld_k + head * p.head_dim + its] : Bits(0);
            a.packed_v[to] = key < a.prefix ? a.v[int64_t(key) * a.ld_v + head * p.head_dim + col] : Bits(0);
          }
  }
  for (int row = 0; row < t.m - t.first; ++row)
    for (int col = 0; col < t.action_n; ++col)
      t.actions[act_index(R, t.first + row, col)] = to_bits(t.sample[row * t.ld_sample + col]);

  const auto rms_of = [&](const Phase& p, int row) {
    if (!p.normed || row >= t.m) return 1.0;
    double sum = 0.0;
    for (int i = 0; i < kSquareParts; ++i) sum += p.squares_in[row * kSquareParts + i];
    return 1.0 / std::sqrt(sum * p.mean + p.eps);
  };
  const auto multiply = [&](const Phase& p, const Share& s) {  // (64, tile_rows)
    std::vector<double> acc(64 * p.tile_rows, 0.0), x(kChunk), w(kChunk);
    for (int c = s.first; c < s.last; ++c) {
      const Bits* xs = p.x + int64_t(c) * R * kChunk;
      const Bits* ws = p.w + (int64_t(s.tile) * p.chunks + c) * p.tile_rows * kChunk;
      for (int r = 0; r < p.tile_rows; ++r) {
        for (int e = 0; e < kChunk; ++e) w[e] = number[at(ws, r, e)];
        for (int row = 0; row < t.m; ++row) {
          double sum = 0.0;
          for (int e = 0; e < kChunk; ++e) sum += number[at(xs, row, e)] * w[e];
          acc[row * p.tile_rows + r] += sum;
        }
      }
    }
    return acc;
  };
  // What the blocks of a cluster are sent, a buffer each.
  using Received = std::vector<std::vector<float>>;
  // Sums of one source to its cluster's owners: units of 4.
  const auto send_sums = [&](Received& to, const std::vector<double>& acc, int columns, int rank) {
    for (int thread = 0; thread < kGroup; ++thread)
      for (int j = 0; j < columns / 8; ++j) {
        const int lane = thread % 32, odd = lane & 1, owner = thread / 32 * 2 + odd;
        if (owner * 8 >= R) continue;
        // the pair's lane that holds columns 2 (lane % 4), and its neighbour
        for (int e = 0; e < 4; ++e) {
          const SumPlace from = sum_place((thread & ~1) + e / 2, 4 * j + 2 * odd + e % 2);
          to[owner][receive_unit(rank, lane / 4, j, lane % 4 / 2, columns / 8) * 4 + e] =
              float(acc[from.row * columns + from.col]);
        }
      }
  };
  // Keys, values and queries in each block's shared memory, where qkv is joined to its attention.
  std::vector<std::vector<Bits>> blocks(t.ctas);
  const auto join = [&](const Phase& p, const Phase& next, int step) {
    const AttentionPart& a = next.attention;
    for (int cta = 0; cta < p.tiles; ++cta) {
      blocks[cta].assign(queries_at(next) / 2 + R * kChunk, to_bits(NAN));
      const HeadTask task = head_task(next, t.m, cta / C);
      const int64_t from = key_index(task.key_head, cta % C, 1, a.prefix_rows, 0, 0);
      for (int j = 0; j < a.prefix_rows * kChunk; ++j)
        blocks[cta][j] = a.packed_k[from + j], blocks[cta][values_at(next) / 2 + j] = a.packed_v[from + j];
    }
    for (int cta = 0; cta < p.tiles; ++cta) {
      const std::vector<double> acc = multiply(p, share_of(p, cta));
      const int rank = cta % C, first = cta - rank;
      for (int part = 0; part < p.tile_rows / kJoinedColumns; ++part)
        for (int row = 0; row < 64; ++row)
          for (int pair = 0; pair < kJoinedColumns; pair += 2) {
            double y[2] = {};
            for (int e = 0; e < 2 && row < t.m; ++e) {
              y[e] = acc[row * p.tile_rows + part * kJoinedColumns + pair + e] * rms_of(p, row);
              if (const float* shift = p.shift.at(step))
                y[e] += shift[shift_row(p, part, source_row(p, cta, part * kJoinedColumns + pair + e).row)];
            }
            const int place = joined_place(pair), column = joined_column(part, rank, place);
            if (p.qkv.rope && part < 2 && row < t.m) {
              const float* table =
                  p.qkv.rope + int64_t(p.qkv.positions[row * p.qkv.ld_positions]) * p.qkv.ld_rope;
              const double cosine = table[column], sine = table[column + kChunk / 2], x = y[0];
              y[0] = x * cosine - y[1] * sine, y[1] = y[1] * cosine + x * sine;
            }
            for (int e = 0; e < 2; ++e) {
              const Bits v = to_bits(float(y[e]));
              const int c = place + 4 * e;  // of octet `rank`
              for (int k = 0; part == 0 && row < R && k < C; ++k)
                blocks[first + k][queries_at(next) / 2 + act_index(0, row, kJoinedColumns * rank + c)] = v;
              if (part > 0)
                blocks[first + row / kFreshRows]
                      [(part == 1 ? 0 : values_at(next) / 2) +
                       act_index(0, a.prefix_rows + row % kFreshRows, kJoinedColumns * rank + c)] = v;
            }
          }
    }
  };
  for (int step = 0; step < (look_ ? 1 : t.steps); ++step) {
    for (int i = 0; i < t.phases; ++i) {
      const Phase& p = t.phase[i];
      if (p.joined && p.kind == Kind::kQkv) {
        join(p, t.phase[i + 1], step);
      } else if (is_spread(p)) {
        for (int cta = 0; cta < t.ctas; ++cta) {
          const Share s = share_of(p, cta);
          if (s.count() == 0) continue;
          const std::vector<double> acc = multiply(p, s);
          const int per_tile = p.tile_rows / 16, unit0 = s.tile * per_tile,
                    units = std::min(p.units, unit0 + per_tile);
          for (int thread = 0; thread < kGroup; ++thread)
            for (int u = 0; unit0 + u < units; ++u)
              for (int h = 0; h < 2; ++h)
                for (int e = 0; e < 2; ++e) {
                  const SumPlace one = sum_place(thread, 8 * u + 2 * h + e),
                                 two = sum_place(thread, 8 * u + 4 + 2 * h + e);
                  const int r = one.row, c = thread % 4 * 2 + e, unit = unit0 + u;
                  if (r >= t.m) continue;
                  Octets o{0, unit * 8, unit * 8};
                  if (p.kind == Kind::kQkv) o = octets_of(p, unit);
                  const bool gated = p.kind == Kind::kGated;
                  double first = acc[r * p.tile_rows + one.col] * rms_of(p, r),
                         second = acc[r * p.tile_rows + two.col] * rms_of(p, r);
                  if (const float* shift = p.shift.at(step)) {
                    first += shift[shift_row(p, gated ? 0 : o.part, o.first + c)];
                    second += shift[shift_row(p, gated ? 1 : o.part, o.second + c)];
                  }
                  if (gated) {
                    p.out[act_index(R, r, unit * 8 + c)] = to_bits(float(act_of(first, p.act) * second));
                    continue;
                  }
                  double low = first, high = second;
                  if (p.qkv.rope && o.part < 2) {
                    const float* table =
                        p.qkv.rope + int64_t(p.qkv.positions[r * p.qkv.ld_positions]) * p.qkv.ld_rope;
                    const int column = o.first % p.head_dim + c;
                    const double cosine = table[column], sine = table[p.head_dim / 2 + column];
                    low = first * cosine - second * sine, high = second * cosine + first * sine;
                  }
                  if (o.part == 0) {
                    const QueryRow q = query_row(p, t.m, r, o.first / p.head_dim);
                    const auto place = [&](int column) -> Bits& {
                      return p.out[q.before + act_index(p.stack.rows, q.row, column % p.head_dim)];
                    };
                    place(o.first + c) = to_bits(float(low)), place(o.second + c) = to_bits(float(high));
                  } else {
                    Bits* to = o.part == 1 ? p.qkv.fresh_k : p.qkv.fresh_v;
                    to[fresh_index(p, r, o.first + c)] = to_bits(float(low));
                    to[fresh_index(p, r, o.second + c)] = to_bits(float(high));
                  }
                }
        }
      } else if (is_split(p)) {
        const int N = p.tile_rows;
        for (int tile = 0; tile < p.tiles; ++tile) {
          Received received(C, std::vector<float>(kSumBytes / 4, NAN));
          for (int rank = 0; rank < C; ++rank) {
            const Share s = share_of(p, tile * C + rank);
            if (s.count() > 0) send_sums(received, multiply(p, s), N, rank);
          }
          for (int rank = 0; rank < C; ++rank) {
            if (!owns(R, rank)) continue;
            std::vector<double> squares(8 * kSquareParts, 0.0);
            for (int thread = 0; thread < pieces(N); ++thread) {
              const Piece piece = piece_of(thread);
              const int row = rank * 8 + piece.row, column = tile * N + piece.octet * 8 + piece.half * 4;
              float* kept = &residual[(size_t(tile * C + rank) * kConsumers + thread) * 4];
              if (column >= p.n || row >= t.m) continue;
              for (int e = 0; e < 4; ++e) {
                double y = 0.0;
                for (int source = 0; source < senders(p); ++source)
                  y +=
                      received[rank][receive_unit(source, piece.row, piece.octet, piece.half, N / 8) * 4 + e];
                y *= rms_of(p, row);
                const auto value = [&](const Stepped& v, double otherwise) {
                  return v.p ? double(v.at(step)[column + e]) : otherwise;
                };
                y += value(p.shift, 0.0) + value(p.bias, 0.0);
                if (p.kind == Kind::kEuler) {
                  const EulerPart& q = p.euler;
                  const int action = row - t.first;
                  if (action < 0) continue;
                  float* x = q.sample + action * q.ld_sample + column + e;
                  const double error =
                      q.previous[action * q.ld_previous + column + e] - (*x - *q.time.at(step) * y);
                  *x = float(*x + q.dt * (y - *q.gain.at(step) * q.weight[action * q.ld_weight] * error));
                  p.out[act_index(R, row, column + e)] = to_bits(*x);
                  continue;
                }
                y = act_of(p.scale * y, p.act) * value(p.gate, 1.0) + (p.residual ? kept[e] : 0.0);
                if (row < t.first && p.linear.fixed)
                  y = number[p.linear.fixed[row * p.linear.ld_fixed + column + e]];
                kept[e] = float(y);
                squares[piece.row * kSquareParts + square_part(thread, tile)] += y * y;
                p.out[act_index(R, row, column + e)] =
                    to_bits(float(y * (value(p.next, 1.0) + (p.next.p ? p.next_plus : 0.0f))));
              }
            }
            for (int thread = 0; thread < pieces(N) && p.squares_out; ++thread) {
              const int r = piece_of(thread).row, part = square_part(thread, tile);
              if (rank * 8 + r < t.m)
                p.squares_out[(rank * 8 + r) * kSquareParts + part] = float(squares[r * kSquareParts + part]);
            }
          }
        }
      } else {
        const AttentionPart& a = p.attention;
        const int keys = key_rows(a);
        for (int cluster = 0; cluster < p.tiles; ++cluster) {
          const HeadTask task = head_task(p, t.m, cluster);
          const int octets = 8 * a.columns, columns = a.columns * kChunk;
          Received received(C, std::vector<float>(kExchange / 4, NAN));
          const auto halves = [&](int owner, int source, int row, int octet) {
            return reinterpret_cast<Bits*>(received[owner].data()) +
                   receive_octet(source, row, octet, octets) / 2;
          };
          for (int rank = 0; rank < C; ++rank) {
            const Bits* block = blocks[cluster * C + rank].data();
            const Bits* queries = p.joined ? block + queries_at(p) / 2
                                           : p.x + int64_t(task.tile) * p.chunks * p.stack.rows * kChunk;
            const auto row_of = [&](bool key, int c,
                                    int j) {  // (chunk of 64 columns, row) as it lies in shared memory
              if (p.joined) return block + (key ? 0 : values_at(p) / 2) + j * kChunk;
              const bool old = j < a.prefix_rows;
              const int rows = old ? a.prefix_rows : a.fresh_rows;
              const Bits* from = old ? (key ? a.packed_k : a.packed_v) : (key ? a.fresh_k : a.fresh_v);
              return from + ((int64_t(task.key_head) * C + rank) * p.chunks + c) * rows * kChunk +
                     (old ? j : j - a.prefix_rows) * kChunk;
            };
            for (int row = 0; row < task.rows; ++row) {
              const int its_row = head_row(task, t.m, row).row;
              std::vector<double> score(keys);
              double high = -INFINITY, total = 0.0;
              for (int j = 0; j < keys; ++j) {
                const int key = key_of(a, rank, j);
                const bool seen = key >= 0 && (!a.k_block || a.k_block[int64_t(key) * a.ld_k_block] <=
                                                                 a.q_block[int64_t(its_row) * a.ld_q_block]);
                double sum = 0.0;
                for (int c = 0; seen && c < p.chunks; ++c)
                  for (int e = 0; e < kChunk; ++e) {
                    const Bits* k = row_of(true, c, j);
                    sum += number[at(queries + int64_t(c) * p.stack.rows * kChunk, row, e)] *
                           number[k[((e / 8) ^ (j & 7)) * 8 + e % 8]];
                  }
                score[j] = seen ? sum * p.scale : -INFINITY;
                high = std::max(high, score[j]);
              }
              std::vector<double> acc(columns, 0.0);
              for (int j = 0; j < keys; ++j) {
                const double weight = high == -INFINITY ? 0.0 : std::exp2(score[j] - high);
                total += weight;
                for (int e = 0; weight > 0.0 && e < columns; ++e) {
                  const Bits* v = row_of(false, task.column + e / 64, j);
                  acc[e] += weight * number[v[((e % 64 / 8) ^ (j & 7)) * 8 + e % 8]];
                }
              }
              const int owner = row / 8, local = row % 8;
              received[owner][receive_stats(rank, local) / 4] = float(high);
              received[owner][receive_stats(rank, local) / 4 + 1] = float(total);
              for (int e = 0; e < columns; ++e)
                halves(owner, rank, local, e / 8)[e % 8] = to_bits(float(total > 0.0 ? acc[e] / total : 0.0));
            }
          }
          for (int row = 0; row < task.rows; ++row) {
            const int rank = row / 8, local = row % 8;
            double high = -INFINITY, total = 0.0;
            std::vector<double> y(columns, 0.0);
            for (int k = 0; k < C; ++k)
              high = std::max(high, double(received[rank][receive_stats(k, local) / 4]));
            for (int k = 0; k < C; ++k) {
              const float* stats = &received[rank][receive_stats(k, local) / 4];
              const double share = stats[0] == -INFINITY ? 0.0 : std::exp2(stats[0] - high) * stats[1];
              total += share;
              for (int e = 0; e < columns; ++e) y[e] += share * number[halves(rank, k, local, e / 8)[e % 8]];
            }
            const HeadRow to = head_row(task, t.m, row);
            for (int e = 0; e < columns; ++e)
              p.out[act_index(R, to.row, to.head * p.head_dim + task.column * kChunk + e)] =
                  to_bits(float(total > 0.0 ? y[e] / total : 0.0));
          }
        }
      }
      if (look_) look_(i);
    }
  }
}

// In double, rounded to bfloat16 where the engine keeps bfloat16 (the state itself is kept in full).
inline void Head::reference() {
  using Rows = std::vector<double>;
  std::map<const std::byte*, Rows> value;
  const auto rows_from = [&](const View& v) {
    if (const auto it = value.find(v.base); it != value.end()) return it->second;
    Rows r(size_t(v.rows) * v.cols);
    // the last rows of what is known whole, or the other way round
    const int64_t before = s_.state * v.ld * int64_t(size_of(v.dtype));
    if (const auto whole = value.find(v.base - before); v.rows == s_.actions() && whole != value.end()) {
      std::copy(whole->second.begin() + int64_t(s_.state) * v.cols, whole->second.end(), r.begin());
      return r;
    }
    const auto part = s_.state > 0 && v.rows == s_.m ? value.find(v.base + before) : value.end();
    if (part != value.end())
      std::copy(part->second.begin(), part->second.end(), r.begin() + int64_t(s_.state) * v.cols);
    for (int i = 0; i < (part != value.end() ? s_.state : v.rows); ++i)
      for (int j = 0; j < v.cols; ++j) r[size_t(i) * v.cols + j] = Heap::get(v, i, j);
    return r;
  };
  // norm(x) W^T, parts side by side
  const auto product = [&](const View& xv, const Norm& norm, const Weight& w, int step) {
    Rows x = rows_from(xv);
    const int m = xv.rows, k = xv.cols;
    Rows rms(m, 1.0);
    for (int i = 0; i < m; ++i) {
      if (norm.kind == NormKind::kRms) {
        double sum = 0.0;
        for (int j = 0; j < k; ++j) sum += x[size_t(i) * k + j] * x[size_t(i) * k + j];
        rms[i] = 1.0 / std::sqrt(sum / k + norm.eps);
        for (int j = 0; j < k; ++j)
          x[size_t(i) * k + j] *= norm.weight ? Heap::get(norm.weight, 0, j, step) + norm.plus : 1.0;
      }
      for (int j = 0; j < k; ++j) x[size_t(i) * k + j] = rounded(x[size_t(i) * k + j]);
    }
    std::vector<Rows> parts;
    for (const View& part : raw_[w.data]) {
      Rows y(size_t(m) * part.rows), wr(k);
      for (int n = 0; n < part.rows; ++n) {
        double shift = 0.0;
        for (int j = 0; j < k; ++j) wr[j] = Heap::get(part, n, j);
        for (int j = 0; norm.bias && j < k; ++j) shift += wr[j] * Heap::get(norm.bias, 0, j, step);
        for (int i = 0; i < m; ++i) {
          double sum = 0.0;
          for (int j = 0; j < k; ++j) sum += x[size_t(i) * k + j] * wr[j];
          y[size_t(i) * part.rows + n] = sum * rms[i] + shift;
        }
      }
      parts.push_back(std::move(y));
    }
    return parts;
  };
  for (int step = 0; step < s_.steps; ++step) {
    for (const Op& op : body_) {
      if (const auto* o = std::get_if<Linear>(&op)) {
        Rows y = product(o->x, o->norm, o->w, step)[0];
        const Rows before = o->residual ? rows_from(o->residual) : Rows();
        const int n = o->out.cols;
        for (size_t i = 0; i < y.size(); ++i) {
          const int j = int(i % n);
          y[i] = act_of(o->scale * (y[i] + (o->bias ? Heap::get(o->bias, 0, j, step) : 0.0)), int(o->act)) *
                 (o->gate ? Heap::get(o->gate, 0, j, step) : 1.0);
          if (o->residual) y[i] += before[i];
        }
        value[o->out.base] = y;
      } else if (const auto* g = std::get_if<GatedLinear>(&op)) {
        const std::vector<Rows> parts = product(g->x, g->norm, g->w, step);
        Rows y = parts[0];
        for (size_t i = 0; i < y.size(); ++i) y[i] = rounded(act_of(parts[0][i], int(g->act)) * parts[1][i]);
        value[g->out.base] = y;
      } else if (const auto* q = std::get_if<Qkv>(&op)) {
        std::vector<Rows> parts = product(q->x, q->norm, q->w, step);
        const View* outs[3] = {&q->q, &q->k, &q->v};
        for (size_t p = 0; p < parts.size(); ++p) {
          const int cols = outs[p]->cols, d = q->head_dim;
          for (int i = 0; i < s_.m; ++i)
            for (int h = 0; p < 2 && h < cols / d; ++h)
              for (int c = 0; c < d / 2; ++c) {
                const int position = int(Heap::get(q->positions, i, 0));
                const double cosine = Heap::get(q->rope, position, c),
                             sine = Heap::get(q->rope, position, c + d / 2);
                double &a = parts[p][size_t(i) * cols + h * d + c],
                       &b = parts[p][size_t(i) * cols + h * d + c + d / 2];
                const double low = a * cosine - b * sine;
                b = b * cosine + a * sine, a = low;
              }
          for (double& y : parts[p]) y = rounded(y);
          value[outs[p]->base] = parts[p];
        }
      } else if (const auto* a = std::get_if<Attention>(&op)) {
        const Rows queries = rows_from(a->q);
        const int d = a->head_dim, heads = a->q.cols / d, group = a->q.cols / a->k.cols, keys = a->k.rows,
                  kv = a->k.cols;
        const int prefix = s_.prefix;
        Rows k(size_t(keys) * kv), v(size_t(keys) * kv), out(size_t(s_.m) * a -> q.cols);
        const auto fill = [&](const View& view, Rows& to) {
          const View fresh = rows_of(view, prefix, 1);
          for (int j = 0; j < keys; ++j)
            for (int c = 0; c < kv; ++c)
              to[size_t(j) * kv + c] =
                  j < prefix ? Heap::get(view, j, c) : value.at(fresh.base)[size_t(j - prefix) * kv + c];
        };
        fill(a->k, k), fill(a->v, v);
        for (int h = 0; h < heads; ++h)
          for (int i = 0; i < s_.m; ++i) {
            std::vector<double> weight(keys);
            double high = -INFINITY, total = 0.0;
            for (int j = 0; j < keys; ++j) {
              double sum = 0.0;
              for (int c = 0; c < d; ++c)
                sum += queries[size_t(i) * a->q.cols + h * d + c] * k[size_t(j) * kv + h / group * d + c];
              weight[j] = Heap::get(a->k_block, j, 0) <= Heap::get(a->q_block, i, 0)
                              ? sum / std::sqrt(double(d))
                              : -INFINITY;
              high = std::max(high, weight[j]);
            }
            for (double& w : weight) w = std::exp(w - high), total += w;
            for (int c = 0; c < d; ++c) {
              double sum = 0.0;
              for (int j = 0; j < keys; ++j) sum += weight[j] * v[size_t(j) * kv + h / group * d + c];
              out[size_t(i) * a->q.cols + h * d + c] = rounded(sum / total);
            }
          }
        value[a->out.base] = out;
      } else if (const auto* e = std::get_if<Euler>(&op)) {
        const Rows y = product(e->h, e->norm, e->w, step)[0];
        for (int i = 0; i < s_.m; ++i)
          for (int j = 0; j < e->x.cols; ++j) {
            const double velocity = y[size_t(i) * e->x.cols + j] + Heap::get(e->bias, 0, j),
                         x = Heap::get(e->x, i, j);
            const double error =
                Heap::get(e->previous, i, j) - (x - Heap::get(e->time, 0, 0, step) * velocity);
            Heap::set(e->x, i, j,
                      float(x + e->dt * (velocity - Heap::get(e->gain, 0, 0, step) *
                                                        Heap::get(e->weight, i, 0) * error)));
          }
      }
    }
  }
}
