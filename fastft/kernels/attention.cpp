// Causal attention over a row without padding, forward and backward, in bfloat16 on processors with AVX512-BF16 or AMX.
// The row is a forest of nodes, stretches of tokens that attend to their ancestors and causally to themselves; sequences
// that share no beginning are trees of one node each (data/trie.py). Tiles of keys and queries stay in the cache and scores
// are never written to memory, as in FlashAttention-2 (arXiv 2307.08691); sums are float32. Built together with kernels.cpp
// by native.py; row_attention.py holds the same computation in torch, which serves every other type and processor.
//
// q (T, kv * group * dim), k and v (T, kv * dim) are the projections' outputs, before rotation; cos and sin (T, dim) rotate
// halves, or are null. nodes (count, 4), depth first: where each begins in the row, its length, the position of its first
// token in its sequences, its parent (-1: none). dim is a multiple of 16.
//
// "Words" and products: see tiles.h.

#include "tiles.h"

#ifdef FASTFT_TILES

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

const float LOG2E = 1.44269504088896341f;
const int64_t KEYS = 64;     // keys of a tile, which is what one panel holds
const int64_t ROWS = 96;     // at most so many rows (queries times heads of a group) of a tile, where the group allows
const int64_t FEW = 8;       // so many queries more go with a node's last tile: one of their own costs nearly as much as a full one
const int64_t COLUMN_STEP = WORD_STEP > 8 ? 2 * WORD_STEP : 16;  // of scores: they are the next product's summed index
const int64_t PART = 128;    // trees with more tokens than this are shared by several threads in the backward

// 2^x: the nearest whole n, and a polynomial of degree 5 for the rest in [-1/2, 1/2] (Taylor's, relative error below 3e-6,
// a thousandth of what rounding to bfloat16 does). scalef underflows to 0; what is not a number stays so.
inline __m512 exp2_16(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.3333558146e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291076e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504108665e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022650696e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718056e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// --- rows of bfloat16 into the layouts that products need

// x (dim,) rotated by halves, rounded once; cos null: as it is.
inline void rotate(const bf16* x, const bf16* cos, const bf16* sin, bf16* out, int64_t dim) {
    if (!cos) {
        std::memcpy(out, x, dim * sizeof(bf16));
        return;
    }
    const int64_t half = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = load(x[i]), b = load(x[half + i]);
        out[i] = stored(a * load(cos[i]) - b * load(sin[i]));
        out[half + i] = stored(b * load(cos[half + i]) + a * load(sin[half + i]));
    }
}

// A gradient x (dim,) float32 through the transposed rotation.
inline void rotate_back(const float* x, const bf16* cos, const bf16* sin, bf16* out, int64_t dim) {
    const int64_t half = dim / 2;
    if (!cos) {
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) out[i] = stored(x[i]);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        out[i] = stored(a * load(cos[i]) + b * load(sin[half + i]));
        out[half + i] = stored(b * load(cos[half + i]) - a * load(sin[i]));
    }
}

// --- what both directions share

struct Row {
    const bf16 *q, *k, *v, *cos, *sin;
    const int64_t* nodes;
    int64_t count, kv, group, dim, window;
    float scale;

    int64_t start(int64_t n) const { return nodes[4 * n]; }
    int64_t length(int64_t n) const { return nodes[4 * n + 1]; }
    int64_t position(int64_t n) const { return nodes[4 * n + 2]; }
    int64_t parent(int64_t n) const { return nodes[4 * n + 3]; }
    int64_t panels(int64_t n) const { return (length(n) + KEYS - 1) / KEYS; }
    int64_t heads() const { return kv * group; }
    const bf16* cos_at(int64_t t) const { return cos ? cos + t * dim : nullptr; }
    const bf16* sin_at(int64_t t) const { return sin ? sin + t * dim : nullptr; }
    int64_t queries() const {  // of a tile
        const int64_t fitting = ROWS / group / 16 * 16;
        return std::min<int64_t>(std::max<int64_t>(fitting, 16), 48);
    }
    int64_t most_rows() const { return rounded_up((queries() + FEW) * group, COLUMN_STEP); }  // of a tile, padding included
    int64_t tiles(int64_t n) const { return std::max<int64_t>(1, (length(n) + queries() - 1 - FEW) / queries()); }
};

