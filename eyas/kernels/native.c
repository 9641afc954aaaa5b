/* What a pass over a model's rows is made of, for CPUs with AVX2 and FMA, better where they have AVX-512.
 *
 * eyas_product is y[rows, out] = x[rows, in] . w[out, in]^T with float32 x and y and w of 16 (bfloat16), 8 or 4 bits, which is widened on
 * the fly: a pass of few rows is bound by reading weights. eyas_attention is attention over a cache, eyas_layer a whole decoder layer: what
 * lies between the products costs little as arithmetic and much as two dozen calls. In all of them every sum of a row is taken in one order,
 * whatever the other rows of the pass are and whatever lies between the keys that the row sees: a tree's rows give exactly what plain
 * decoding's single rows give. `out` must be a multiple of 16, the heads' width one of 8.
 *
 * Weights lie packed in blocks of 16 outputs, so that one broadcast input meets 16 outputs and no sum crosses lanes; within a block pairs of
 * inputs lie side by side, [in / 2][16][2]. The innermost loops, some rows by some blocks, are in native_avx2.h and native_avx512.h. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define ROWS_AT_ONCE 64 /* their inputs stay in the second-level cache while the weights stream by */
#define TASK 1          /* blocks of 16 outputs a thread takes at a time */
#define AHEAD 2048      /* bytes between the weights in use and those asked for */
#define ALL _Pragma("GCC unroll 16") /* unrolled early, or gcc keeps the sums on the stack */

/* w[o, i] of 8 bits is d * n (n signed), of 4 bits m + d * n (n unsigned), with d and m for each output and group of 32 inputs, as GGUF's
 * Q8_0 and Q4_1. A row of x becomes int16 with one scale. Sums of a group are exact integers, the groups' are added in order, so a row's
 * result depends on nothing else. A block is [in / 32] records of d and m as float16 [16] each, then n as [pair][16][2]; of 4-bit ones output
 * j has the low half of the bytes whose high half is output 8 + j's. */
#define GROUP 32
#define RECORD(bits) ((bits) == 8 ? 2 * LANES + GROUP * LANES : 4 * LANES + GROUP * LANES / 2) /* bytes */

typedef struct {
    const void *w;
    long bits, in, out; /* bits: 16 (bfloat16), 8 or 4 */
    long rounded;       /* whether x may be rounded to bfloat16, with 16 bits */
} matrix;

/* Some rows of x, as a product reads them, by a block; with 8 or 4 bits the rows' scales and sums of groups [n, in / 32] beside them. y:
 * where the block's outputs go, `out` numbers a row. */
typedef void inner(const void *x, const float *scale, const float *sums, const void *w, float *y, long in, long out);

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "native_avx512.h"
#else
#include "native_avx2.h"
#endif

/* One row of in numbers to int16 (nearest, ties to even) with the sum of each group; returns its scale. in is a multiple of 32. */
static float quantise_row(const float *x, int16_t *q, float *sums, long in) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps();
    for (long c = 0; c < in; c += 8) most = _mm256_max_ps(most, _mm256_and_ps(_mm256_loadu_ps(x + c), magnitude));
    float lane[8], peak = 0;
    _mm256_storeu_ps(lane, most);
    for (int i = 0; i < 8; i++) peak = lane[i] > peak ? lane[i] : peak;
    float factor = peak > 1e-30f ? 32767 / peak : 0; /* a smaller one has no factor */
    for (long g = 0; g < in / GROUP; g++) {
        __m256i sum = _mm256_setzero_si256();
        for (long c = g * GROUP; c < (g + 1) * GROUP; c += 8) {
            __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + c), _mm256_set1_ps(factor)));
            _mm_storeu_si128((__m128i *)(q + c), _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
            sum = _mm256_add_epi32(sum, whole);
        }
        int part[8], whole = 0;
        _mm256_storeu_si256((__m256i *)part, sum);
        for (int i = 0; i < 8; i++) whole += part[i];
        sums[g] = (float)whole;
    }
    return peak / 32767;
}

static void round_row(const float *x, uint16_t *q, long in) {
#ifdef ROUNDED
    for (long c = 0; c < in; c += LANES) {
        __mmask16 some = in - c < LANES ? (__mmask16)((1u << (in - c)) - 1) : 0xffff;
        _mm256_mask_storeu_epi16(q + c, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + c)));
    }
