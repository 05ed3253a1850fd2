// Sums of matrix products in bfloat16 on processors with AVX512-BF16 or AMX: C = bias + sum of A_i B_i, rounded once at the end.
// A LoRA layer is such a sum (x W^T + low B^T), and so is its input's gradient (dy W + dlow A): what is added never travels
// through memory, and several sums are one parallel region. native.py's `multiply` holds the same in torch.
//
// A task is a panel of columns and some hundred rows of one C. It packs its part of B into words, which then stay in the
// level-2 cache, and goes through its rows a few at a time.

#include <cstdint>

#include "tiles.h"

#ifdef FASTFT_TILES

#include <algorithm>
#include <vector>

#ifdef FASTFT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const int64_t MOST_TERMS = 16;   // at a time
#ifdef FASTFT_AMX
const int64_t DEPTH = 4096;      // of the summed index at a time, over all terms
const int64_t COLUMNS = 128;
const int64_t MOST_ROWS = 512;   // of C at a time, where its sums wait for more of the summed index
const int64_t WHOLE_ROWS = 1536; // where they do not
const int64_t TILE_ROWS = 32;
#else
const int64_t DEPTH = 2048;
const int64_t COLUMNS = 64;
const int64_t MOST_ROWS = 480, WHOLE_ROWS = 480;
const int64_t TILE_ROWS = 24;
#endif
const int64_t STEPS = DEPTH / 2 + MOST_TERMS * WORD_STEP;  // words of the summed index at a time, padding included

// One product. A (rows, depth): word s of row r lies along a row, or, where `a_transposed`, A is held as (depth, rows).
// B (depth, columns) is held so, or, where `b_transposed`, as (columns, depth). Strides are in elements.
// Where `absmax` is given, B is in NF4 instead: b holds two numbers a byte, the first in the high half, whole rows of b_stride
// numbers; absmax one float32 for each b_block numbers. b_stride and b_block are multiples of 16.
struct Term {
    const bf16* a;
    int64_t a_stride, a_transposed;
    const bf16* b;
    int64_t b_stride, b_transposed, depth;
    const float* absmax;
    int64_t b_block;
};

struct Sum {
    void* c;
    int64_t c_stride, c_is_float, rows, columns;
    const bf16* bias;  // (columns,) or null
    int64_t count;
    const Term* terms;
};

// A stretch of a term's summed index; its packed B begins at word row `at`.
struct Stretch {
    const Term* term;
    int64_t from, depth, at;

    int64_t steps() const { return rounded_up((depth + 1) / 2, WORD_STEP); }
};

// The 16 quantiles of a normal distribution that NF4 stands for (QLoRA, arXiv 2305.14314, appendix E).
alignas(64) const float NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                   -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                   0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                   0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Rows [row, row + rows) and columns [column, column + columns) of an NF4 matrix as bfloat16, `step` apart; `column` is a
// multiple of 16, and so many numbers are written to a row that its length is, too.
void dequantise(const Term& t, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16* out, int64_t step) {
    const __m512 values = _mm512_load_ps(NF4);
    const __m128i low_half = _mm_set1_epi8(15);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += 16) {
            const int64_t at = (row + r) * t.b_stride + column + c;
            const __m128i bytes = _mm_loadl_epi64((const __m128i*)((const uint8_t*)t.b + at / 2));
            const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half), low = _mm_and_si128(bytes, low_half);
            const __m512i index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low));
            const __m512 x = _mm512_mul_ps(_mm512_permutexvar_ps(index, values), _mm512_set1_ps(t.absmax[at / t.b_block]));
            _mm256_storeu_si256((__m256i*)(out + r * step + c), (__m256i)_mm512_cvtneps_pbh(x));
        }
}

// B's columns [first, first + count) of a stretch as panels of (steps, PANEL) words, zero behind `count` and `depth`.
void pack_plain_b(const Term& t, const Stretch& s, int64_t first, int64_t count, word* out) {
    const int64_t words = (s.depth + 1) / 2, panel = s.steps() * PANEL, odd = count % PANEL;
    if (odd) std::memset(out + count / PANEL * panel, 0, panel * sizeof(word));
    if (t.b_transposed) {
        const word* b = (const word*)(t.b + first * t.b_stride + s.from);
        for (int64_t j = 0; j < count; j += PANEL)
            transposed(b + j * t.b_stride / 2, t.b_stride / 2, std::min(PANEL, count - j), words, out + j / PANEL * panel, PANEL);
    } else {
        pairs_of(t.b + s.from * t.b_stride + first, t.b_stride, s.depth, count, out, PANEL, panel);
    }
    for (int64_t p = 0; p < count / PANEL; p++)
        std::memset(out + p * panel + words * PANEL, 0, (s.steps() - words) * PANEL * sizeof(word));
}

