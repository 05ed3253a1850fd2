// The parts of a transformer step that are not matrix products, each in one pass over memory, for float32 and
// bfloat16 on the CPU. Compiled at first use by native.py, which also holds the same functions in plain torch:
// those are the specification, and what runs where there is no compiler.
//
// All arithmetic is in float32. bfloat16 is rounded to nearest even when it is stored.

#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) {
    uint32_t wide = (uint32_t)p->bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
static inline void store(float* p, float value) { *p = value; }
static inline void store(bf16* p, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    p->bits = (uint16_t)((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}
template <class T> static inline float rounded(float value) {
    T stored;
    store(&stored, value);
    return load(&stored);
}

// e^x without branches, so that the compiler can vectorise it: 2^n times a polynomial of degree 6 in the rest
// (Cephes' coefficients); relative error about 1e-7.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// RMSNorm. x, y (rows, n); weight (n,). plus_one: Gemma's y = x rstd (1 + w), rounded once; otherwise
// y = w * round(x rstd), as Llama does. rstd (rows,) is kept for the backward.
template <class T>
static void rms_forward(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t n, float eps,
                        int plus_one, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * n;
        T* out = y + row * n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) {
            float v = load(in + i);
            sum += v * v;
        }
        float r = 1.0f / std::sqrt(sum / n + eps);
        rstd[row] = r;
        if (plus_one)
            for (int64_t i = 0; i < n; i++) store(out + i, load(in + i) * r * (1.0f + load(weight + i)));
        else
            for (int64_t i = 0; i < n; i++) store(out + i, rounded<T>(load(in + i) * r) * load(weight + i));
    }
}

// dx = rstd (g - xhat mean(g xhat)) with g = dy * weight and xhat = x rstd; the weight is frozen.
template <class T>
static void rms_backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, int64_t rows, int64_t n,
                         int plus_one, int threads) {
    const float shift = plus_one ? 1.0f : 0.0f;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T *grad = dy + row * n, *in = x + row * n;
        T* out = dx + row * n;
        float r = rstd[row], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < n; i++) dot += load(grad + i) * (load(weight + i) + shift) * load(in + i);
        float mean = dot * r * r / n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            store(out + i, r * (load(grad + i) * (load(weight + i) + shift) - load(in + i) * mean));
    }
}

// h = act(gate) * up, elementwise. gelu: the tanh form (Gemma); otherwise SiLU.
static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

template <class T> static void glu_forward(const T* gate, const T* up, T* h, int64_t count, int gelu, int threads) {
    const float c = 0.7978845608028654f, d = 0.044715f;
    if (gelu) {
#pragma omp parallel for simd num_threads(threads)
        for (int64_t i = 0; i < count; i++) {
            float x = load(gate + i);
            float s = sigmoid(2.0f * c * (x + d * x * x * x));  // (1 + tanh(z)) / 2 = sigmoid(2 z)
            store(h + i, x * s * load(up + i));
        }
    } else {
#pragma omp parallel for simd num_threads(threads)
        for (int64_t i = 0; i < count; i++) {
            float x = load(gate + i);
            store(h + i, x * sigmoid(x) * load(up + i));
        }
    }
}

// dgate and dup replace gate and up; h is computed again, for the gradients of the layer that follows.
template <class T>
static void glu_backward(const T* dh, T* gate, T* up, T* h, int64_t count, int gelu, int threads) {
    const float c = 0.7978845608028654f, d = 0.044715f;
    if (gelu) {
#pragma omp parallel for simd num_threads(threads)
        for (int64_t i = 0; i < count; i++) {
            float x = load(gate + i), u = load(up + i), g = load(dh + i);
            float s = sigmoid(2.0f * c * (x + d * x * x * x));
            float slope = s + x * s * (1.0f - s) * 2.0f * c * (1.0f + 3.0f * d * x * x);
            store(h + i, x * s * u);
            store(gate + i, g * u * slope);
            store(up + i, g * x * s);
        }
    } else {
#pragma omp parallel for simd num_threads(threads)
        for (int64_t i = 0; i < count; i++) {
            float x = load(gate + i), u = load(up + i), g = load(dh + i);
            float s = sigmoid(x);
            store(h + i, x * s * u);
            store(gate + i, g * u * s * (1.0f + x * (1.0f - s)));
            store(up + i, g * x * s);
        }
    }
}