#endif
}

static inner *const *choices(const matrix *m) {
#ifdef ROUNDED
    if (m->bits == 16 && m->rounded) return rounded;
#endif
    return m->bits == 8 ? grouped_8 : m->bits == 4 ? grouped_4 : exact;
}

/* Bring row r of x into the form that its product reads. scratch: in / 2 numbers a row, and with 8 or 4 bits in / 32 and 1 more. */
static void take_row(const matrix *m, const float *x, long r, long rows, float *scratch) {
    long in = m->in;
    float *sums = scratch + rows * (in / 2), *scale = sums + rows * (in / GROUP);
    int16_t *q = (int16_t *)scratch + r * in;
    if (m->bits < 16) scale[r] = quantise_row(x, q, sums + r * (in / GROUP), in);
    else if (choices(m) != exact) round_row(x, (uint16_t *)q, in);
}

/* y = x . w^T of rows that were taken, by the threads of the region it is called in, which do not wait for each other at its end. */
static void multiply(const matrix *m, const float *x, float *y, long rows, const float *scratch) {
    long in = m->in, out = m->out, count = out / LANES, tasks = (count + TASK - 1) / TASK;
    long block = m->bits == 16 ? in * LANES * 2 : in / GROUP * RECORD(m->bits);
    const float *sums = scratch + rows * (in / 2), *scale = sums + rows * (in / GROUP);
    inner *const *some = choices(m);
    const char *inputs = some == exact ? (const char *)x : (const char *)scratch;
    long row = in * (some == exact ? sizeof(float) : sizeof(int16_t));
    for (long first = 0; first < rows; first += ROWS_AT_ONCE) {
        long last = rows - first < ROWS_AT_ONCE ? rows : first + ROWS_AT_ONCE;
#pragma omp for schedule(guided, 2) nowait
        for (long t = 0; t < tasks; t++)
            for (long b = t * TASK; b < count && b < (t + 1) * TASK; b++)
                for (long r = first, groups = (last - first + MOST_ROWS - 1) / MOST_ROWS, n; groups > 0; groups--, r += n) {
                    n = (last - r + groups - 1) / groups; /* as equal as can be */
                    some[n - 1](inputs + r * row, scale + r, sums + r * (in / GROUP), (const char *)m->w + b * block,
                                y + r * out + b * LANES, in, out);
                }
    }
}

#define EACH_ROW _Pragma("omp for schedule(static)") for (long r = 0; r < rows; r++)
/* without waiting: where what comes next is the same rows' in the same threads */
#define EACH_ROW_ON _Pragma("omp for schedule(static) nowait") for (long r = 0; r < rows; r++)

void eyas_product(const float *x, const matrix *m, float *y, long rows, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        EACH_ROW take_row(m, x + r * m->in, r, rows, scratch);
        multiply(m, x, y, rows, scratch);
    }
}

/* ---- attention ---- */