// A's rows [row, row + count) of a stretch as (padded, steps) words, zero behind `count` and `depth`.
void pack_a(const Stretch& s, int64_t row, int64_t count, int64_t padded, word* out) {
    const Term& t = *s.term;
    const int64_t steps = s.steps();
    if (!t.a_transposed) {
        std::memset(out, 0, padded * steps * sizeof(word));
        for (int64_t r = 0; r < count; r++)
            std::memcpy(out + r * steps, t.a + (row + r) * t.a_stride + s.from, s.depth * sizeof(bf16));
        return;
    }
    for (int64_t r = 0; r < padded; r += 16)
        for (int64_t w = 0; w < steps; w += 16) {
            const __mmask16 rows = first_lanes(count - r);
            __m512i x[16];
            for (int64_t i = 0; i < 16; i++) {
                const int64_t d = 2 * (w + i);
                const bf16* low = t.a + (s.from + d) * t.a_stride + row + r;
                const __m256i a = d < s.depth ? _mm256_maskz_loadu_epi16(rows, low) : _mm256_setzero_si256();
                x[i] = paired(a, d + 1 < s.depth ? _mm256_maskz_loadu_epi16(rows, low + t.a_stride) : _mm256_setzero_si256());
            }
            transpose(x);
            const __mmask16 here = first_lanes(steps - w);
            for (int64_t i = 0; i < 16 && r + i < padded; i++) _mm512_mask_storeu_epi32(out + (r + i) * steps + w, here, x[i]);
        }
}

struct Scratch {
    Buffer<word> a, b;
    Buffer<float> c;
    Buffer<bf16> block;  // of a quantised B
    std::vector<Stretch> stretches;

    Scratch() : a(STEPS * TILE_ROWS), b(STEPS * COLUMNS), c(MOST_ROWS * COLUMNS) {}

    void pack_b(const Stretch& s, int64_t first, int64_t count, word* out) {
        Term t = *s.term;
        if (!t.absmax) return pack_plain_b(t, s, first, count, out);
        // Only the block that this task multiplies by is ever whole.
        const int64_t rows = t.b_transposed ? count : s.depth, columns = t.b_transposed ? s.depth : count;
        const int64_t row = t.b_transposed ? first : s.from, column = t.b_transposed ? s.from : first;
        const int64_t step = rounded_up(columns, 16);
        block.resize(rows * step);
        dequantise(t, row, rows, column, columns, block.data(), step);
        t.b = block.data();
        t.b_stride = step;
        pack_plain_b(t, {&t, 0, s.depth, s.at}, 0, count, out);
    }

    // The next stretches of `sum`'s terms that fit into B; `term` and `from` say where to begin, and move on.
    void take(const Sum& sum, int64_t& term, int64_t& from) {
        stretches.clear();
        for (int64_t left = DEPTH, at = 0; term < sum.count && left > 0 && stretches.size() < (size_t)MOST_TERMS;) {
            const Term& t = sum.terms[term];
            const int64_t depth = std::min(left, t.depth - from);
            stretches.push_back({&t, from, depth, at});
            at += stretches.back().steps();
            left -= depth + depth % 2;
            from += depth;
            if (from == t.depth) {
                term++;
                from = 0;
            }
        }
    }

    // The stretches' factors for `count` rows: A as it lies, or packed where it is transposed or must be padded.
    int64_t factors(int64_t row, int64_t count, int64_t padded, Factors* out) {
        int64_t used = 0;
        for (const Stretch& s : stretches) {
            const Term& t = *s.term;
            const word* place = b.data() + s.at * COLUMNS;
            if (t.a_transposed || padded != count || 2 * s.steps() != s.depth) {
                pack_a(s, row, count, padded, a.data() + used);
                *out++ = {a.data() + used, s.steps(), place, PANEL, s.steps(), s.steps() * PANEL};
                used += padded * s.steps();
            } else {
                *out++ = {(const word*)(t.a + row * t.a_stride + s.from), t.a_stride / 2, place, PANEL, s.steps(), s.steps() * PANEL};
            }
        }
        return (int64_t)stretches.size();
    }
};

// `count` columns of a row of C. Masked stores are slow on Zen 4, and half a line at a time on Sapphire Rapids.
void put(const Sum& sum, int64_t at, int64_t count, const float* values) {
    int64_t j = 0;
    if (sum.c_is_float) {
        float* to = (float*)sum.c + at;
        for (; j + 16 <= count; j += 16) _mm512_storeu_ps(to + j, _mm512_loadu_ps(values + j));
        if (j < count) _mm512_mask_storeu_ps(to + j, first_lanes(count - j), _mm512_loadu_ps(values + j));
        return;
    }
    bf16* to = (bf16*)sum.c + at;
#pragma GCC unroll 4
    for (; j + 32 <= count; j += 32)
        _mm512_storeu_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + j + 16), _mm512_loadu_ps(values + j)));
    for (; j < count; j += 16)
        _mm256_mask_storeu_epi16(to + j, first_lanes(count - j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + j)));
}