// From a projection's rows (tokens, kv * group * dim) to attention's blocks: sequence s with `len` tokens at `start`
// becomes (kv, padded, group, dim) at padded_start; the padding is zero. cos, sin (tokens, dim) rotate halves on the
// way, or are null. table: (sequences, 4) int64 of start, len, padded_start, padded.
template <class T>
static void pack_heads(const T* rows, const T* cos, const T* sin, T* blocks, const int64_t* table, int64_t sequences,
                       int64_t kv, int64_t group, int64_t dim, int threads) {
    const int64_t width = kv * group * dim, half = dim / 2;
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t start = table[4 * s], len = table[4 * s + 1], padded = table[4 * s + 3];
        T* block = blocks + table[4 * s + 2] * width;
#pragma omp parallel for num_threads(threads)
        for (int64_t p = 0; p < padded; p++)
            for (int64_t head = 0; head < kv * group; head++) {
                T* out = block + (((head / group) * padded + p) * group + head % group) * dim;
                if (p >= len) {
                    std::memset(out, 0, dim * sizeof(T));
                    continue;
                }
                const T* in = rows + (start + p) * width + head * dim;
                if (!cos) {
                    std::memcpy(out, in, dim * sizeof(T));
                    continue;
                }
                const T *c = cos + (start + p) * dim, *n = sin + (start + p) * dim;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    float a = load(in + i), b = load(in + half + i);
                    store(out + i, a * load(c + i) - b * load(n + i));
                    store(out + half + i, b * load(c + half + i) + a * load(n + half + i));
                }
            }
    }
}

// The way back; with cos and sin, the transposed rotation (which is what a gradient needs).
template <class T>
static void unpack_heads(const T* blocks, const T* cos, const T* sin, T* rows, const int64_t* table, int64_t sequences,
                         int64_t kv, int64_t group, int64_t dim, int threads) {
    const int64_t width = kv * group * dim, half = dim / 2;
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t start = table[4 * s], len = table[4 * s + 1], padded = table[4 * s + 3];
        const T* block = blocks + table[4 * s + 2] * width;
#pragma omp parallel for num_threads(threads)
        for (int64_t p = 0; p < len; p++)
            for (int64_t head = 0; head < kv * group; head++) {
                const T* in = block + (((head / group) * padded + p) * group + head % group) * dim;
                T* out = rows + (start + p) * width + head * dim;
                if (!cos) {
                    std::memcpy(out, in, dim * sizeof(T));
                    continue;
                }
                const T *c = cos + (start + p) * dim, *n = sin + (start + p) * dim;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    float a = load(in + i), b = load(in + half + i);
                    store(out + i, a * load(c + i) + b * load(n + half + i));
                    store(out + half + i, b * load(c + half + i) - a * load(n + i));
                }
            }
    }
}

// Causal softmax of scale * scores in place. scores (batch, rows, keys); row r is the query at position
// first_query + r / group, key column j the position first_key + j; allowed: 0 <= query - key < window.
template <class T>
static void softmax_forward(T* scores, int64_t batch, int64_t rows, int64_t keys, int64_t group, int64_t first_query,
                            int64_t first_key, int64_t window, float scale, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < rows; r++) {
            T* row = scores + (b * rows + r) * keys;
            const int64_t query = first_query + r / group - first_key;
            const int64_t last = query + 1 < keys ? query + 1 : keys;
            const int64_t first = query - window + 1 > 0 ? query - window + 1 : 0;
            float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
            for (int64_t j = first; j < last; j++) {
                float v = load(row + j);
                top = v > top ? v : top;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = first; j < last; j++) sum += fast_exp((load(row + j) - top) * scale);
            const float inverse = 1.0f / sum;
#pragma omp simd
            for (int64_t j = first; j < last; j++) store(row + j, fast_exp((load(row + j) - top) * scale) * inverse);
            std::memset(row, 0, first * sizeof(T));
            std::memset(row + last, 0, (keys - last) * sizeof(T));
        }
}

// grad (holding dP on entry) becomes dS = P (dP - sum(P dP)) scale; P is zero where nothing was allowed.
template <class T>
static void softmax_backward(const T* probabilities, T* grad, int64_t rows, int64_t keys, float scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const T* p = probabilities + r * keys;
        T* g = grad + r * keys;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < keys; j++) dot += load(p + j) * load(g + j);
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) store(g + j, load(p + j) * (load(g + j) - dot) * scale);
    }
}