// Where the nodes' panels lie in a buffer of all panels, for one head of keys: a tree's lie together.
struct Panels {
    std::vector<int64_t> before;
    int64_t size;  // words of one panel
    int64_t all;

    explicit Panels(const Row& row) : before(row.count), size(KEYS * row.dim / 2), all(0) {
        for (int64_t n = 0; n < row.count; n++) {
            before[n] = all;
            all += row.panels(n);
        }
    }
    int64_t at(int64_t n, int64_t head, int64_t panel) const { return (head * all + before[n] + panel) * size; }
};

// The rows of one panel of k or v, zero behind the node's end.
void panel_rows(const Row& row, const bf16* x, bool rotated, int64_t n, int64_t head, int64_t panel, bf16* out) {
    for (int64_t j = 0; j < KEYS; j++) {
        const int64_t index = panel * KEYS + j, t = row.start(n) + index;
        if (index >= row.length(n))
            std::memset(out + j * row.dim, 0, row.dim * sizeof(bf16));
        else
            rotate(x + (t * row.kv + head) * row.dim, rotated ? row.cos_at(t) : nullptr, row.sin_at(t),
                   out + j * row.dim, row.dim);
    }
}

// One tile of queries: rows (count, dim) of all heads of a group, padded with zeros to a multiple of COLUMN_STEP.
struct Queries {
    int64_t n, head, first, positions, rows, padded;

    Queries(const Row& row, int64_t n, int64_t head, int64_t tile) : n(n), head(head), first(tile * row.queries()) {
        positions = tile + 1 == row.tiles(n) ? row.length(n) - first : row.queries();
        rows = positions * row.group;
        padded = rounded_up(rows, COLUMN_STEP);
    }
    int64_t token(const Row& row, int64_t r) const { return row.start(n) + first + r / row.group; }
    int64_t offset(const Row& row, int64_t r) const {  // of row r in (T, heads, dim), in heads
        return token(row, r) * row.heads() + head * row.group + r % row.group;
    }
    void gather(const Row& row, const bf16* x, bool rotated, bf16* out) const {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t t = token(row, r);
            rotate(x + offset(row, r) * row.dim, rotated ? row.cos_at(t) : nullptr, row.sin_at(t), out + r * row.dim,
                   row.dim);
        }
        std::memset(out + rows * row.dim, 0, (padded - rows) * row.dim * sizeof(bf16));
    }
};

// What a tile of queries sees of its own node or of an ancestor of it.
struct Sight {
    int64_t ahead;                    // the tile's first position, counted from the node's first
    int64_t keys;                     // of the node that any query of the tile may see
    int64_t first_panel, end_panel;  // those before it lie outside of every window

    Sight(const Row& row, const Queries& at, int64_t node)
        : ahead(row.position(at.n) + at.first - row.position(node)),
          keys(node == at.n ? at.first + at.positions : row.length(node)),
          first_panel(std::max<int64_t>(0, ahead - row.window + 1) / KEYS),
          end_panel((keys + KEYS - 1) / KEYS) {}
    int64_t valid(int64_t panel) const { return std::min(KEYS, keys - panel * KEYS); }
    int64_t columns(int64_t panel) const { return rounded_up(valid(panel), COLUMN_STEP); }
};

// Keys of a panel that the query at `index` of the tile attends to: [from, to) within the panel, possibly empty.
struct Span {
    int64_t from, to;

    Span(const Row& row, const Sight& sight, int64_t index, int64_t panel) {
        const int64_t here = sight.ahead + index + 1 - panel * KEYS;
        from = std::max<int64_t>(0, here - row.window);
        to = std::min(sight.valid(panel), here);
    }
};

inline __mmask16 lanes(int64_t from, int64_t to, int64_t first) {  // those in [from, to) of first .. first + 15
    return (__mmask16)(first_lanes(to - first) & ~first_lanes(from - first));
}

// --- forward

struct ForwardScratch {
    Buffer<bf16> q, p;
    Buffer<float> scores, sums, top, total;

    ForwardScratch(const Row& row) {
        const int64_t rows = row.most_rows();
        q.resize(rows * row.dim);
        p.resize(rows * KEYS);
        scores.resize(rows * KEYS);
        sums.resize(rows * row.dim);
        top.resize(rows);
        total.resize(rows);
    }
};