static inline __m256 widened(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

typedef struct {
    long rows, heads, kv_heads, width; /* width of a head, a multiple of 8 */
    long stride;                       /* numbers from one row of q, k and v to the next; a row is q heads, then k heads, then v heads */
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

/* Sums of four registers' lanes, each in the same order. */
static inline __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#define QUERIES 3 /* of those that share a key head, taken at once: its keys and values are widened once for them */

/* n query heads of one row from head g on. scratch: their queries [n][width], then their scores [n][room]. */
#define HEADS(TYPE, NAME)                                                                                                            \
    static inline __attribute__((always_inline)) void heads_##NAME(const plan *p, const float *q, const TYPE *keys, const TYPE *values,  \
                                                                   float *out, float *lse, long r, long g, int n, float *scratch) {  \
        long d = p->width, prefix = p->prefix[r], count = prefix + p->start[r + 1] - p->start[r], room = (count + 11) / 8 * 8;         \
        const int64_t *other = p->other + p->start[r];                                                                               \
        long base = (p->slot[r] * p->kv_heads + g / (p->heads / p->kv_heads)) * p->capacity;                                           \
        float *query = scratch, *score = scratch + n * d;                                                                            \
        const __m256 scale = _mm256_set1_ps(1.0f / sqrtf((float)d));                                                                 \
        for (long c = 0; c < n * d; c += 8)                                                                                          \
            _mm256_storeu_ps(query + c, _mm256_mul_ps(_mm256_loadu_ps(q + r * p->stride + g * d + c), scale));                         \
        for (long t = 0; t < count; t += 4) {                                                                                        \
            const TYPE *key[4];                                                                                                      \
            __m256 sum[QUERIES][4];                                                                                                  \
            for (long i = 0; i < 4; i++) {                                                                                           \
                long at = t + i < count ? t + i : count - 1;                                                                         \
                key[i] = keys + (base + (at < prefix ? at : other[at - prefix])) * d;                                                  \
            }                                                                                                                        \
            ALL for (int m = 0; m < n; m++) ALL for (int i = 0; i < 4; i++) sum[m][i] = _mm256_setzero_ps();                           \
            for (long c = 0; c < d; c += 8)                                                                                          \
                ALL for (int i = 0; i < 4; i++) {                                                                                    \
                    __m256 k = load_##NAME(key[i] + c);                                                                              \
                    ALL for (int m = 0; m < n; m++) sum[m][i] = _mm256_fmadd_ps(_mm256_loadu_ps(query + m * d + c), k, sum[m][i]);     \
                }                                                                                                                    \
            ALL for (int m = 0; m < n; m++)                                                                                          \
                _mm_storeu_ps(score + m * room + t, totals(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));                               \
        }                                                                                                                            \
        for (int m = 0; m < n; m++) {                                                                                                \
            float norm = soften(score + m * room, count);                                                                            \
            if (lse) lse[r * p->heads + g + m] = norm;                                                                               \
        }                                                                                                                            \
        for (long c = 0; c < d; c += 32) {                                                                                           \
            __m256 sum[QUERIES][4];                                                                                                  \
            long parts = (d - c < 32 ? d - c : 32) / 8;                                                                              \
            ALL for (int m = 0; m < n; m++) ALL for (int i = 0; i < 4; i++) sum[m][i] = _mm256_setzero_ps();                           \
            if (parts == 4)                                                                                                          \
                for (long t = 0; t < count; t++) {                                                                                   \
                    const TYPE *value = values + (base + (t < prefix ? t : other[t - prefix])) * d + c;                                \
                    ALL for (int i = 0; i < 4; i++) {                                                                                \
                        __m256 v = load_##NAME(value + 8 * i);                                                                       \
                        ALL for (int m = 0; m < n; m++) sum[m][i] = _mm256_fmadd_ps(_mm256_set1_ps(score[m * room + t]), v, sum[m][i]); \
                    }                                                                                                                \
                }                                                                                                                    \
            else                                                                                                                     \
                for (long t = 0; t < count; t++) {                                                                                   \
                    const TYPE *value = values + (base + (t < prefix ? t : other[t - prefix])) * d + c;                                \
                    for (long i = 0; i < parts; i++) {                                                                               \
                        __m256 v = load_##NAME(value + 8 * i);                                                                       \
                        ALL for (int m = 0; m < n; m++) sum[m][i] = _mm256_fmadd_ps(_mm256_set1_ps(score[m * room + t]), v, sum[m][i]); \
                    }                                                                                                                \
                }                                                                                                                    \
            for (int m = 0; m < n; m++)                                                                                              \
                for (long i = 0; i < parts; i++) _mm256_storeu_ps(out + (r * p->heads + g + m) * d + c + 8 * i, sum[m][i]);            \
        }                                                                                                                            \
    }

/* q, k and v lie side by side in a row. Writes keys and values to their places, then attends, by the threads of the region it is called in;
 * lse [rows, heads] may be NULL. scratch, one for each thread: attention_scratch numbers. */
#define ATTEND(TYPE, NAME)                                                                                                           \
    HEADS(TYPE, NAME)                                                                                                                \
    static void attend_##NAME(const plan *p, const float *q, TYPE *keys, TYPE *values, float *out, float *lse, float *scratch) {       \
        long rows = p->rows, d = p->width, group = p->heads / p->kv_heads;                                                           \
        EACH_ROW {                                                                                                                   \
            const float *k = q + r * p->stride + p->heads * d, *v = k + p->kv_heads * d;                                               \
            for (long h = 0; h < p->kv_heads; h++) {                                                                                 \
                long at = ((p->slot[r] * p->kv_heads + h) * p->capacity + p->place[r]) * d;                                            \
                for (long c = 0; c < d; c += 8) {                                                                                    \
                    store_##NAME(keys + at + c, _mm256_loadu_ps(k + h * d + c));                                                     \
                    store_##NAME(values + at + c, _mm256_loadu_ps(v + h * d + c));                                                   \
                }                                                                                                                    \
            }                                                                                                                        \
        }                                                                                                                            \
        _Pragma("omp for schedule(dynamic, 1)") for (long t = 0; t < rows * p->kv_heads; t++) {                                        \
            long r = t / p->kv_heads, g = t % p->kv_heads * group, end = g + group;                                                    \
            for (; g + 3 <= end; g += 3) heads_##NAME(p, q, keys, values, out, lse, r, g, 3, scratch);                                 \
            if (g + 2 == end) heads_##NAME(p, q, keys, values, out, lse, r, g, 2, scratch);                                            \
            if (g + 1 == end) heads_##NAME(p, q, keys, values, out, lse, r, g, 1, scratch);                                            \
        }                                                                                                                            \
    }                                                                                                                                \
    void eyas_attention_##NAME(const plan *p, const float *q, TYPE *keys, TYPE *values, float *out, float *lse, int threads) {         \
        _Pragma("omp parallel num_threads(threads)") {                                                                               \
            float *scratch = malloc(attention_scratch(p) * sizeof(float));                                                           \
            attend_##NAME(p, q, keys, values, out, lse, scratch);                                                                    \
            free(scratch);                                                                                                           \
        }                                                                                                                            \
    }