// Cross entropy of each row of logits (rows, vocabulary), in place: losses[r] = log sum exp - logit of the target,
// and, where `backward`, logits become factor * (softmax - onehot). cap: z = cap tanh(logit / cap) first (Gemma 2); 0: none.
template <class T>
static void cross_entropy(T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocabulary,
                          float factor, float cap, int backward, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        T* row = logits + r * vocabulary;
        float top = -INFINITY, sum = 0;
        if (cap > 0)
            for (int64_t j = 0; j < vocabulary; j++) store(row + j, cap * (2.0f * sigmoid(2.0f * load(row + j) / cap) - 1.0f));
        const float target = load(row + targets[r]);
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < vocabulary; j++) {
            float v = load(row + j);
            top = v > top ? v : top;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < vocabulary; j++) sum += fast_exp(load(row + j) - top);
        losses[r] = std::log(sum) + top - target;
        if (!backward) continue;
        const float inverse = factor / sum, at_target = factor * std::expm1(-losses[r]);
        const float slope_at_target = cap > 0 ? 1.0f - (target / cap) * (target / cap) : 1.0f;
        if (cap > 0)
            for (int64_t j = 0; j < vocabulary; j++) {
                float z = load(row + j);
                store(row + j, fast_exp(z - top) * inverse * (1.0f - (z / cap) * (z / cap)));
            }
        else
            for (int64_t j = 0; j < vocabulary; j++) store(row + j, fast_exp(load(row + j) - top) * inverse);
        store(row + targets[r], at_target * slope_at_target);
    }
}

#define FOR_TYPE(T, S)                                                                                                 \
    extern "C" void rms_forward_##S(const T* x, const T* w, T* y, float* rstd, int64_t rows, int64_t n, float eps,     \
                                    int plus_one, int threads) {                                                      \
        rms_forward(x, w, y, rstd, rows, n, eps, plus_one, threads);                                                   \
    }                                                                                                                  \
    extern "C" void rms_backward_##S(const T* dy, const T* x, const T* w, const float* rstd, T* dx, int64_t rows,      \
                                     int64_t n, int plus_one, int threads) {                                          \
        rms_backward(dy, x, w, rstd, dx, rows, n, plus_one, threads);                                                  \
    }                                                                                                                  \
    extern "C" void glu_forward_##S(const T* gate, const T* up, T* h, int64_t count, int gelu, int threads) {          \
        glu_forward(gate, up, h, count, gelu, threads);                                                                \
    }                                                                                                                  \
    extern "C" void glu_backward_##S(const T* dh, T* gate, T* up, T* h, int64_t count, int gelu, int threads) {        \
        glu_backward(dh, gate, up, h, count, gelu, threads);                                                           \
    }                                                                                                                  \
    extern "C" void pack_heads_##S(const T* rows, const T* cos, const T* sin, T* blocks, const int64_t* table,         \
                                   int64_t sequences, int64_t kv, int64_t group, int64_t dim, int threads) {          \
        pack_heads(rows, cos, sin, blocks, table, sequences, kv, group, dim, threads);                                 \
    }                                                                                                                  \
    extern "C" void unpack_heads_##S(const T* blocks, const T* cos, const T* sin, T* rows, const int64_t* table,       \
                                     int64_t sequences, int64_t kv, int64_t group, int64_t dim, int threads) {        \
        unpack_heads(blocks, cos, sin, rows, table, sequences, kv, group, dim, threads);                               \
    }                                                                                                                  \
    extern "C" void softmax_forward_##S(T* scores, int64_t batch, int64_t rows, int64_t keys, int64_t group,           \
                                        int64_t first_query, int64_t first_key, int64_t window, float scale,          \
                                        int threads) {                                                                \
        softmax_forward(scores, batch, rows, keys, group, first_query, first_key, window, scale, threads);             \
    }                                                                                                                  \
    extern "C" void softmax_backward_##S(const T* p, T* grad, int64_t rows, int64_t keys, float scale, int threads) {  \
        softmax_backward(p, grad, rows, keys, scale, threads);                                                         \
    }                                                                                                                  \
    extern "C" void cross_entropy_##S(T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t v,       \
                                      float factor, float cap, int backward, int threads) {                           \
        cross_entropy(logits, targets, losses, rows, v, factor, cap, backward, threads);                               \
    }

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)
