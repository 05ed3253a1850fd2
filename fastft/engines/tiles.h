// What attention.cpp and products.cpp share: products of bfloat16 matrices, summed in float32, in tiles of registers.
//
// The dot product instruction takes pairs: a "word" is two bfloat16 that meet in one sum. In A B, A holds words along the
// summed index for each row; B holds, for each word of that index, one word a column.

#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTFT_TILES 1

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t bf16;
typedef uint32_t word;

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

// R rows and 16 V columns of C, all in registers. A: word s of row r at a[r * a_row + s * a_step]; B: b[s * b_step + column].
template <int R, int V>
void tile(int64_t steps, const word* a, int64_t a_row, int64_t a_step, const word* b, int64_t b_step, float* c,
          int64_t c_row, bool add) {
    __m512 sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = add ? _mm512_loadu_ps(c + r * c_row + 16 * v) : _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; s++) {
        __m512bh right[V];
        for (int v = 0; v < V; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + s * b_step + 16 * v);
        for (int r = 0; r < R; r++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + s * a_step]);
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(c + r * c_row + 16 * v, sum[r][v]);
}

// All rows of 16 V columns: as many at a time as keep 24 of the 32 registers busy with sums (12 for one column of registers).
template <int V>
void band(int64_t rows, int64_t steps, const word* a, int64_t a_row, int64_t a_step, const word* b, int64_t b_step,
          float* c, int64_t c_row, bool add) {
    constexpr int R = V == 4 ? 6 : V == 3 ? 8 : 12;
    for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row)
        tile<R, V>(steps, a, a_row, a_step, b, b_step, c, c_row, add);
    for (; rows >= 4; rows -= 4, a += 4 * a_row, c += 4 * c_row)
        tile<4, V>(steps, a, a_row, a_step, b, b_step, c, c_row, add);
    for (; rows > 0; rows--, a += a_row, c += c_row) tile<1, V>(steps, a, a_row, a_step, b, b_step, c, c_row, add);
}

// C (rows, columns) = A B, or += where `add`; columns is a multiple of 16.
void product(int64_t rows, int64_t columns, int64_t steps, const word* a, int64_t a_row, int64_t a_step, const word* b,
             int64_t b_step, float* c, int64_t c_row, bool add) {
    for (; columns >= 64; columns -= 64, b += 64, c += 64) band<4>(rows, steps, a, a_row, a_step, b, b_step, c, c_row, add);
    switch (columns / 16) {
        case 3: return band<3>(rows, steps, a, a_row, a_step, b, b_step, c, c_row, add);
        case 2: return band<2>(rows, steps, a, a_row, a_step, b, b_step, c, c_row, add);
        case 1: return band<1>(rows, steps, a, a_row, a_step, b, b_step, c, c_row, add);
    }
}

// rows (count, columns) with `stride` between them -> (count / 2, columns) words of neighbouring rows, `step` words apart;
// an odd last row is paired with zeros.
inline void pairs_of(const bf16* rows, int64_t stride, int64_t count, int64_t columns, word* pairs, int64_t step) {
    for (int64_t i = 0; i < count; i += 2) {
        const bf16 *low = rows + i * stride, *high = low + stride;
        word* out = pairs + i / 2 * step;
        if (i + 1 < count) {
#pragma omp simd
            for (int64_t d = 0; d < columns; d++) out[d] = (word)low[d] | (word)high[d] << 16;
        } else {
#pragma omp simd
            for (int64_t d = 0; d < columns; d++) out[d] = (word)low[d];
        }
    }
}

}  // namespace

#endif