// One row of a tile of scores: powers of two of scores * scale (which holds log2 e), their running maximum and sum; the
// outputs so far are brought to a new maximum.
inline void soften(const float* scores, int64_t columns, const Span& span, float scale, bf16* p, float* top, float* total,
                   float* sums, int64_t dim) {
    const __m512 factor = _mm512_set1_ps(scale);
    if (span.to <= span.from) {
        std::memset(p, 0, KEYS * sizeof(bf16));
        return;
    }
    __m512 x[KEYS / 16], most = _mm512_set1_ps(*top);
    for (int64_t v = 0; v < columns / 16; v++) {
        x[v] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * v), factor);
        most = _mm512_mask_max_ps(most, lanes(span.from, span.to, 16 * v), most, x[v]);
    }
    const float highest = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < columns / 16; v++) {
        const __m512 e = _mm512_maskz_mov_ps(lanes(span.from, span.to, 16 * v), exp2_16(_mm512_sub_ps(x[v], _mm512_set1_ps(highest))));
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256((__m256i*)(p + 16 * v), (__m256i)_mm512_cvtneps_pbh(e));
    }
    if (*total != 0 && highest != *top) {
        const float shrink = std::exp2(*top - highest);
        for (int64_t d = 0; d < dim; d++) sums[d] *= shrink;
        *total *= shrink;
    }
    *total += _mm512_reduce_add_ps(sum);
    *top = highest;
}

void forward_tile(const Row& row, const Panels& panels, const word* keys, const word* values, const Queries& at,
                  ForwardScratch& own, bf16* out, float* lse) {
    const int64_t dim = row.dim;
    at.gather(row, row.q, true, own.q.data());
    std::fill(own.sums.begin(), own.sums.end(), 0.0f);
    std::fill(own.total.begin(), own.total.end(), 0.0f);
    std::fill(own.top.begin(), own.top.end(), -INFINITY);
    for (int64_t node = at.n; node >= 0; node = row.parent(node)) {
        const Sight sight(row, at, node);
        for (int64_t panel = sight.first_panel; panel < sight.end_panel; panel++) {
            const int64_t columns = sight.columns(panel), where = panels.at(node, at.head, panel);
            product(at.padded, columns, {(const word*)own.q.data(), dim / 2, keys + where, KEYS, dim / 2},
                    own.scores.data(), KEYS, false);
            for (int64_t r = 0; r < at.rows; r++)
                soften(own.scores.data() + r * KEYS, columns, Span(row, sight, r / row.group, panel), row.scale * LOG2E,
                       own.p.data() + r * KEYS, &own.top[r], &own.total[r], own.sums.data() + r * dim, dim);
            product(at.padded, dim, {(const word*)own.p.data(), KEYS / 2, values + where, dim, columns / 2},
                    own.sums.data(), dim, true);
        }
    }
    for (int64_t r = 0; r < at.rows; r++) {
        const int64_t offset = at.offset(row, r);
        const float inverse = 1.0f / own.total[r], *sums = own.sums.data() + r * dim;
        lse[offset] = own.top[r] + std::log2(own.total[r]);
        bf16* to = out + offset * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; d++) to[d] = stored(sums[d] * inverse);
    }
}

void forward(const Row& row, bf16* out, float* lse, int threads) {
    const Panels panels(row);
    Buffer<word> keys(row.kv * panels.all * panels.size), values(row.kv * panels.all * panels.size);
    struct Task {
        int64_t n, head, tile;
    };
    std::vector<Task> packing, tasks;
    for (int64_t n = 0; n < row.count; n++)
        for (int64_t head = 0; head < row.kv; head++) {
            for (int64_t panel = 0; panel < row.panels(n); panel++) packing.push_back({n, head, panel});
            for (int64_t tile = row.tiles(n) - 1; tile >= 0; tile--) tasks.push_back({n, head, tile});
        }
#pragma omp parallel num_threads(threads)
    {
        const TileRegisters registers;
        Buffer<bf16> rows(KEYS * row.dim);
#pragma omp for schedule(static)
        for (size_t i = 0; i < packing.size(); i++) {
            const Task& t = packing[i];
            const int64_t where = panels.at(t.n, t.head, t.tile);
            panel_rows(row, row.k, true, t.n, t.head, t.tile, rows.data());
            transposed((const word*)rows.data(), row.dim / 2, KEYS, row.dim / 2, keys.data() + where, KEYS);
            panel_rows(row, row.v, false, t.n, t.head, t.tile, rows.data());
            pairs_of(rows.data(), row.dim, KEYS, row.dim, values.data() + where, row.dim);
        }
        ForwardScratch own(row);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task& t = tasks[i];
            forward_tile(row, panels, keys.data(), values.data(), Queries(row, t.n, t.head, t.tile), own, out, lse);
        }
    }
}