static long attention_scratch(const plan *p) {
    long most = 0;
    for (long r = 0; r < p->rows; r++) {
        long count = p->prefix[r] + p->start[r + 1] - p->start[r];
        most = count > most ? count : most;
    }
    return QUERIES * (p->width + most + 16);
}

ATTEND(float, float32)
ATTEND(uint16_t, bfloat16)

/* ---- a whole layer ---- */

typedef struct {
    long width, inner; /* of the residual stream, of the MLP */
    float epsilon;
    const float *norm, *mlp_norm, *beside_norm; /* [width] each; norm NULL: q, k, v read x itself; beside_norm NULL: nothing comes beside x */
    const float *qkv_bias, *o_bias;             /* NULL: none */
    matrix qkv, o, gate_up, down;
} layer;

/* y = x / sqrt(mean x^2 + epsilon) * weight, one row; x itself where weight is NULL */
static void norm_row(const float *x, const float *weight, float *y, long width, float epsilon) {
    if (!weight) {
        memcpy(y, x, width * sizeof(float));
        return;
    }
    __m256 squares = _mm256_setzero_ps();
    for (long c = 0; c < width; c += 8) {
        __m256 v = _mm256_loadu_ps(x + c);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    __m256 scale = _mm256_set1_ps(1.0f / sqrtf(total(squares) / (float)width + epsilon));
    for (long c = 0; c < width; c += 8)
        _mm256_storeu_ps(y + c, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + c), scale), _mm256_loadu_ps(weight + c)));
}

void eyas_norm(const float *x, const float *weight, float *y, long rows, long width, float epsilon) {
    for (long r = 0; r < rows; r++) norm_row(x + r * width, weight, y + r * width, width, epsilon);
}

/* Heads of one row turned by their position: halves, as Hugging Face's Llama. cos and sin [d]. */
static void rotate_row(float *x, long heads, long d, const float *cos, const float *sin) {
    for (long h = 0; h < heads; h++, x += d)
        for (long c = 0; c < d / 2; c++) {
            float low = x[c], high = x[c + d / 2];
            x[c] = low * cos[c] - high * sin[c];
            x[c + d / 2] = high * cos[c + d / 2] + low * sin[c + d / 2];
        }
}

/* silu(gate) * up, one row: x / (1 + e^-x), with e^-|x| so that nothing overflows */
static void gate_row(const float *gate, const float *up, float *y, long inner) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (long c = 0; c < inner; c += 8) {
        __m256 x = _mm256_loadu_ps(gate + c), small = exponential(_mm256_or_ps(x, sign));
        __m256 above = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ);
        __m256 share = _mm256_div_ps(_mm256_blendv_ps(small, one, above), _mm256_add_ps(one, small));
        _mm256_storeu_ps(y + c, _mm256_mul_ps(_mm256_mul_ps(x, share), _mm256_loadu_ps(up + c)));
    }
}

static void add_row(float *x, const float *y, const float *bias, long width) {
    for (long c = 0; c < width; c++) x[c] += bias ? y[c] + bias[c] : y[c];
}

