/* y[rows, out] = x[rows, in] . w[out, in]^T with float32 x and y and bfloat16 w, which is widened on the fly.
 *
 * A pass of few rows is bound by reading weights, and bfloat16 halves that. Every (row, out) sum is taken in one order whatever the
 * block it is computed in, so a row's result does not depend on the other rows of the pass: a tree's rows give exactly what plain
 * decoding's single rows give. `in` must be a multiple of 8. AVX2 and FMA. */
#include <immintrin.h>
#include <stdint.h>

#define ROWS_AT_ONCE 64 /* their inputs stay in the second-level cache while the weights stream by */
#define AHEAD 8        /* outputs between the weights in use and those asked for */
#define TASK 96         /* outputs a thread takes at a time; a multiple of every block's width */

static inline __m256 widened(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

/* R rows by C outputs. Sums, inputs and one weight must fit 16 registers: 4 by 2 beats 4 by 3 by a third at 8 rows. */
#define BLOCK(R, C)                                                                                                    \
    static inline void block_##R##_##C(const float *x, const uint16_t *w, float *y, long in, long out) {               \
        __m256 sum[R][C];                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int c = 0; c < C; c++) sum[r][c] = _mm256_setzero_ps();                                               \
        for (long i = 0; i < in; i += 8) {                                                                             \
            __m256 value[R];                                                                                           \
            for (int r = 0; r < R; r++) value[r] = _mm256_loadu_ps(x + r * in + i);                                    \
            for (int c = 0; c < C; c++) {                                                                              \
                __m256 weight = widened(w + c * in + i);                                                               \
                for (int r = 0; r < R; r++) sum[r][c] = _mm256_fmadd_ps(value[r], weight, sum[r][c]);                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int c = 0; c < C; c++) y[r * out + c] = total(sum[r][c]);                                             \
    }

BLOCK(1, 8)
BLOCK(2, 6)
BLOCK(4, 2)
BLOCK(4, 1)
BLOCK(2, 2)
BLOCK(1, 2)
BLOCK(1, 1)

/* Ask for weights some blocks ahead, so that memory works while this block computes. */
static inline void ask(const uint16_t *w, long count) {
    for (long i = 0; i < count; i += 32) _mm_prefetch((const char *)(w + i), _MM_HINT_T1);
}

static void outputs(const float *x, const uint16_t *w, float *y, long rows, long in, long out, long first, long last) {
    long o = first;
    if (rows == 1)
        for (; o + 8 <= last; o += 8) block_1_8(x, w + o * in, y + o, in, out);
    if (rows == 2)
        for (; o + 6 <= last; o += 6) block_2_6(x, w + o * in, y + o, in, out);
    for (; o + 2 <= last; o += 2) {
        long r = 0;
        ask(w + (o + AHEAD) * in, 2 * in);
        for (; r + 4 <= rows; r += 4) block_4_2(x + r * in, w + o * in, y + r * out + o, in, out);
        for (; r + 2 <= rows; r += 2) block_2_2(x + r * in, w + o * in, y + r * out + o, in, out);
        for (; r < rows; r++) block_1_2(x + r * in, w + o * in, y + r * out + o, in, out);
    }
    for (; o < last; o++) {
        long r = 0;
        for (; r + 4 <= rows; r += 4) block_4_1(x + r * in, w + o * in, y + r * out + o, in, out);
        for (; r < rows; r++) block_1_1(x + r * in, w + o * in, y + r * out + o, in, out);
    }
}

void eyas_product(const float *x, const uint16_t *w, float *y, long rows, long in, long out, int threads) {
    long tasks = (out + TASK - 1) / TASK;
    for (long r = 0; r < rows; r += ROWS_AT_ONCE) {
        long count = rows - r < ROWS_AT_ONCE ? rows - r : ROWS_AT_ONCE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (long t = 0; t < tasks; t++)
            outputs(x + r * in, w, y + r * out, count, in, out, t * TASK, (t + 1) * TASK < out ? (t + 1) * TASK : out);
    }
}