// --- backward

// Scores and what follows from them have one row a key here: so P and dS lie as the products need them.
struct BackwardScratch {
    Buffer<bf16> q, dout, p, ds;
    Buffer<word> q_columns, q_pairs, dout_columns, dout_pairs, ds_pairs;
    Buffer<float> scores, dp, dq, delta, lse;

    BackwardScratch(const Row& row) {
        const int64_t rows = row.most_rows(), words = rows * row.dim / 2;
        for (auto* x : {&q, &dout}) x->resize(rows * row.dim);
        for (auto* x : {&q_columns, &q_pairs, &dout_columns, &dout_pairs}) x->resize(words);
        for (auto* x : {&p, &ds}) x->resize(KEYS * rows);
        for (auto* x : {&scores, &dp}) x->resize(KEYS * rows);
        ds_pairs.resize(KEYS / 2 * rows);
        dq.resize(2 * row.dim * rows);  // (dim, rows), and turned at the end
        delta.resize(rows);
        lse.resize(rows);
    }
};

struct Gradients {
    const bf16 *out, *dout;
    const float* lse;
    bf16 *dq, *dk, *dv;
};

// P and dS of one key and 16 rows of queries; `keep`: those that attend to it.
struct Slopes {
    __m256i p, ds;
};
inline Slopes slopes(const float* scores, const float* dp, __mmask16 keep, float scale, const float* lse, const float* delta) {
    const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores), _mm512_set1_ps(scale * LOG2E), _mm512_loadu_ps(lse));
    const __m512 p = _mm512_maskz_mov_ps(keep, exp2_16(x));
    const __m512 change = _mm512_sub_ps(_mm512_loadu_ps(dp), _mm512_loadu_ps(delta));
    const __m512 ds = _mm512_maskz_mul_ps(keep, _mm512_mul_ps(p, change), _mm512_set1_ps(scale));
    return {(__m256i)_mm512_cvtneps_pbh(p), (__m256i)_mm512_cvtneps_pbh(ds)};
}

// P and dS of keys j and j + 1 of a panel and all rows of the tile, and dS in pairs.
inline void slopes_of_two_keys(const Row& row, const Queries& at, const Sight& sight, int64_t panel, int64_t j,
                               BackwardScratch& own) {
    const int64_t wide = at.padded;
    int64_t from[2], to[2];  // rows of queries that attend to a key; none to one behind the node's end
    for (int64_t i = 0; i < 2; i++) {
        const int64_t key = panel * KEYS + j + i - sight.ahead;
        from[i] = key * row.group;
        to[i] = j + i < sight.valid(panel) ? std::min(at.rows, (key + row.window) * row.group) : from[i];
    }
    for (int64_t c = 0; c < wide; c += 16) {
        const int64_t i = j * wide + c;
        const float *lse = &own.lse[c], *delta = &own.delta[c];
        const Slopes a = slopes(&own.scores[i], &own.dp[i], lanes(from[0], to[0], c), row.scale, lse, delta);
        const Slopes b = slopes(&own.scores[i + wide], &own.dp[i + wide], lanes(from[1], to[1], c), row.scale, lse, delta);
        _mm256_storeu_si256((__m256i*)&own.p[i], a.p);
        _mm256_storeu_si256((__m256i*)&own.p[i + wide], b.p);
        _mm256_storeu_si256((__m256i*)&own.ds[i], a.ds);
        _mm256_storeu_si256((__m256i*)&own.ds[i + wide], b.ds);
        _mm512_storeu_si512(&own.ds_pairs[j / 2 * wide + c], paired(a.ds, b.ds));
    }
}

// The keys and values, a panel at a time, as the backward's products need them.
struct PackedKeys {
    const word *keys, *keys_turned, *values;  // (KEYS, dim / 2), (dim, KEYS / 2), (KEYS, dim / 2)
};