/* x [rows, width] += attention, then += MLP: `count` decoder layers over rows, as one region of threads. q, k and v read norm(x), or
 * [norm(beside); norm(x)] where something [rows, width] comes beside x (the embeddings of EAGLE-3's draft). keys and values: of the first
 * layer; the next one's lie `apart` further. features [rows, tapped, width]: x as it enters the layers `taps` names, counted from the first.
 * scratch: for each row 2 width + qkv's outputs + heads * d + gate_up's outputs + inner + o's outputs numbers, and what the products take. */
#define LAYERS(TYPE, NAME)                                                                                                               \
    void eyas_layers_##NAME(const plan *p, const layer *layers, long count, float *x, const float *beside, const float *cos,             \
                            const float *sin, TYPE *keys, TYPE *values, long apart, const long *taps, long tapped, float *features,      \
                            float *scratch, int threads) {                                                                               \
        long d = p->width, width = layers->width, rows = p->rows, inputs = layers->beside_norm ? 2 * width : width;                      \
        long qkv_out = layers->qkv.out, o_out = layers->o.out, both = layers->gate_up.out, turned = p->heads + p->kv_heads;              \
        float *normed = scratch, *qkv = normed + rows * inputs, *mixed = qkv + rows * qkv_out, *gate_up = mixed + rows * p->heads * d;   \
        float *inner = gate_up + rows * both, *back = inner + rows * layers->inner, *taken = back + rows * o_out;                        \
        _Pragma("omp parallel num_threads(threads)") {                                                                                   \
            float *own = malloc(attention_scratch(p) * sizeof(float));                                                                   \
            for (const layer *l = layers; l < layers + count; l++) {                                                                     \
                long at = (l - layers) * apart;                                                                                          \
                EACH_ROW {                                                                                                               \
                    for (long t = 0; t < tapped; t++)                                                                                    \
                        if (taps[t] == l - layers) memcpy(features + (r * tapped + t) * width, x + r * width, width * sizeof(float));    \
                    norm_row(x + r * width, l->norm, normed + (r + 1) * inputs - width, width, l->epsilon);                              \
                    if (l->beside_norm) norm_row(beside + r * width, l->beside_norm, normed + r * inputs, width, l->epsilon);            \
                    take_row(&l->qkv, normed + r * inputs, r, rows, taken);                                                              \
                }                                                                                                                        \
                multiply(&l->qkv, normed, qkv, rows, taken);                                                                             \
                _Pragma("omp barrier") EACH_ROW {                                                                                        \
                    float *row = qkv + r * qkv_out;                                                                                      \
                    if (l->qkv_bias) add_row(row, l->qkv_bias, NULL, (turned + p->kv_heads) * d);                                        \
                    rotate_row(row, turned, d, cos + r * d, sin + r * d);                                                                \
                }                                                                                                                        \
                attend_##NAME(p, qkv, keys + at, values + at, mixed, NULL, own);                                                         \
                EACH_ROW take_row(&l->o, mixed + r * p->heads * d, r, rows, taken);                                                      \
                multiply(&l->o, mixed, back, rows, taken);                                                                               \
                _Pragma("omp barrier") EACH_ROW {                                                                                        \
                    add_row(x + r * width, back + r * o_out, l->o_bias, width);                                                          \
                    norm_row(x + r * width, l->mlp_norm, normed + r * width, width, l->epsilon);                                         \
                    take_row(&l->gate_up, normed + r * width, r, rows, taken);                                                           \
                }                                                                                                                        \
                multiply(&l->gate_up, normed, gate_up, rows, taken);                                                                     \
                _Pragma("omp barrier") EACH_ROW {                                                                                        \
                    gate_row(gate_up + r * both, gate_up + r * both + l->inner, inner + r * l->inner, l->inner);                         \
                    take_row(&l->down, inner + r * l->inner, r, rows, taken);                                                            \
                }                                                                                                                        \
                multiply(&l->down, inner, back, rows, taken);                                                                            \
                _Pragma("omp barrier") EACH_ROW_ON add_row(x + r * width, back + r * o_out, NULL, width);                                \
            }                                                                                                                            \
            free(own);                                                                                                                   \
        }                                                                                                                                \
    }

LAYERS(float, float32)
LAYERS(uint16_t, bfloat16)
