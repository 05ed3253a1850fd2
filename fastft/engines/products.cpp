// Sums of matrix products in bfloat16 on processors with AVX512-BF16: C = bias + sum of A_i B_i, rounded once at the end.
// A LoRA layer is such a sum (x W^T + low B^T), and so is its input's gradient (dy W + dlow A): what is added never travels
// through memory, and several sums are one parallel region. native.py's `multiply` holds the same in torch.
//
// A task is a panel of 64 columns and some hundred rows of one C. It packs its part of B into words, which then stay in the
// level-2 cache, and goes through its rows a few at a time.

#include <cstdint>

#include "tiles.h"

#ifdef FASTFT_TILES

#include <algorithm>
#include <vector>

namespace {

const int64_t COLUMNS = 64;
const int64_t DEPTH = 2048;      // of the summed index at a time, over all terms: 256 KB of packed B
const int64_t MOST_ROWS = 480;   // of C at a time
const int64_t TILE_ROWS = 24;    // tiles of registers have 6, 8 or 12 rows

// One product. A (rows, depth): word s of row r lies along a row, or, where `a_transposed`, A is held as (depth, rows).
// B (depth, columns) is held so, or, where `b_transposed`, as (columns, depth). Strides are in elements.
struct Term {
    const bf16* a;
    int64_t a_stride, a_transposed;
    const bf16* b;
    int64_t b_stride, b_transposed, depth;
};

struct Sum {
    void* c;
    int64_t c_stride, c_is_float, rows, columns;
    const bf16* bias;  // (columns,) or null
    int64_t count;
    const Term* terms;
};

// B's rows [from, from + depth) and columns [first, first + count) as (depth / 2, width) words, zero behind `count`.
void pack(const Term& t, int64_t from, int64_t depth, int64_t first, int64_t count, int64_t width, word* out) {
    if (count < width) std::memset(out, 0, (depth + 1) / 2 * width * sizeof(word));
    if (!t.b_transposed) return pairs_of(t.b + from * t.b_stride + first, t.b_stride, depth, count, out, width);
    const word* b = (const word*)(t.b + first * t.b_stride + from);
    const int64_t words = depth / 2, stride = t.b_stride / 2;
    int64_t d = 0;
    for (; d + 16 <= words; d += 16)  // some words of all columns: the lines written stay in the cache
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < 16; i++) out[(d + i) * width + j] = b[j * stride + d + i];
    for (; d < words; d++)
        for (int64_t j = 0; j < count; j++) out[d * width + j] = b[j * stride + d];
}

// A stretch of a term's summed index, and where its packed words lie.
struct Stretch {
    const Term* term;
    int64_t from, depth, at;

    int64_t steps() const { return (depth + 1) / 2; }
};

struct Scratch {
    std::vector<word> a, b;
    std::vector<float> c;
    std::vector<Stretch> stretches;

    // Half a word more for each term of odd depth.
    Scratch() : b((DEPTH / 2 + 64) * COLUMNS), c(MOST_ROWS * COLUMNS) {}

    // The next stretches of `sum`'s terms that fit into B; `term` and `from` say where to begin, and move on.
    void take(const Sum& sum, int64_t& term, int64_t& from) {
        stretches.clear();
        for (int64_t left = DEPTH, at = 0; term < sum.count && left > 0 && stretches.size() < 64;) {
            const Term& t = sum.terms[term];
            const int64_t depth = std::min(left, t.depth - from);
            stretches.push_back({&t, from, depth, at});
            at += stretches.back().steps() * COLUMNS;
            left -= depth + depth % 2;
            from += depth;
            if (from == t.depth) {
                term++;
                from = 0;
            }
        }
    }
};

// One part of a row of C, 16 columns or fewer. Masked stores are slow on Zen 4, so whole ones have none.
inline void put(const Sum& sum, int64_t at, int64_t count, __m512 value) {
    if (sum.c_is_float) {
        float* to = (float*)sum.c + at;
        if (count >= 16) return _mm512_storeu_ps(to, value);
        _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1u), value);
    } else {
        bf16* to = (bf16*)sum.c + at;
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
        if (count >= 16) return _mm256_storeu_si256((__m256i*)to, rounded);
        _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1u), rounded);
    }
}

