/* The two products of a pass over a model's rows. AVX2 and FMA.
 *
 * eyas_product is y[rows, out] = x[rows, in] . w[out, in]^T with float32 x and y and bfloat16 w, which is widened on the fly: a pass of
 * few rows is bound by reading weights, and bfloat16 halves that. eyas_attention is attention over a cache. In both every sum of a row
 * is taken in one order, whatever the other rows of the pass are and whatever lies between the keys that the row sees: a tree's rows
 * give exactly what plain decoding's single rows give. `in` and the heads' width must be multiples of 8. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

/* ---- attention ---- */

typedef struct {
    long rows, heads, kv_heads, width; /* width of a head, a multiple of 8 */
    long q_stride, k_stride, v_stride; /* numbers from one row to the next; heads of a row lie side by side */
    long capacity;                     /* rows of a slot in the cache, which is [slots, kv_heads, capacity, width] */
    const int64_t *slot, *place;       /* [rows] where a row lives */
    const int64_t *prefix;             /* [rows] how many of its slot's first rows it sees */
    const int64_t *start, *other;      /* [rows + 1] and the places behind the prefix that it sees, ascending */
} plan;

static inline __m256 load_float32(const float *p) { return _mm256_loadu_ps(p); }
static inline __m256 load_bfloat16(const uint16_t *p) { return widened(p); }

static inline void store_float32(float *p, __m256 v) { _mm256_storeu_ps(p, v); }
static inline void store_bfloat16(uint16_t *p, __m256 v) { /* to the nearest, ties to even */
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(bits));
}

/* e^x for x <= 0 to about two units in the last place: 2^n times a polynomial of what is left within half an octave. */
static inline __m256 exponential(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x); /* ln 2 in two parts, the first exact */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f / 5040);
    const float taylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 7; i++) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(taylor[i]));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

/* Scores to shares in place, over count numbers padded to a multiple of 8; returns the log of the sum of their exponentials. */
static inline float soften(float *score, long count) {
    __m256 most = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps();
    for (long i = count; i & 7; i++) score[i] = -INFINITY;
    for (long i = 0; i < count; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(score + i));
    float lane[8], peak = -INFINITY;
    _mm256_storeu_ps(lane, most);
    for (int i = 0; i < 8; i++) peak = lane[i] > peak ? lane[i] : peak;
    for (long i = 0; i < count; i += 8) {
        __m256 raw = _mm256_loadu_ps(score + i);
        __m256 share = exponential(_mm256_sub_ps(raw, _mm256_set1_ps(peak)));
        share = _mm256_andnot_ps(_mm256_cmp_ps(raw, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ), share);
        _mm256_storeu_ps(score + i, share);
        sum = _mm256_add_ps(sum, share);
    }
    float whole = total(sum);
    for (long i = 0; i < count; i += 8)
        _mm256_storeu_ps(score + i, _mm256_div_ps(_mm256_loadu_ps(score + i), _mm256_set1_ps(whole)));
    return peak + logf(whole);
}

/* One row's query heads that share key head h. scratch: a query [width] and scores [count padded to 8]. */
#define ATTENTION(TYPE, NAME)                                                                                                        \
    static void one_##NAME(const plan *p, const TYPE *q, const TYPE *keys, const TYPE *values, TYPE *out, float *lse, long r, long h,  \
                           float *scratch) {                                                                                         \
        long d = p->width, group = p->heads / p->kv_heads, prefix = p->prefix[r], others = p->start[r + 1] - p->start[r];              \
        const int64_t *other = p->other + p->start[r];                                                                               \
        long count = prefix + others, base = (p->slot[r] * p->kv_heads + h) * p->capacity;                                             \
        float *query = scratch, *score = scratch + d, scale = 1.0f / sqrtf((float)d);                                                  \
        for (long g = h * group; g < (h + 1) * group; g++) {                                                                         \
            for (long c = 0; c < d; c += 8)                                                                                          \
                _mm256_storeu_ps(query + c, _mm256_mul_ps(load_##NAME(q + r * p->q_stride + g * d + c), _mm256_set1_ps(scale)));       \
            for (long t = 0; t < count; t++) {                                                                                       \
                const TYPE *key = keys + (base + (t < prefix ? t : other[t - prefix])) * d;                                            \
                __m256 sum = _mm256_setzero_ps();                                                                                    \
                for (long c = 0; c < d; c += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + c), load_##NAME(key + c), sum);          \
                score[t] = total(sum);                                                                                               \
            }                                                                                                                        \
            float norm = soften(score, count);                                                                                       \
            if (lse) lse[r * p->heads + g] = norm;                                                                                   \
            for (long c = 0; c < d; c += 64) {                                                                                       \
                __m256 sum[8];                                                                                                       \
                long n = (d - c < 64 ? d - c : 64) / 8;                                                                              \
                for (long i = 0; i < 8; i++) sum[i] = _mm256_setzero_ps();                                                           \
                for (long t = 0; t < count; t++) {                                                                                   \
                    const TYPE *value = values + (base + (t < prefix ? t : other[t - prefix])) * d + c;                                \
                    __m256 share = _mm256_set1_ps(score[t]);                                                                         \
                    if (n == 8)                                                                                                      \
                        for (int i = 0; i < 8; i++) sum[i] = _mm256_fmadd_ps(share, load_##NAME(value + 8 * i), sum[i]);               \
                    else                                                                                                             \
                        for (long i = 0; i < n; i++) sum[i] = _mm256_fmadd_ps(share, load_##NAME(value + 8 * i), sum[i]);              \
                }                                                                                                                    \
                for (long i = 0; i < n; i++) store_##NAME(out + (r * p->heads + g) * d + c + 8 * i, sum[i]);                           \
            }                                                                                                                        \
        }                                                                                                                            \
    }                                                                                                                                \
    /* Writes the rows' keys and values to their places, then attends; lse [rows, heads] may be NULL. */                             \
    void eyas_attention_##NAME(const plan *p, const TYPE *q, const TYPE *k, const TYPE *v, TYPE *keys, TYPE *values, TYPE *out,        \
                               float *lse, int threads) {                                                                            \
        long most = 0, work = 0, d = p->width;                                                                                       \
        for (long r = 0; r < p->rows; r++) {                                                                                         \
            long count = p->prefix[r] + p->start[r + 1] - p->start[r];                                                               \
            most = count > most ? count : most;                                                                                      \
            work += count * p->heads * d;                                                                                            \
            for (long h = 0; h < p->kv_heads; h++) {                                                                                 \
                long at = ((p->slot[r] * p->kv_heads + h) * p->capacity + p->place[r]) * d;                                            \
                memcpy(keys + at, k + r * p->k_stride + h * d, d * sizeof(TYPE));                                                    \
                memcpy(values + at, v + r * p->v_stride + h * d, d * sizeof(TYPE));                                                  \
            }                                                                                                                        \
        }                                                                                                                            \
        _Pragma("omp parallel num_threads(threads) if (work > ALONE)") {                                                             \
            float *scratch = malloc((d + most + 8) * sizeof(float));                                                                 \
            _Pragma("omp for schedule(dynamic, 1)") for (long t = 0; t < p->rows * p->kv_heads; t++)                                   \
                one_##NAME(p, q, keys, values, out, lse, t / p->kv_heads, t % p->kv_heads, scratch);                                   \
            free(scratch);                                                                                                           \
        }                                                                                                                            \
    }

#define ALONE 20000 /* products below which a second thread costs more than it brings */

ATTENTION(float, float32)
ATTENTION(uint16_t, bfloat16)