// Adds what one tile of queries gives to dk and dv (panels of its tree and head, dim), and writes its dq. `root`: the tree's
// first node.
void backward_tile(const Row& row, const Panels& panels, const PackedKeys& packed, const Gradients& io, const Queries& at,
                   int64_t root, BackwardScratch& own, float* dk, float* dv) {
    const int64_t dim = row.dim, wide = at.padded;
    at.gather(row, row.q, true, own.q.data());
    at.gather(row, io.dout, false, own.dout.data());
    transposed((const word*)own.q.data(), dim / 2, wide, dim / 2, own.q_columns.data(), wide);
    transposed((const word*)own.dout.data(), dim / 2, wide, dim / 2, own.dout_columns.data(), wide);
    pairs_of(own.q.data(), dim, wide, dim, own.q_pairs.data(), dim);
    pairs_of(own.dout.data(), dim, wide, dim, own.dout_pairs.data(), dim);
    for (int64_t r = 0; r < at.rows; r++) {
        const bf16 *out = io.out + at.offset(row, r) * dim, *dout = own.dout.data() + r * dim;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; d++) sum += load(out[d]) * load(dout[d]);
        own.delta[r] = sum;
        own.lse[r] = io.lse[at.offset(row, r)];
    }
    float* dq = own.dq.data();
    std::fill(dq, dq + dim * wide, 0.0f);
    for (int64_t node = at.n; node >= 0; node = row.parent(node)) {
        const Sight sight(row, at, node);
        for (int64_t panel = sight.first_panel; panel < sight.end_panel; panel++) {
            const int64_t count = sight.columns(panel), where = panels.at(node, at.head, panel);
            const int64_t sums = (panels.before[node] - panels.before[root] + panel) * KEYS * dim;
            product(count, wide, {packed.keys + where, dim / 2, own.q_columns.data(), wide, dim / 2}, own.scores.data(),
                    wide, false);
            product(count, wide, {packed.values + where, dim / 2, own.dout_columns.data(), wide, dim / 2}, own.dp.data(),
                    wide, false);
            for (int64_t j = 0; j < count; j += 2) slopes_of_two_keys(row, at, sight, panel, j, own);
            product(count, dim, {(const word*)own.p.data(), wide / 2, own.dout_pairs.data(), dim, wide / 2}, dv + sums,
                    dim, true);
            product(count, dim, {(const word*)own.ds.data(), wide / 2, own.q_pairs.data(), dim, wide / 2}, dk + sums, dim,
                    true);
            product(dim, wide, {packed.keys_turned + where, KEYS / 2, own.ds_pairs.data(), wide, count / 2}, dq, wide,
                    true);
        }
    }
    float* turned = dq + dim * wide;
    transposed((const word*)dq, wide, dim, wide, (word*)turned, dim);
    for (int64_t r = 0; r < at.rows; r++) {
        const int64_t t = at.token(row, r);
        rotate_back(turned + r * dim, row.cos_at(t), row.sin_at(t), io.dq + at.offset(row, r) * dim, dim);
    }
}

// A node without a parent and everything below it.
struct Tree {
    int64_t root, end, panels;  // nodes [root, end)
    double cost;                // pairs of a query and a key, about
    std::vector<std::pair<int64_t, int64_t>> tiles;  // of queries: node, tile
};

std::vector<Tree> trees_of(const Row& row) {
    std::vector<Tree> trees;
    for (int64_t n = 0; n < row.count; n++) {
        if (row.parent(n) < 0) trees.push_back({n, n, 0, 0, {}});
        Tree& tree = trees.back();
        tree.end = n + 1;
        tree.panels += row.panels(n);
        tree.cost += (double)row.length(n) * (row.position(n) + 0.5 * row.length(n));
        for (int64_t tile = 0; tile < row.tiles(n); tile++) tree.tiles.push_back({n, tile});
    }
    return trees;
}

void backward(const Row& row, const Gradients& io, int threads) {
    const int64_t dim = row.dim;
    const Panels panels(row);
    const int64_t words = row.kv * panels.all * panels.size;
    Buffer<word> keys(words), keys_turned(words), values(words);
    const std::vector<Tree> trees = trees_of(row);
    // A part is the tiles of queries of one tree and head that one thread goes through, with sums of its own for dk and dv,
    // which the threads add up at the end.
    struct Part {
        int64_t tree, head, index, of, sums;
    };
    std::vector<Part> parts;
    std::vector<int64_t> first_part(trees.size() * row.kv);
    int64_t size = 0;
    for (int64_t t = 0; t < (int64_t)trees.size(); t++)
        for (int64_t head = 0; head < row.kv; head++) {
            const int64_t last = trees[t].end - 1, tokens = row.start(last) + row.length(last) - row.start(trees[t].root);
            const int64_t wanted = (tokens + PART - 1) / PART, of = wanted < threads ? wanted : threads;
            first_part[t * row.kv + head] = (int64_t)parts.size();
            for (int64_t i = 0; i < of; i++, size += 2 * trees[t].panels * KEYS * dim) parts.push_back({t, head, i, of, size});
        }
    std::vector<size_t> order(parts.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    auto cost = [&](size_t i) { return trees[parts[i].tree].cost / parts[i].of; };
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(a) > cost(b); });
    Buffer<float> sums(size);