void task(const Sum& sum, int64_t first, int64_t row, int64_t rows, Scratch& own) {
    const int64_t count = std::min(COLUMNS, sum.columns - first), width = (count + 15) / 16 * 16;
    float bias[COLUMNS] = {};
    for (int64_t j = 0; sum.bias && j < count; j++) bias[j] = load(sum.bias[first + j]);
    int64_t term = 0, from = 0;
    for (bool begun = false; term < sum.count; begun = true) {
        own.take(sum, term, from);
        const bool whole = !begun && term == sum.count;  // then a tile's sums are done at once, and its place is used again
        for (const Stretch& s : own.stretches)
            pack(*s.term, s.from, s.depth, first, count, width, own.b.data() + s.at);
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const int64_t high = std::min(TILE_ROWS, rows - r);
            float* c = own.c.data() + (whole ? 0 : r * COLUMNS);
            if (!begun)
                for (int64_t i = 0; i < high; i++) std::memcpy(c + i * COLUMNS, bias, sizeof(bias));
            for (const Stretch& s : own.stretches) {
                const Term& t = *s.term;
                const word* b = own.b.data() + s.at;
                if (t.a_transposed) {
                    own.a.resize(std::max((int64_t)own.a.size(), s.steps() * TILE_ROWS));
                    pairs_of(t.a + s.from * t.a_stride + row + r, t.a_stride, s.depth, high, own.a.data(), TILE_ROWS);
                    product(high, width, s.steps(), own.a.data(), 1, TILE_ROWS, b, width, c, COLUMNS, true);
                } else {
                    const word* a = (const word*)(t.a + (row + r) * t.a_stride + s.from);
                    product(high, width, s.steps(), a, t.a_stride / 2, 1, b, width, c, COLUMNS, true);
                }
            }
            if (term < sum.count) continue;
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < count; j += 16)
                    put(sum, (row + r + i) * sum.c_stride + first + j, count - j, _mm512_loadu_ps(c + i * COLUMNS + j));
        }
    }
}

void multiply(const std::vector<Sum>& sums, int threads) {
    struct Task {
        int64_t sum, first, row, rows;
    };
    std::vector<Task> tasks;
    int64_t panels = 0;
    for (const Sum& s : sums) panels += (s.columns + COLUMNS - 1) / COLUMNS;
    for (size_t i = 0; i < sums.size(); i++) {
        const Sum& s = sums[i];
        // Several tasks for each thread, so that none waits long for another.
        const int64_t chunks = std::max((s.rows + MOST_ROWS - 1) / MOST_ROWS, (4 * threads + panels - 1) / panels);
        const int64_t share = (s.rows + chunks - 1) / chunks, whole = (share + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        const int64_t rows = std::min(MOST_ROWS, std::max(2 * TILE_ROWS, whole));
        for (int64_t first = 0; first < s.columns; first += COLUMNS)
            for (int64_t row = 0; row < s.rows; row += rows)
                tasks.push_back({(int64_t)i, first, row, std::min(rows, s.rows - row)});
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch own;  // half a megabyte, kept: these calls are short and many
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task& t = tasks[i];
            task(sums[t.sum], t.first, t.row, t.rows, own);
        }
    }
}

}  // namespace

// program: for each sum c, c_stride, c_is_float, rows, columns, bias, how many terms; then its terms, each a, a_stride,
// a_transposed, b, b_stride, b_transposed, depth. Pointers are to the first element.
extern "C" void multiply_bfloat16(const int64_t* program, int64_t count, int threads) {
    std::vector<Sum> sums(count);
    std::vector<std::vector<Term>> terms(count);
    for (int64_t i = 0; i < count; i++) {
        const int64_t* p = program;
        sums[i] = {(void*)p[0], p[1], p[2], p[3], p[4], (const bf16*)p[5], p[6], nullptr};
        program += 7;
        for (int64_t n = 0; n < sums[i].count; n++, program += 7)
            terms[i].push_back({(const bf16*)program[0], program[1], program[2], (const bf16*)program[3], program[4],
                                program[5], program[6]});
        sums[i].terms = terms[i].data();
    }
    multiply(sums, threads);
}

extern "C" int has_tiles() { return 1; }

#else

extern "C" int has_tiles() { return 0; }

#endif