void task(const Sum& sum, int64_t first, int64_t row, int64_t rows, Scratch& own) {
    const int64_t count = std::min(COLUMNS, sum.columns - first), width = rounded_up(count, 16);
    float bias[COLUMNS] = {};
    for (int64_t j = 0; sum.bias && j < count; j++) bias[j] = load(sum.bias[first + j]);
    int64_t term = 0, from = 0;
    for (bool begun = false; term < sum.count; begun = true) {
        own.take(sum, term, from);
        const bool whole = !begun && term == sum.count;  // then a tile's sums are done at once, and its place is used again
        for (const Stretch& s : own.stretches) own.pack_b(s, first, count, own.b.data() + s.at * COLUMNS);
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const int64_t high = std::min(TILE_ROWS, rows - r), padded = amx_serves ? rounded_up(high, ROW_STEP) : high;
            float* c = own.c.data() + (whole ? 0 : r * COLUMNS);
            const bool biased = sum.bias && !begun;
            for (int64_t i = 0; biased && i < padded; i++) std::memcpy(c + i * COLUMNS, bias, sizeof(bias));
            Factors factors[MOST_TERMS];
            const int64_t terms = own.factors(row + r, high, padded, factors);
            const bool ready = term == sum.count && high == TILE_ROWS;
            const char* to = (const char*)sum.c + ((row + r) * sum.c_stride + first) * (sum.c_is_float ? 4 : 2);
            products(padded, width, factors, terms, c, COLUMNS, begun || biased,
                     {ready && !sum.c_is_float ? to : nullptr, sum.c_stride * 2});
            if (term < sum.count) continue;
            for (int64_t i = 0; i < high; i++) put(sum, (row + r + i) * sum.c_stride + first, count, c + i * COLUMNS);
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
        int64_t depth = 0;
        for (int64_t n = 0; n < s.count; n++) depth += s.terms[n].depth + 1;
        const int64_t most = depth > DEPTH || s.count > MOST_TERMS ? MOST_ROWS : WHOLE_ROWS;
        // Several tasks for each thread, so that none waits long for another.
        const int64_t chunks = std::max((s.rows + most - 1) / most, (4 * threads + panels - 1) / panels);
        const int64_t share = rounded_up((s.rows + chunks - 1) / chunks, TILE_ROWS);
        const int64_t rows = std::min(most, std::max(2 * TILE_ROWS, share));
        for (int64_t first = 0; first < s.columns; first += COLUMNS)
            for (int64_t row = 0; row < s.rows; row += rows)
                tasks.push_back({(int64_t)i, first, row, std::min(rows, s.rows - row)});
    }
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch own;  // up to two megabytes, kept: these calls are short and many
        const TileRegisters registers;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task& t = tasks[i];
            task(sums[t.sum], t.first, t.row, t.rows, own);
        }
    }
}

}  // namespace

// program: for each sum c, c_stride, c_is_float, rows, columns, bias, how many terms; then its terms, each a, a_stride,
// a_transposed, b, b_stride, b_transposed, depth, absmax, b_block. Pointers are to the first element; absmax may be null.
extern "C" void multiply_bfloat16(const int64_t* program, int64_t count, int threads) {
    std::vector<Sum> sums(count);
    std::vector<std::vector<Term>> terms(count);
    for (int64_t i = 0; i < count; i++) {
        const int64_t* p = program;
        sums[i] = {(void*)p[0], p[1], p[2], p[3], p[4], (const bf16*)p[5], p[6], nullptr};
        program += 7;
        for (int64_t n = 0; n < sums[i].count; n++, program += 9)
            terms[i].push_back({(const bf16*)program[0], program[1], program[2], (const bf16*)program[3], program[4],
                                program[5], program[6], (const float*)program[7], program[8]});
        sums[i].terms = terms[i].data();
    }
    multiply(sums, threads);
}

extern "C" int has_tiles() { return 1; }

#ifdef FASTFT_AMX
// The system must be asked once for each process before a tile register is touched.
static bool granted() {
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
static const bool amx_granted = granted();
#else
static const bool amx_granted = false;
#endif
bool amx_serves = amx_granted;

// Returns whether AMX is used from now on: where it is wanted and can be.
extern "C" int use_amx(int wanted) { return amx_serves = wanted && amx_granted; }

#else

extern "C" int has_tiles() { return 0; }
extern "C" int use_amx(int) { return 0; }

#endif