#pragma omp parallel num_threads(threads)
    {
        const TileRegisters registers;
        Buffer<word> pairs(panels.size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < row.count * row.kv; i++) {
            const int64_t n = i / row.kv, head = i % row.kv;
            for (int64_t panel = 0; panel < row.panels(n); panel++) {
                const int64_t where = panels.at(n, head, panel);
                panel_rows(row, row.k, true, n, head, panel, (bf16*)(keys.data() + where));
                pairs_of((bf16*)(keys.data() + where), dim, KEYS, dim, pairs.data(), dim);
                transposed(pairs.data(), dim, KEYS / 2, dim, keys_turned.data() + where, KEYS / 2);
                panel_rows(row, row.v, false, n, head, panel, (bf16*)(values.data() + where));
            }
        }
        BackwardScratch own(row);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < order.size(); i++) {
            const Part& part = parts[order[i]];
            const Tree& tree = trees[part.tree];
            const int64_t half = tree.panels * KEYS * dim;
            float *dk = sums.data() + part.sums, *dv = dk + half;
            std::fill(dk, dv + half, 0.0f);
            for (size_t t = part.index; t < tree.tiles.size(); t += part.of)
                backward_tile(row, panels, {keys.data(), keys_turned.data(), values.data()}, io,
                              Queries(row, tree.tiles[t].first, part.head, tree.tiles[t].second), tree.root, own, dk, dv);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)trees.size() * row.kv; i++) {
            const Tree& tree = trees[i / row.kv];
            const int64_t head = i % row.kv, half = tree.panels * KEYS * dim;
            const Part& first = parts[first_part[i]];
            float *dk = sums.data() + first.sums, *dv = dk + half;
            for (int64_t p = 1; p < first.of; p++) {
                const float* more = sums.data() + parts[first_part[i] + p].sums;
#pragma omp simd
                for (int64_t n = 0; n < 2 * half; n++) dk[n] += more[n];
            }
            for (int64_t n = tree.root; n < tree.end; n++) {
                const int64_t from = (panels.before[n] - panels.before[tree.root]) * KEYS;
                for (int64_t j = 0; j < row.length(n); j++) {
                    const int64_t t = row.start(n) + j, to = (t * row.kv + head) * dim;
                    rotate_back(dk + (from + j) * dim, row.cos_at(t), row.sin_at(t), io.dk + to, dim);
                    rotate_back(dv + (from + j) * dim, nullptr, nullptr, io.dv + to, dim);
                }
            }
        }
    }
}

}  // namespace

// out (T, heads * dim); lse (T, heads) float32: the logarithm to base 2 of each row's sum, which the backward needs.
extern "C" void row_attention_forward_bfloat16(const bf16* q, const bf16* k, const bf16* v, const bf16* cos, const bf16* sin,
                                               bf16* out, float* lse, const int64_t* nodes, int64_t count, int64_t kv,
                                               int64_t group, int64_t dim, int64_t window, float scale, int threads) {
    forward({q, k, v, cos, sin, nodes, count, kv, group, dim, window, scale}, out, lse, threads);
}

extern "C" void row_attention_backward_bfloat16(const bf16* q, const bf16* k, const bf16* v, const bf16* cos,
                                                const bf16* sin, const bf16* out, const float* lse, const bf16* dout,
                                                bf16* dq, bf16* dk, bf16* dv, const int64_t* nodes, int64_t count,
                                                int64_t kv, int64_t group, int64_t dim, int64_t window, float scale,
                                                int threads) {
    backward({q, k, v, cos, sin, nodes, count, kv, group, dim, window, scale}, {out, dout, lse, dq, dk, dv}, threads);
}

#endif
