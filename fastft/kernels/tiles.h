// What attention.cpp and products.cpp share: products of bfloat16 matrices, summed in float32, in registers.
//
// The dot product instructions take pairs: a "word" is two bfloat16 that meet in one sum. In A B, A holds words along the
// summed index for each row; B holds, for each word of that index, one word a column.
//
// Processors with AMX multiply tiles of 16 rows and 16 words (whole rows and words of C += A B, as many as there are); what
// is left over, and everything on processors without it, goes through AVX512-BF16.

#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTFT_TILES 1
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__x86_64__)
#define FASTFT_AMX 1
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

typedef uint16_t bf16;
typedef uint32_t word;

// Whether the system lets this process use AMX, and nobody has switched it off (products.cpp).
extern bool amx_serves;

namespace {

#ifdef FASTFT_AMX
const int64_t ROW_STEP = 16, WORD_STEP = 16;  // of A that go through one instruction
const int64_t PANEL = 32;                     // columns of B that are gone through together
#else
const int64_t ROW_STEP = 1, WORD_STEP = 1;
const int64_t PANEL = 64;
#endif

// Memory that begins with a line of the cache (a tile whose rows each lie in two of them loads at half the speed) and holds
// nothing in particular at first.
template <class T>
struct Aligned {
    typedef T value_type;

    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    template <class U>
    void construct(U* p) {
        ::new ((void*)p) U;
    }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline float load(bf16 bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
inline bf16 stored(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    return (bf16)((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

// One term of a sum of products. Word s of row r of A lies at a[r * a_row + s]; that of column j of B's panel p, which are PANEL
// columns, at b[p * b_panel + s * b_step + j].
struct Factors {
    const word* a;
    int64_t a_row;
    const word* b;
    int64_t b_step, steps;    // words of the summed index
    int64_t b_panel = PANEL;  // B's rows are whole
};

// Where C will be written as bfloat16, its lines are fetched while it is being computed.
struct Destination {
    const char* c = nullptr;
    int64_t row_bytes = 0;
};

// --- AVX512-BF16

// R rows and 16 V columns of C, all in registers.
template <int R, int V>
void tile(const Factors& f, float* c, int64_t c_row, bool add) {
    __m512 sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = add ? _mm512_loadu_ps(c + r * c_row + 16 * v) : _mm512_setzero_ps();
    for (int64_t s = 0; s < f.steps; s++) {
        __m512bh right[V];
        for (int v = 0; v < V; v++) right[v] = (__m512bh)_mm512_loadu_si512(f.b + s * f.b_step + 16 * v);
        for (int r = 0; r < R; r++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32((int)f.a[r * f.a_row + s]);
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(c + r * c_row + 16 * v, sum[r][v]);
}

// All rows of 16 V columns: as many at a time as keep 24 of the 32 registers busy with sums (12 for one column of registers).
template <int V>
void band(int64_t rows, Factors f, float* c, int64_t c_row, bool add) {
    constexpr int R = V == 4 ? 6 : V == 3 ? 8 : 12;
    for (; rows >= R; rows -= R, f.a += R * f.a_row, c += R * c_row) tile<R, V>(f, c, c_row, add);
    for (; rows >= 4; rows -= 4, f.a += 4 * f.a_row, c += 4 * c_row) tile<4, V>(f, c, c_row, add);
    for (; rows > 0; rows--, f.a += f.a_row, c += c_row) tile<1, V>(f, c, c_row, add);
}

void vector_product(int64_t rows, int64_t columns, Factors f, float* c, int64_t c_row, bool add) {
    for (; columns >= PANEL; columns -= PANEL, f.b += f.b_panel, c += PANEL) band<PANEL / 16>(rows, f, c, c_row, add);
    switch (columns / 16) {
        case 3: return band<3>(rows, f, c, c_row, add);
        case 2: return band<2>(rows, f, c, c_row, add);
        case 1: return band<1>(rows, f, c, c_row, add);
    }
}

// --- AMX

// While it lives, this thread's tile registers hold 16 rows of 64 bytes each: 0 to 3 sums, 4 and 5 A, 6 and 7 B.
struct TileRegisters {
#ifdef FASTFT_AMX
    const bool on = amx_serves;

    TileRegisters() {
        if (!on) return;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } layout;
        asm volatile("" ::"m"(layout));
        _tile_loadconfig(&layout);
    }
    ~TileRegisters() {
        if (on) _tile_release();
    }
#else
    TileRegisters() {}
#endif
    TileRegisters(const TileRegisters&) = delete;
};

#ifdef FASTFT_AMX

// Where B of a panel is more than this many words, it does not stay in the level-1 cache beside A, and is loaded past it.
const int64_t STREAMED = 4096;

// Words [from, to) of one term into the sums of 16 R rows and 16 V columns. FETCH: two lines of the destination a step.
template <int R, int V, bool STREAM, bool FETCH>
inline void add_tiles(const Factors& f, int64_t row, int64_t panel, int64_t from, int64_t to, const char* line, int64_t line_bytes) {
    const word *a = f.a + row * f.a_row + from, *b = f.b + panel * f.b_panel + from * f.b_step;
    const word* const end = a + (to - from);
    const int64_t a_bytes = 4 * f.a_row, b_bytes = 4 * f.b_step;
    for (; a < end; a += WORD_STEP, b += WORD_STEP * f.b_step) {
        _tile_loadd(4, a, a_bytes);
        if constexpr (STREAM) _tile_stream_loadd(6, b, b_bytes);
        if constexpr (!STREAM) _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V == 2) {
            if constexpr (STREAM) _tile_stream_loadd(7, b + 16, b_bytes);
            if constexpr (!STREAM) _tile_loadd(7, b + 16, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, a + 16 * f.a_row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (R == 2 && V == 2) _tile_dpbf16ps(3, 5, 7);
        if constexpr (FETCH) {
            __builtin_prefetch(line, 1);
            __builtin_prefetch(line + line_bytes, 1);
            line += 2 * line_bytes;
        }
    }
}

template <int R, int V, bool STREAM>
inline void add_term(const Factors& f, int64_t row, int64_t panel, const Destination& to) {
    int64_t fetched = 0;
    if (to.c) {
        fetched = f.steps < 8 * R * WORD_STEP ? f.steps : 8 * R * WORD_STEP;
        add_tiles<R, V, STREAM, true>(f, row, panel, 0, fetched, to.c + row * to.row_bytes + 2 * PANEL * panel, to.row_bytes);
    }
    add_tiles<R, V, STREAM, false>(f, row, panel, fetched, f.steps, nullptr, 0);
}

// 16 R rows and 16 V columns (of one panel) of C; steps of all terms are multiples of WORD_STEP. The empty asm statements say
// that memory is read and written, which GCC's own definitions of the loads do not.
template <int R, int V>
void tiles(const Factors* terms, int64_t count, int64_t row, int64_t panel, float* c, int64_t c_row, bool add,
           const Destination& to) {
    const int64_t c_bytes = 4 * c_row;
    asm volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (V == 2) _tile_loadd(1, c + 16, c_bytes);
        if constexpr (R == 2) _tile_loadd(2, c + 16 * c_row, c_bytes);
        if constexpr (R == 2 && V == 2) _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (V == 2) _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2 && V == 2) _tile_zero(3);
    }
    for (const Factors* f = terms; f < terms + count; f++) {
        const Destination fetched = f == terms ? to : Destination();
        if (f->steps * PANEL > STREAMED)
            add_term<R, V, true>(*f, row, panel, fetched);
        else
            add_term<R, V, false>(*f, row, panel, fetched);
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (V == 2) _tile_stored(1, c + 16, c_bytes);
    if constexpr (R == 2) _tile_stored(2, c + 16 * c_row, c_bytes);
    if constexpr (R == 2 && V == 2) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
    asm volatile("" ::: "memory");
}

template <int V>
void tiles_of_panel(int64_t rows, const Factors* terms, int64_t count, int64_t panel, float* c, int64_t c_row, bool add,
                    const Destination& to) {
    int64_t row = 0;
    for (; row + 32 <= rows; row += 32) tiles<2, V>(terms, count, row, panel, c + row * c_row, c_row, add, to);
    if (row < rows) tiles<1, V>(terms, count, row, panel, c + row * c_row, c_row, add, to);
}

// rows is a multiple of ROW_STEP, steps are of WORD_STEP.
void tile_products(int64_t rows, int64_t columns, const Factors* terms, int64_t count, float* c, int64_t c_row, bool add,
                   const Destination& to) {
    int64_t panel = 0;
    for (; columns >= PANEL; columns -= PANEL, panel++, c += PANEL) tiles_of_panel<2>(rows, terms, count, panel, c, c_row, add, to);
    if (columns > 0) tiles_of_panel<1>(rows, terms, count, panel, c, c_row, add, to);
}

#endif

// --- both

// C (rows, columns) = the sum of A B over the terms, or += where `add`; columns is a multiple of 16. TileRegisters live.
// On AMX, steps of several terms at once are multiples of WORD_STEP.
void products(int64_t rows, int64_t columns, const Factors* terms, int64_t count, float* c, int64_t c_row, bool add,
              const Destination& to = {}) {
    int64_t row = 0;  // those before it are done
#ifdef FASTFT_AMX
    if (amx_serves && rows >= ROW_STEP) {
        row = rows / ROW_STEP * ROW_STEP;
        tile_products(row, columns, terms, count, c, c_row, add, to);
    }
#endif
    for (const Factors* f = terms; f < terms + count && row < rows; f++)
        vector_product(rows - row, columns, {f->a + row * f->a_row, f->a_row, f->b, f->b_step, f->steps, f->b_panel},
                       c + row * c_row, c_row, add || f > terms);
}

// The same for one term of any number of steps.
void product(int64_t rows, int64_t columns, const Factors& f, float* c, int64_t c_row, bool add) {
    const int64_t whole = f.steps / WORD_STEP * WORD_STEP, rest = f.steps - whole;
    const Factors first = {f.a, f.a_row, f.b, f.b_step, whole, f.b_panel};
    if (whole > 0) products(rows, columns, &first, 1, c, c_row, add);
    if (rest > 0)
        vector_product(rows, columns, {f.a + whole, f.a_row, f.b + whole * f.b_step, f.b_step, rest, f.b_panel}, c,
                       c_row, add || whole > 0);
}

// --- layouts

// 16 rows of 16 words become columns.
inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    // x[4 i + j]: column 4 k + j of rows 4 i to 4 i + 3, in quarter k.
    for (int j = 0; j < 4; j++) {
        y[j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
        y[4 + j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
        y[8 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
        y[12 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
        x[4 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0x88);
        x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
        x[12 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0xdd);
    }
}

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1u); }

// in (rows, columns) -> out (columns, rows), words; `to` at least `rows`, of which those behind the last one become zero up to
// a multiple of 16.
inline void transposed(const word* in, int64_t from, int64_t rows, int64_t columns, word* out, int64_t to) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16) {
            const __mmask16 mask = first_lanes(columns - c);
            __m512i x[16];
            for (int64_t i = 0; i < 16; i++)
                x[i] = r + i < rows ? _mm512_maskz_loadu_epi32(mask, in + (r + i) * from + c) : _mm512_setzero_si512();
            transpose(x);
            for (int64_t i = 0; i < 16 && c + i < columns; i++) _mm512_storeu_si512(out + (c + i) * to + r, x[i]);
        }
}

inline __m512i paired(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// rows (count, columns) with `stride` between them -> words of neighbouring rows, as B of a product: word i of column j of panel
// p at pairs[p * panel + i * step + j]. An odd last row is paired with zeros.
inline void pairs_of(const bf16* rows, int64_t stride, int64_t count, int64_t columns, word* pairs, int64_t step,
                     int64_t panel = PANEL) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 2) {
        const bf16 *low = rows + i * stride, *high = low + stride;
        const bool odd = i + 1 == count;
        for (int64_t d = 0; d < columns; d += 16) {
            word* out = pairs + d / PANEL * panel + i / 2 * step + d % PANEL;
            const __mmask16 mask = first_lanes(columns - d);
            if (mask == 0xffff)
                _mm512_storeu_si512(out, paired(_mm256_loadu_si256((const __m256i*)(low + d)),
                                                odd ? none : _mm256_loadu_si256((const __m256i*)(high + d))));
            else
                _mm512_mask_storeu_epi32(out, mask,
                                         paired(_mm256_maskz_loadu_epi16(mask, low + d),
                                                odd ? none : _mm256_maskz_loadu_epi16(mask, high + d)));
        }
    }
}

}  // namespace

#endif
