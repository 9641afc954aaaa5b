/* What a pass over a model's rows is made of, for CPUs with AVX2 and FMA, better where they have AVX-512.
 *
 * eyas_product is y[rows, out] = x[rows, in] . w[out, in]^T with float32 x and y and w of 16 (bfloat16), 8 or 4 bits, which is widened on
 * the fly: a pass of few rows is bound by reading weights. eyas_attention is attention over a cache, eyas_layers whole decoder layers: what
 * lies between the products costs little as arithmetic and much as two dozen calls. In all of them every sum of a row is taken in one order,
 * whatever the other rows of the pass are and whatever lies between the keys that the row sees: a tree's rows give exactly what plain
 * decoding's single rows give. `out` must be a multiple of 16, `in` an even number. Each is a job of phases that team.h's threads share.
 *
 * Weights lie packed in blocks of 16 outputs, so that one broadcast input meets 16 outputs and no sum crosses lanes; within a block pairs of
 * inputs lie side by side, [in / 2][16][2]. The innermost loops, some rows by some blocks, are in native_avx2.h and native_avx512.h. */
#include <immintrin.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define ROWS_AT_ONCE 64 /* their inputs stay in the second-level cache while the weights stream by */
#define TASK_NUMBERS 32768 /* outputs that a task of a product computes at most, but for the least that a task takes */
#define ROWS_IN_TASK 16    /* rows that a task takes at most, of what lies between products */
#define AHEAD 2048      /* bytes between the weights in use and those asked for; see ASKS_NEXT */
#define ALL _Pragma("GCC unroll 16") /* unrolled early, or gcc keeps the sums on the stack */

/* w[o, i] of 8 bits is d * n (n signed), of 4 bits m + d * n (n unsigned), with d and m for each output and group of 32 inputs, as GGUF's
 * Q8_0 and Q4_1. A row of x becomes int16 with one scale. Sums of a group are exact integers, the groups' are added in order, so a row's
 * result depends on nothing else. A block is [in / 32] records of d and m as float16 [16] each, then n as [pair][16][2]; of 4-bit ones output
 * j has the low half of the bytes whose high half is output 8 + j's. */
#define GROUP 32
#define RECORD(bits) ((bits) == 8 ? 2 * LANES + GROUP * LANES : 4 * LANES + GROUP * LANES / 2) /* bytes */

static long largest(long a, long b) { return a > b ? a : b; }

typedef struct {
    const void *w;
    long bits, in, out; /* bits: 16 (bfloat16), 8 or 4 */
    long rounded;       /* whether x may be rounded to bfloat16, with 16 bits */
} matrix;

/* Some rows of x, as a product reads them, by a block; with 8 or 4 bits the rows' scales and sums of groups [n, in / 32] beside them. y:
 * where the block's outputs go, `out` numbers a row. ask: which weights are asked for meanwhile, `stride` bytes for each pair of inputs, by
 * loops that do not settle that themselves. */
typedef void inner(const void *x, const float *scale, const float *sums, const void *w, float *y, long in, long out, const char *ask,
                   long stride);

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "native_avx512.h"
#else
#include "native_avx2.h"
#endif

#include "team.h"

#include "board.h"

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

static int reads_floats(const matrix *m) { return choices(m) == exact; }

/* The rows of a product's input as the product reads them: float32, bfloat16, or int16 with scales and with sums of groups. */
typedef struct {
    char *rows;
    float *sums, *scale; /* [rows, in / 32], [rows]; of products with 8 or 4 bits */
} inputs;

/* Numbers of memory that the form of a row takes, at most: eyas_product's callers and eyas_layers' give so many for each row. */
static long form_of(const matrix *m) { return m->in + m->in / GROUP + 1; }

static inputs inputs_at(const matrix *m, float *memory, long rows) {
    float *sums = memory + rows * m->in;
    return (inputs){(char *)memory, sums, sums + rows * (m->in / GROUP)};
}

static long bytes_of_row(const matrix *m) { return m->in * (long)(reads_floats(m) ? sizeof(float) : sizeof(int16_t)); }

/* A row brought into that form, in memory of its own: `form_of` numbers, as inputs_at lays out one row. */
static void form_row(const matrix *m, const float *x, float *memory) {
    inputs to = inputs_at(m, memory, 1);
    if (m->bits < 16) *to.scale = quantise_row(x, (int16_t *)to.rows, to.sums, m->in);
    else if (reads_floats(m)) memcpy(to.rows, x, m->in * sizeof(float));
    else round_row(x, (uint16_t *)to.rows, m->in);
}

static void keep_row(const matrix *m, inputs to, long r, const float *memory) {
    inputs from = inputs_at(m, (float *)memory, 1);
    memcpy(to.rows + r * bytes_of_row(m), from.rows, bytes_of_row(m));
    if (m->bits < 16) {
        memcpy(to.sums + r * (m->in / GROUP), from.sums, m->in / GROUP * sizeof(float));
        to.scale[r] = *from.scale;
    }
}

/* Blocks of outputs of a product. A task takes few enough that the rows' outputs stay near the core. */
static long blocks(const matrix *m, long rows, long *least, long *most) {
    long all = m->out / LANES, near = TASK_NUMBERS / LANES / largest(rows, 1);
    *least = largest(m->in > 1024 ? 1 : 2, 1 + all / (MOST_TASKS / 2)), *most = largest(near, *least);
    return all;
}

/* Numbers that a task of a product puts out at most. */
static long outputs_in_task(const matrix *m, long rows) {
    long least, most, all = blocks(m, rows, &least, &most);
    return (most < all ? most : all) * LANES * rows;
}

/* Outputs [first, last) (blocks) of x . w^T, into y [rows][(last - first) * 16] */
static void multiply(const matrix *m, inputs x, float *y, long rows, long first, long last) {
    long in = m->in, out = (last - first) * LANES, block = m->bits == 16 ? in * LANES * 2 : in / GROUP * RECORD(m->bits);
    inner *const *some = choices(m);
    for (long top = 0; top < rows; top += ROWS_AT_ONCE) {
        long bottom = rows - top < ROWS_AT_ONCE ? rows : top + ROWS_AT_ONCE;
        long all = (bottom - top + MOST_ROWS - 1) / MOST_ROWS, next = all == 2 && ASKS_NEXT, stride = 2 * block / in / (1 + next);
        for (long b = first; b < last; b++) {
            const char *w = (const char *)m->w + b * block;
            for (long r = top, groups = all, n; groups > 0; groups--, r += n) {
                n = (bottom - r + groups - 1) / groups; /* as equal as can be */
                const char *ask = next ? w + block + (all - groups) * block / 2 : w + AHEAD;
                some[n - 1](x.rows + r * bytes_of_row(m), x.scale + r, x.sums + r * (in / GROUP), w, y + r * out + (b - first) * LANES, in,
                            out, ask, stride);
            }
        }
    }
}

static void keep_product(const matrix *m, float *y, const float *own, long rows, long first, long last) {
    long n = (last - first) * LANES;
    for (long r = 0; r < rows; r++) memcpy(y + r * m->out + first * LANES, own + r * n, n * sizeof(float));
}

static long rows_in_tasks(long rows, long *least, long *most) {
    *least = 1 + rows / (MOST_TASKS / 2), *most = *least > ROWS_IN_TASK ? *least : ROWS_IN_TASK;
    return rows;
}

/* ---- a product ---- */

typedef struct {
    matrix m;
    const float *x;
    float *y;
    inputs in;
    long rows;
} product;

static long product_items(const job *j, long phase, long *least, long *most) {
    const product *p = (const product *)j->copied;
    if (phase == 1) return blocks(&p->m, p->rows, least, most);
    return reads_floats(&p->m) ? 0 : rows_in_tasks(p->rows, least, most);
}

static void product_work(const job *j, long phase, long first, long last, float *own) {
    const product *p = (const product *)j->copied;
    if (phase == 1) multiply(&p->m, p->in, own, p->rows, first, last);
    else
        for (long r = first; r < last; r++) form_row(&p->m, p->x + r * p->m.in, own + (r - first) * form_of(&p->m));
}

static void product_keep(const job *j, long phase, long first, long last, const float *own) {
    const product *p = (const product *)j->copied;
    if (phase == 1) keep_product(&p->m, p->y, own, p->rows, first, last);
    else
        for (long r = first; r < last; r++) keep_row(&p->m, p->in, r, own + (r - first) * form_of(&p->m));
}

static long product_memory(const matrix *m, long rows) {
    long least, most;
    rows_in_tasks(rows, &least, &most);
    return largest(outputs_in_task(m, rows), most * form_of(m));
}

/* y = x . w^T. scratch: `form_of` numbers for each row. Returns as `run` does. */
int eyas_product(const float *x, const matrix *m, float *y, long rows, float *scratch, int threads) {
    product p = {*m, x, y, inputs_at(m, scratch, rows), rows};
    if (reads_floats(m)) p.in.rows = (char *)x;
    job j = {2, threads, product_memory(m, rows), product_items, product_work, product_keep};
    memcpy(j.copied, &p, sizeof p);
    return run(&j);
}

/* ---- attention ---- */

/* Numbers of a row are taken by eights; of the last ones, where the row is no multiple of 8, some are there and the others count as 0. */
static inline __m256i lanes(long n) {
    static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(mask + 8 - n));
}

static inline __m256 load_float32(const float *p) { return _mm256_loadu_ps(p); }
static inline __m256 load_bfloat16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline __m256 some_float32(const float *p, long n) { return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lanes(n)); }
static inline __m256 some_bfloat16(const uint16_t *p, long n) {
    if (n >= 8) return load_bfloat16(p);
    uint16_t part[8] = {0};
    memcpy(part, p, n * sizeof *p);
    return load_bfloat16(part);
}

static inline void store_float32(float *p, __m256 v, long n) {
    if (n >= 8) _mm256_storeu_ps(p, v);
    else _mm256_maskstore_ps(p, lanes(n), v);
}
static inline void store_bfloat16(uint16_t *p, __m256 v, long n) { /* to the nearest, ties to even */
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    uint16_t part[8];
    _mm_storeu_si128((__m128i *)(n >= 8 ? p : part), _mm256_castsi256_si128(bits));
    if (n < 8) memcpy(p, part, n * sizeof *p);
}

static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

typedef struct {
    long rows, views, heads, kv_heads, width; /* width of a head */
    long stride;                              /* numbers from one row of q, k and v to the next; a row is q heads, then k heads, then v heads */
    long capacity;                            /* rows of a slot in the cache, which is [slots, kv_heads, capacity, width] */
    const int64_t *home, *place;              /* [rows] slot and index where a row's key and value go; slot -1: they go nowhere */
    /* A view is a row's sight of one slot. Where keys are not sharded, each row has one. */
    const int64_t *source, *slot, *prefix; /* [views] the row (NULL: view r is row r's); the slot; how many of its first rows it sees */
    const int64_t *start, *other;          /* [views + 1] and the places behind the prefix that it sees, ascending */
    /* Where keys are sharded, a view sees one shard's rows of a slot, which lie in blocks: row t in block t >> shift, of 1 << shift rows. */
    const int64_t *shard, *base;  /* [views] the shard; where its first block begins */
    const int64_t *first;         /* [rows + 1] where a row's views begin, which ascend by shard */
    long shards, shift, apart;    /* of all keys, a power of two, or 0: keys are not sharded; from one block of a shard to its next */
} plan;

/* How far behind a view's base its row t lies. Without shards all rows are one block. */
static inline long placed(const plan *p, long t) { return (t >> p->shift) * p->apart + (t & ((1L << p->shift) - 1)); }

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

/* The sum of the exponentials of count numbers, padded in place to a multiple of 8, less the largest, which becomes *peak. shares: where
 * these exponentials go, which may be where the numbers are; NULL: nowhere. */
static inline float exponentials(float *score, float *shares, long count, float *peak) {
    __m256 most = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps();
    for (long i = count; i & 7; i++) score[i] = -INFINITY;
    for (long i = 0; i < count; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(score + i));
    float lane[8];
    _mm256_storeu_ps(lane, most);
    *peak = -INFINITY;
    for (int i = 0; i < 8; i++) *peak = lane[i] > *peak ? lane[i] : *peak;
    for (long i = 0; i < count; i += 8) {
        __m256 raw = _mm256_loadu_ps(score + i);
        __m256 share = exponential(_mm256_sub_ps(raw, _mm256_set1_ps(*peak)));
        share = _mm256_andnot_ps(_mm256_cmp_ps(raw, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ), share);
        if (shares) _mm256_storeu_ps(shares + i, share);
        sum = _mm256_add_ps(sum, share);
    }
    return total(sum);
}

/* Scores to shares in place, over count numbers padded to a multiple of 8; returns the log of the sum of their exponentials. */
static inline float soften(float *score, long count) {
    float peak, whole = exponentials(score, score, count, &peak);
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
#ifdef __AVX512VL__ /* 32 registers: sums of that many eights of a value row for each query */
#define EIGHTS 8
#else
#define EIGHTS 4
#endif

/* n query heads of view r from head g on: outputs `apart` numbers from each other, their lse at lse,
 * `lse_apart` from each other. scratch: the queries [n][padded width], then their scores [n][room]. */
#define HEADS(TYPE, NAME)                                                                                                            \
    static inline __attribute__((always_inline)) void heads_##NAME(const plan *p, const float *q, const TYPE *keys, const TYPE *values,\
                                                                   float *out, long apart, float *lse, long lse_apart, long r, long g,\
                                                                   int n, float *scratch) {                                          \
        long d = p->width, whole = d / 8 * 8, wide = (d + 7) / 8 * 8;                                                                \
        long prefix = p->prefix[r], count = prefix + p->start[r + 1] - p->start[r], room = (count + 11) / 8 * 8;                     \
        const int64_t *other = p->other + p->start[r];                                                                               \
        const float *row = q + (p->source ? p->source[r] : r) * p->stride;                                                           \
        long slot = (p->slot[r] * p->kv_heads + g / (p->heads / p->kv_heads)) * p->capacity, base = slot + (p->base ? p->base[r] : 0);\
        float *query = scratch, *score = scratch + n * wide;                                                                         \
        const __m256 scale = _mm256_set1_ps(1.0f / sqrtf((float)d));                                                                 \
        for (int m = 0; m < n; m++)                                                                                                  \
            for (long c = 0; c < d; c += 8)                                                                                          \
                _mm256_storeu_ps(query + m * wide + c,                                                                               \
                                 _mm256_mul_ps(some_float32(row + (g + m) * d + c, d - c), scale));                                  \
        for (long t = 0; t < count; t += 4) {                                                                                        \
            const TYPE *key[4];                                                                                                      \
            __m256 sum[QUERIES][4];                                                                                                  \
            for (long i = 0; i < 4; i++) {                                                                                           \
                long at = t + i < count ? t + i : count - 1;                                                                         \
                key[i] = keys + (at < prefix ? base + placed(p, at) : slot + other[at - prefix]) * d;                                \
            }                                                                                                                        \
            ALL for (int m = 0; m < n; m++) ALL for (int i = 0; i < 4; i++) sum[m][i] = _mm256_setzero_ps();                         \
            for (long c = 0; c < whole; c += 8)                                                                                      \
                ALL for (int i = 0; i < 4; i++) {                                                                                    \
                    __m256 k = load_##NAME(key[i] + c);                                                                              \
                    ALL for (int m = 0; m < n; m++) sum[m][i] = _mm256_fmadd_ps(_mm256_loadu_ps(query + m * wide + c), k, sum[m][i]);\
                }                                                                                                                    \
            if (whole < d)                                                                                                           \
                ALL for (int i = 0; i < 4; i++) {                                                                                    \
                    __m256 k = some_##NAME(key[i] + whole, d - whole);                                                               \
                    ALL for (int m = 0; m < n; m++)                                                                                  \
                        sum[m][i] = _mm256_fmadd_ps(_mm256_loadu_ps(query + m * wide + whole), k, sum[m][i]);                        \
                }                                                                                                                    \
            ALL for (int m = 0; m < n; m++)                                                                                          \
                _mm_storeu_ps(score + m * room + t, totals(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));                             \
        }                                                                                                                            \
        for (int m = 0; m < n; m++) lse[m * lse_apart] = soften(score + m * room, count);                                            \
        for (long c = 0; c < d; c += 8 * EIGHTS) {                                                                                   \
            __m256 sum[QUERIES][EIGHTS];                                                                                             \
            long parts = (d - c < 8 * EIGHTS ? d - c + 7 : 8 * EIGHTS) / 8;                                                          \
            ALL for (int m = 0; m < n; m++) ALL for (int i = 0; i < EIGHTS; i++) sum[m][i] = _mm256_setzero_ps();                    \
            if (d - c >= 8 * EIGHTS)                                                                                                 \
                for (long t = 0; t < count; t++) {                                                                                   \
                    const TYPE *value = values + (t < prefix ? base + placed(p, t) : slot + other[t - prefix]) * d + c;              \
                    ALL for (int i = 0; i < EIGHTS; i++) {                                                                           \
                        __m256 v = load_##NAME(value + 8 * i);                                                                       \
                        ALL for (int m = 0; m < n; m++) sum[m][i] = _mm256_fmadd_ps(_mm256_set1_ps(score[m * room + t]), v, sum[m][i]);\
                    }                                                                                                                \
                }                                                                                                                    \
            else                                                                                                                     \
                for (long t = 0; t < count; t++) {                                                                                   \
                    const TYPE *value = values + (t < prefix ? base + placed(p, t) : slot + other[t - prefix]) * d + c;              \
                    for (long i = 0; i < parts; i++) {                                                                               \
                        __m256 v = some_##NAME(value + 8 * i, d - c - 8 * i);                                                        \
                        ALL for (int m = 0; m < n; m++) sum[m][i] = _mm256_fmadd_ps(_mm256_set1_ps(score[m * room + t]), v, sum[m][i]);\
                    }                                                                                                                \
                }                                                                                                                    \
            for (int m = 0; m < n; m++)                                                                                              \
                for (long i = 0; i < parts; i++) store_float32(out + m * apart + c + 8 * i, sum[m][i], d - c - 8 * i);               \
        }                                                                                                                            \
    }                                                                                                                                \
    /* All query heads of view r that share key head h; as above. */                                                                 \
    static void group_##NAME(const plan *p, const float *q, const TYPE *keys, const TYPE *values, float *out, long apart, float *lse,\
                             long lse_apart, long r, long h, float *scratch) {                                                       \
        long group = p->heads / p->kv_heads, g = h * group, end = g + group;                                                         \
        for (long n; g < end; g += n, out += n * apart, lse += n * lse_apart) {                                                      \
            n = end - g < 3 ? end - g : 3;                                                                                           \
            if (n == 3) heads_##NAME(p, q, keys, values, out, apart, lse, lse_apart, r, g, 3, scratch);                              \
            else if (n == 2) heads_##NAME(p, q, keys, values, out, apart, lse, lse_apart, r, g, 2, scratch);                         \
            else heads_##NAME(p, q, keys, values, out, apart, lse, lse_apart, r, g, 1, scratch);                                     \
        }                                                                                                                            \
    }

/* Keys and values of one row to its places in the cache, and items of attention: an item is a view and one of its key heads, out [items]
 * [query heads of a key head][width] and their lse [items][query heads]; scratch as above. q, k and v lie side by side in a row. */
#define ATTEND(TYPE, NAME)                                                                                                           \
    HEADS(TYPE, NAME)                                                                                                                \
    static void remember_##NAME(const plan *p, const float *row, TYPE *keys, TYPE *values, long r) {                                 \
        long d = p->width;                                                                                                           \
        const float *k = row + p->heads * d, *v = k + p->kv_heads * d;                                                               \
        for (long h = 0; p->home[r] >= 0 && h < p->kv_heads; h++) {                                                                  \
            long at = ((p->home[r] * p->kv_heads + h) * p->capacity + p->place[r]) * d;                                                \
            for (long c = 0; c < d; c += 8) {                                                                                        \
                store_##NAME(keys + at + c, some_float32(k + h * d + c, d - c), d - c);                                                \
                store_##NAME(values + at + c, some_float32(v + h * d + c, d - c), d - c);                                              \
            }                                                                                                                        \
        }                                                                                                                            \
    }                                                                                                                                \
    static void attend_##NAME(const plan *p, const float *q, const TYPE *keys, const TYPE *values, float *out, float *lse, long first,\
                              long last, float *scratch) {                                                                           \
        long group = p->heads / p->kv_heads;                                                                                         \
        for (long item = first; item < last; item++, out += group * p->width, lse += group)                                          \
            group_##NAME(p, q, keys, values, out, p->width, lse, 1,       item / p->kv_heads, item % p->kv_heads, scratch);          \
    }

ATTEND(float, float32)
ATTEND(uint16_t, bfloat16)

/* The cache's number format, and the few functions that know it. */
typedef struct {
    void *keys, *values;
    int wide; /* float32; else bfloat16 */
} slab;

static void remember(const plan *p, const float *row, slab at, long r) {
    if (at.wide) remember_float32(p, row, at.keys, at.values, r);
    else remember_bfloat16(p, row, at.keys, at.values, r);
}

static void attend(const plan *p, const float *q, slab at, float *out, float *lse, long first, long last, float *scratch) {
    if (at.wide) attend_float32(p, q, at.keys, at.values, out, lse, first, last, scratch);
    else attend_bfloat16(p, q, at.keys, at.values, out, lse, first, last, scratch);
}

/* States of the query heads of view r that share key head h. */
static void attend_group(const plan *p, const float *q, slab at, float *state, long r, long h, float *scratch) {
    long d = p->width;
    if (at.wide) group_float32(p, q, at.keys, at.values, state, d + 1, state + d, d + 1, r, h, scratch);
    else group_bfloat16(p, q, at.keys, at.values, state, d + 1, state + d, d + 1, r, h, scratch);
}

static long attention_items(const plan *p, long *least, long *most) {
    long items = p->views * p->kv_heads;
    *least = 1 + items / (MOST_TASKS / 2), *most = largest(*least, 16);
    return items;
}

/* Numbers for queries and scores of the view that sees most. */
static long scratch_of(const plan *p) {
    long most = 0;
    for (long r = 0; r < p->views; r++) most = largest(most, p->prefix[r] + p->start[r + 1] - p->start[r]);
    return QUERIES * (p->width + most + 24);
}

/* Numbers that a task of attention needs: what it puts out, its lse, and scratch. */
static long attention_memory(const plan *p) {
    long least, items;
    attention_items(p, &least, &items);
    return items * (p->heads / p->kv_heads) * (p->width + 1) + scratch_of(p);
}

static void attention_work(const plan *p, const float *q, slab at, long first, long last, float *own) {
    long heads = (last - first) * (p->heads / p->kv_heads);
    attend(p, q, at, own, own + heads * p->width, first, last, own + heads * (p->width + 1));
}

/* out [views, heads, width]; lse [views, heads] may be NULL */
static void keep_attention(const plan *p, float *out, float *lse, long first, long last, const float *own) {
    long group = p->heads / p->kv_heads, heads = (last - first) * group;
    memcpy(out + first * group * p->width, own, heads * p->width * sizeof(float));
    if (lse) memcpy(lse + first * group, own + heads * p->width, heads * sizeof(float));
}

/* ---- what views of shards make together ----
 *
 * Attention over some keys leaves its output and the log of the sum of its scores' exponentials. Two such states over different keys become
 * the state over all of them. States meet along one binary tree over the shards, whoever holds them; nothing meets what saw no key. */

/* a [d + 1], the log last, becomes the state over a's keys and b's. */
static void meet(float *a, const float *b, long d) {
    float most = a[d] > b[d] ? a[d] : b[d];
    if (b[d] == -INFINITY) return;
    if (a[d] == -INFINITY) {
        memcpy(a, b, (d + 1) * sizeof(float));
        return;
    }
    float ea = a[d] < most ? expf(a[d] - most) : 1, eb = b[d] < most ? expf(b[d] - most) : 1, sum = ea + eb, wa = ea / sum, wb = eb / sum;
    for (long c = 0; c < d; c++) a[c] = wa * a[c] + wb * b[c];
    a[d] = most + logf(sum);
}

/* States of one head: `count` of them, of ascending shards. Numbers from one state's output, and from one's log, to the next's. */
typedef struct {
    const float *out, *lse;
    long out_apart, lse_apart;
    const int64_t *shard;
} states;

/* into [d + 1]: the state over shards [low, low + size), from states [first, last), which lie there. behind: as many numbers for each level
 * of the tree. */
static void join(states s, long first, long last, long low, long size, float *into, float *behind, long d) {
    if (last - first < 2) {
        for (long c = 0; c < d; c++) into[c] = first < last ? s.out[first * s.out_apart + c] : 0;
        into[d] = first < last ? s.lse[first * s.lse_apart] : -INFINITY;
        return;
    }
    long half = first;
    while (half < last && s.shard[half] < low + size / 2) half++;
    join(s, first, half, low, size / 2, into, behind, d);
    if (half == last) return;
    if (half == first) {
        join(s, half, last, low + size / 2, size / 2, into, behind, d);
        return;
    }
    join(s, half, last, low + size / 2, size / 2, behind, behind + d + 1, d);
    meet(into, behind, d);
}

#define LEVELS 24     /* of a tree over shards, at most */
#define MOST_BLOCK 16 /* rows that look at a shard one after the other */

/* Where states are while layers run over sharded keys. */
typedef struct {
    long pieces;                       /* of the tree over shards, ascending: a task looks at the keys of one */
    const int64_t *piece, *piece_size; /* [pieces] its first shard, and how many */
    const int64_t *order;              /* [pieces] the order in which tasks take them: that of their keys in memory */
    long block;                        /* rows that a task has, at most MOST_BLOCK */
    float *states;                     /* [pieces, rows, heads, width + 1] what attention leaves */
    long own;                          /* subtrees that this process has whole, and hands to the others; 0: it has all */
    const int64_t *low, *size;
    float *sent; /* [own, rows, heads, width + 1]; the same as `states` where these subtrees are the pieces */
    long others; /* subtrees of all processes, ascending */
    const int64_t *shard;
    const float *received; /* [others, rows, heads, width + 1] */
} meeting;

/* ---- attention over the shards of a piece ----
 *
 * An item is a piece, a key head and a block of rows. Its shards come one after the other, each with all rows of the block, which find its
 * keys in a near cache. A row's states of shards meet as soon as their place in the tree is known, so few are kept: as a count in binary
 * keeps few digits. */

static long row_blocks(const plan *p, const meeting *m) { return (p->rows + m->block - 1) / m->block; }

static long piece_items(const plan *p, const meeting *m, long *least, long *most) {
    long items = m->pieces * p->kv_heads * row_blocks(p, m);
    *least = 1 + items / (MOST_TASKS / 2), *most = largest(*least, MOST_BLOCK / (p->rows < m->block ? p->rows : m->block));
    return items;
}

static long states_of_item(const plan *p, const meeting *m) { return m->block * (p->heads / p->kv_heads) * (p->width + 1); }

static long levels_of(const meeting *m) {
    long most = 1, levels = 2; /* a piece of one shard has one state, and each doubling one more that waits */
    for (long k = 0; k < m->pieces; k++) most = largest(most, m->piece_size[k]);
    for (; most > 1; most /= 2) levels++;
    return levels;
}

static long piece_memory(const plan *p, const meeting *m) {
    long least, most;
    piece_items(p, m, &least, &most);
    return states_of_item(p, m) * (most + levels_of(m)) + scratch_of(p);
}

/* How high in the tree two shards first meet. */
static int height(long a, long b) { return 64 - __builtin_clzl((unsigned long)(a ^ b)); }

/* The two upper states of a row's pile [waiting][group][d + 1] become one. */
static void meet_upper(float *pile, long waiting, long group, long d) {
    float *upper = pile + (waiting - 2) * group * (d + 1);
    for (long g = 0; g < group; g++) meet(upper + g * (d + 1), upper + (group + g) * (d + 1), d);
}

/* own: the states that the items leave, then piles of waiting ones, then scratch. */
static void piece_work(const plan *p, const meeting *m, const float *q, slab at, long first, long last, float *own) {
    long d = p->width, group = p->heads / p->kv_heads, state = group * (d + 1), blocks = row_blocks(p, m), levels = levels_of(m);
    float *piles = own + (last - first) * states_of_item(p, m), *scratch = piles + levels * states_of_item(p, m);
    for (long item = first; item < last; item++, own += states_of_item(p, m)) {
        long h = item / blocks / m->pieces, k = m->order[item / blocks % m->pieces], from = item % blocks * m->block;
        long rows = p->rows - from < m->block ? p->rows - from : m->block, low = m->piece[k], high = low + m->piece_size[k];
        long view[MOST_BLOCK], end[MOST_BLOCK], waiting[MOST_BLOCK] = {0}, waits[MOST_BLOCK][LEVELS];
        for (long r = 0; r < rows; r++) {
            view[r] = p->first[from + r], end[r] = p->first[from + r + 1];
            while (view[r] < end[r] && p->shard[view[r]] < low) view[r]++;
            while (end[r] > view[r] && p->shard[end[r] - 1] >= high) end[r]--;
        }
        for (;;) {
            long shard = high;
            for (long r = 0; r < rows; r++)
                if (view[r] < end[r] && p->shard[view[r]] < shard) shard = p->shard[view[r]];
            if (shard == high) break;
            for (long r = 0; r < rows; r++) {
                if (view[r] == end[r] || p->shard[view[r]] != shard) continue;
                float *pile = piles + r * levels * state;
                long *w = waits[r];
                while (waiting[r] > 1 && height(w[waiting[r] - 2], w[waiting[r] - 1]) < height(w[waiting[r] - 1], shard))
                    meet_upper(pile, waiting[r]--, group, d);
                attend_group(p, q, at, pile + waiting[r] * state, view[r]++, h, scratch);
                w[waiting[r]++] = shard;
            }
        }
        for (long r = 0; r < rows; r++) {
            float *pile = piles + r * levels * state, *left = own + r * state;
            while (waiting[r] > 1) meet_upper(pile, waiting[r]--, group, d);
            memcpy(left, pile, state * sizeof(float));
            for (long g = 0; !waiting[r] && g < group; g++) { /* it saw no key */
                memset(left + g * (d + 1), 0, d * sizeof(float));
                left[g * (d + 1) + d] = -INFINITY;
            }
        }
    }
}

static void keep_piece(const plan *p, const meeting *m, long first, long last, const float *own) {
    long group = p->heads / p->kv_heads, state = p->width + 1, blocks = row_blocks(p, m);
    for (long item = first; item < last; item++, own += states_of_item(p, m)) {
        long h = item / blocks / m->pieces, k = m->order[item / blocks % m->pieces], from = item % blocks * m->block;
        for (long r = from; r < p->rows && r < from + m->block; r++)
            memcpy(m->states + ((k * p->rows + r) * p->heads + h * group) * state, own + (r - from) * group * state,
                   group * state * sizeof(float));
    }
}

/* Items [first, last) are heads of rows. own: for each item a state for each subtree (or one, the whole), and what `join` needs behind. */
static void join_work(const plan *p, const meeting *m, long first, long last, float *own) {
    long d = p->width, kept = m->own ? m->own : 1, apart = p->rows * p->heads * (d + 1);
    float *behind = own + (last - first) * kept * (d + 1);
    for (long item = first; item < last; item++) {
        states s = {m->states + item * (d + 1), m->states + item * (d + 1) + d, apart, apart, m->piece};
        for (long k = 0, from = 0, to = 0; k < kept; k++, own += d + 1, from = to) {
            long low = m->own ? m->low[k] : 0, size = m->own ? m->size[k] : p->shards;
            while (to < m->pieces && m->piece[to] < low + size) to++;
            join(s, from, to, low, size, own, behind, d);
        }
    }
}

/* As `join_work`, from the received states to the whole. */
static void meet_work(const plan *p, const meeting *m, long first, long last, float *own) {
    meeting whole = {.pieces = m->others, .piece = m->shard, .states = (float *)m->received};
    join_work(p, &whole, first, last, own);
}

static void keep_whole(const plan *p, float *mixed, long first, long last, const float *own) {
    for (long item = first; item < last; item++, own += p->width + 1) memcpy(mixed + item * p->width, own, p->width * sizeof(float));
}

static void keep_sent(const plan *p, const meeting *m, long first, long last, const float *own) {
    long state = p->width + 1;
    for (long item = first; item < last; item++)
        for (long k = 0; k < m->own; k++, own += state)
            memcpy(m->sent + (k * p->rows * p->heads + item) * state, own, state * sizeof(float));
}

static long heads_in_tasks(const plan *p, long *least, long *most) {
    long items = p->rows * p->heads;
    *least = 1 + items / (MOST_TASKS / 2), *most = largest(*least, 16);
    return items;
}

static long join_memory(const plan *p, const meeting *m) {
    long least, most;
    heads_in_tasks(p, &least, &most);
    return (most * largest(1, m->own) + LEVELS) * (p->width + 1);
}

typedef struct {
    plan p;
    meeting m;
} joining;

static long joining_of(const job *j, long phase, long *least, long *most) {
    (void)phase;
    return heads_in_tasks(&((const joining *)j->copied)->p, least, most);
}

static void joining_part(const job *j, long phase, long first, long last, float *own) {
    const joining *a = (const joining *)j->copied;
    (void)phase;
    join_work(&a->p, &a->m, first, last, own);
}

static void joining_keep(const job *j, long phase, long first, long last, const float *own) {
    const joining *a = (const joining *)j->copied;
    (void)phase;
    keep_sent(&a->p, &a->m, first, last, own);
}

/* Joins the states of pieces to those of the subtrees m->low, m->size: m->sent. Returns as `run` does. */
int eyas_join(const plan *p, const meeting *m, int threads) {
    joining a = {*p, *m};
    job j = {1, threads, join_memory(p, m), joining_of, joining_part, joining_keep};
    memcpy(j.copied, &a, sizeof a);
    return run(&j);
}

typedef struct {
    plan p;
    const float *q;
    slab at;
    float *out, *lse;
    meeting m; /* of sharded keys, whose states are left instead */
} attention;

static long attention_of(const job *j, long phase, long *least, long *most) {
    const attention *a = (const attention *)j->copied;
    if (!phase) return rows_in_tasks(a->p.rows, least, most);
    if (!a->m.pieces) return attention_items(&a->p, least, most);
    return phase == 1 ? piece_items(&a->p, &a->m, least, most) : a->m.sent == a->m.states ? 0 : heads_in_tasks(&a->p, least, most);
}

static void attention_part(const job *j, long phase, long first, long last, float *own) {
    const attention *a = (const attention *)j->copied;
    if (phase == 1 && a->m.pieces) piece_work(&a->p, &a->m, a->q, a->at, first, last, own);
    else if (phase == 1) attention_work(&a->p, a->q, a->at, first, last, own);
    else if (phase) join_work(&a->p, &a->m, first, last, own);
}

static void attention_keep(const job *j, long phase, long first, long last, const float *own) {
    const attention *a = (const attention *)j->copied;
    for (long r = first; !phase && r < last; r++) remember(&a->p, a->q + r * a->p.stride, a->at, r);
    if (phase == 1 && a->m.pieces) keep_piece(&a->p, &a->m, first, last, own);
    else if (phase == 1) keep_attention(&a->p, a->out, a->lse, first, last, own);
    else if (phase) keep_sent(&a->p, &a->m, first, last, own);
}

/* Writes keys and values of the rows to their places, then attends; lse may be NULL. With m, what is left are states: m->sent, and neither
 * out nor lse. Returns as `run` does. */
int eyas_attention(const plan *p, const float *q, void *keys, void *values, int wide, float *out, float *lse, const meeting *m, int threads) {
    attention a = {*p, q, {keys, values, wide}, out, lse, {0}};
    if (m) a.m = *m;
    long memory = m ? largest(piece_memory(p, m), join_memory(p, m)) : attention_memory(p);
    job j = {m ? 3 : 2, threads, memory, attention_of, attention_part, attention_keep};
    memcpy(j.copied, &a, sizeof a);
    return run(&j);
}

/* ---- whole layers ---- */

typedef struct {
    long width, inner; /* of the residual stream, of the MLP */
    float epsilon;
    const float *norm, *mlp_norm, *beside_norm; /* [width] each; norm NULL: q, k, v read x itself; beside_norm NULL: nothing comes beside x */
    const float *q_norm, *k_norm;               /* [head width], of each head of queries and keys; NULL: none */
    const float *qkv_bias, *o_bias;             /* NULL: none */
    matrix qkv, o, gate_up, down;
} layer;

/* What lies around the layers of a draft's step: what its rows are made from, and behind the last layer a norm, the head, and the best
 * children of each row. */
typedef struct {
    const void *table;       /* [.., width]: what comes beside x is its rows of these tokens; NULL: that is given */
    const float *origin;     /* x is its rows `parent`; NULL: x is given */
    const int64_t *token, *parent, *position; /* [rows]; position: which rows of cos and sin are theirs; NULL: theirs are given, in order */
    const float *norm;       /* [width], before the head */
    matrix head;
    long wide, names;        /* the table is float32, else bfloat16; how many of the head's outputs count: the last block is filled up */
    long asked, best;        /* how many rows the head reads; how many children of each are wanted */
    const int64_t *row;      /* [asked] which rows these are */
    const float *heat;       /* [asked] the temperature; 0: the logits are taken as they are */
    const float *const *noise; /* [asked] to be added at a temperature, [names]; NULL: none */
    float *scores, *whole, *value; /* [asked, outputs of the head]: log q + noise, or logits; [asked]: the log of the sum of their
                                    * exponentials; [asked, best]: the best, less that */
    int64_t *id;             /* [asked, best] */
} around;

/* y = x / sqrt(mean x^2 + epsilon) * weight, one row, which may be y itself; x itself where weight is NULL */
static void norm_row(const float *x, const float *weight, float *y, long width, float epsilon) {
    if (!weight) {
        memcpy(y, x, width * sizeof(float));
        return;
    }
    __m256 squares = _mm256_setzero_ps();
    for (long c = 0; c < width; c += 8) {
        __m256 v = some_float32(x + c, width - c);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    __m256 scale = _mm256_set1_ps(1.0f / sqrtf(total(squares) / (float)width + epsilon));
    for (long c = 0; c < width; c += 8) {
        __m256 v = _mm256_mul_ps(_mm256_mul_ps(some_float32(x + c, width - c), scale), some_float32(weight + c, width - c));
        store_float32(y + c, v, width - c);
    }
}

void eyas_norm(const float *x, const float *weight, float *y, long rows, long width, float epsilon) {
    for (long r = 0; r < rows; r++) norm_row(x + r * width, weight, y + r * width, width, epsilon);
}

/* Heads of one row turned by their position: the first `turned` numbers of each, in halves, as Hugging Face's Llama. cos and sin [turned]. */
static void rotate_row(float *x, long heads, long d, long turned, const float *cos, const float *sin) {
    for (long h = 0; h < heads; h++, x += d)
        for (long c = 0; c < turned / 2; c++) {
            float low = x[c], high = x[c + turned / 2];
            x[c] = low * cos[c] - high * sin[c];
            x[c + turned / 2] = high * cos[c + turned / 2] + low * sin[c + turned / 2];
        }
}

/* silu(gate) * up, one row: x / (1 + e^-x), with e^-|x| so that nothing overflows */
static void gate_row(const float *gate, const float *up, float *y, long inner) {
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (long c = 0; c < inner; c += 8) {
        __m256 x = some_float32(gate + c, inner - c), small = exponential(_mm256_or_ps(x, sign));
        __m256 above = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ);
        __m256 share = _mm256_div_ps(_mm256_blendv_ps(small, one, above), _mm256_add_ps(one, small));
        store_float32(y + c, _mm256_mul_ps(_mm256_mul_ps(x, share), some_float32(up + c, inner - c)), inner - c);
    }
}

/* y = x + (change + bias), one row; bias may be NULL, and so may change: x itself */
static void add_row(float *y, const float *x, const float *change, const float *bias, long width) {
    if (!change) memcpy(y, x, width * sizeof(float));
    else if (!bias)
        for (long c = 0; c < width; c++) y[c] = x[c] + change[c];
    else
        for (long c = 0; c < width; c++) y[c] = x[c] + (change[c] + bias[c]);
}

/* numbers[names] + noise at a temperature: log q + noise, where q is their softmax; in place */
static void heat_row(float *number, float heat, const float *noise, long names) {
    float peak, whole;
    for (long c = 0; c < names; c++) number[c] /= heat;
    whole = logf(exponentials(number, NULL, names, &peak)) + peak;
    for (long c = 0; c < names; c++) number[c] = number[c] - whole + (noise ? noise[c] : 0.0f);
}

/* The best of number[names], padded to a multiple of 8 with -infinity: their places, best first; of equals the lower place first. */
static void best_of(const float *number, long names, long best, float *value, int32_t *place) {
    for (long i = 0; i < best; i++) value[i] = -INFINITY, place[i] = 0;
    for (long c = 0; c < names; c += 8) {
        __m256 above = _mm256_cmp_ps(_mm256_loadu_ps(number + c), _mm256_set1_ps(value[best - 1]), _CMP_GT_OQ);
        for (int left = _mm256_movemask_ps(above); left; left &= left - 1) {
            long at = c + __builtin_ctz((unsigned)left), to = best - 1;
            float one = number[at];
            if (!(one > value[to])) continue;
            for (; to > 0 && one > value[to - 1]; to--) value[to] = value[to - 1], place[to] = place[to - 1];
            value[to] = one, place[to] = (int32_t)at;
        }
    }
}

/* The phases of a layer. Each reads what the ones before it kept. */
enum { ENTER, QKV, TURN, LOOK, JOIN, MEET, MIXED, OUT, MIDDLE, GATE_UP, GATED, DOWN, PHASES }; /* LOOK: attention */
enum { LEAVE, NORM, HEAD, BEST, LAST }; /* behind the last layer: what it adds; of a draft's step alone, the others */

typedef struct {
    plan p;
    const layer *layers;
    long count, wide, apart, tapped, turned; /* wide: the cache is float32; apart: bytes from a layer's keys to the next one's */
    float *x;
    const float *beside, *cos, *sin;
    char *keys, *values;
    const long *taps;
    float *features, *qkv, *mixed, *gate_up, *back, *form;
    long begin; /* the job's first phase, counted from the first layer's first */
    meeting m;  /* of sharded keys */
    const around *a; /* of a draft's step; else NULL */
} pass;

static long inputs_of(const layer *l) { return l->beside_norm ? 2 * l->width : l->width; }

static slab slab_of(const pass *s, long number) {
    return (slab){s->keys + number * s->apart, s->values + number * s->apart, (int)s->wide};
}

static const matrix *matrix_of(const layer *l, long step) {
    return step <= QKV ? &l->qkv : step <= OUT ? &l->o : step <= GATE_UP ? &l->gate_up : &l->down;
}

static inputs inputs_in(const pass *s, const matrix *m, long step) {
    inputs in = inputs_at(m, s->form, s->p.rows);
    if (step == OUT && reads_floats(m)) in.rows = (char *)s->mixed; /* as attention left them */
    return in;
}

static float *outputs_of(const pass *s, long step) { return step == QKV ? s->qkv : step == GATE_UP ? s->gate_up : s->back; }

/* ---- behind the last layer ---- */

/* A row's scores, the log of the sum of their exponentials, its best and their places */
static long best_memory(const around *a) { return a->head.out + 1 + 2 * a->best; }

static long end_row_memory(const pass *s, long step) {
    return step == LEAVE ? s->layers->width : step == NORM ? form_of(&s->a->head) + s->layers->width : best_memory(s->a);
}

static long end_items(const pass *s, long step, long *least, long *most) {
    if (step == HEAD) return blocks(&s->a->head, s->a->asked, least, most);
    return rows_in_tasks(step == LEAVE ? s->p.rows : s->a->asked, least, most);
}

static void end_row(const pass *s, long step, long r, float *own) {
    const layer *last = s->layers + s->count - 1;
    const around *a = s->a;
    long width = last->width;
    if (step == LEAVE) add_row(own, s->x + r * width, s->back + r * last->down.out, NULL, width);
    else if (step == NORM) {
        float *made = own + form_of(&a->head);
        norm_row(s->x + a->row[r] * width, a->norm, made, width, last->epsilon);
        form_row(&a->head, made, own);
    } else {
        float peak, *whole = own + a->head.out, *value = whole + 1;
        memcpy(own, a->scores + r * a->head.out, a->head.out * sizeof(float));
        for (long c = a->names; c < a->head.out; c++) own[c] = -INFINITY;
        if (a->heat[r] > 0) heat_row(own, a->heat[r], a->noise[r], a->names);
        *whole = logf(exponentials(own, NULL, a->names, &peak)) + peak;
        best_of(own, a->names, a->best, value, (int32_t *)(value + a->best));
        for (long i = 0; i < a->best; i++) value[i] -= *whole;
    }
}

static void end_work(const pass *s, long step, long first, long last, float *own) {
    if (step == HEAD) multiply(&s->a->head, inputs_at(&s->a->head, s->form, s->a->asked), own, s->a->asked, first, last);
    else
        for (long r = first; r < last; r++) end_row(s, step, r, own + (r - first) * end_row_memory(s, step));
}

static void end_keep(const pass *s, long step, long first, long last, const float *own) {
    const around *a = s->a;
    long width = s->layers->width;
    if (step == LEAVE) memcpy(s->x + first * width, own, (last - first) * width * sizeof(float));
    else if (step == HEAD) keep_product(&a->head, a->scores, own, a->asked, first, last);
    else
        for (long r = first; r < last; r++, own += end_row_memory(s, step)) {
            if (step == NORM) {
                keep_row(&a->head, inputs_at(&a->head, s->form, a->asked), r, own);
                continue;
            }
            const float *value = own + a->head.out + 1;
            const int32_t *place = (const int32_t *)(value + a->best);
            memcpy(a->scores + r * a->head.out, own, a->head.out * sizeof(float));
            a->whole[r] = value[-1];
            memcpy(a->value + r * a->best, value, a->best * sizeof(float));
            for (long i = 0; i < a->best; i++) a->id[r * a->best + i] = place[i];
        }
}

static long end_memory(const pass *s) {
    long least, most;
    if (!s->a) return 0;
    rows_in_tasks(s->a->asked, &least, &most);
    return largest(outputs_in_task(&s->a->head, s->a->asked), most * largest(end_row_memory(s, NORM), end_row_memory(s, BEST)));
}

/* ---- the layers ---- */

static long pass_items(const job *j, long phase, long *least, long *most) {
    const pass *s = (const pass *)j->copied;
    phase += s->begin;
    if (phase >= PHASES * s->count) return end_items(s, phase - PHASES * s->count, least, most);
    long step = phase % PHASES, rows = s->p.rows;
    const layer *l = s->layers + phase / PHASES;
    if (step == ENTER || step == TURN || step == MIDDLE || step == GATED) return rows_in_tasks(rows, least, most);
    if (step == LOOK) return s->m.pieces ? piece_items(&s->p, &s->m, least, most) : attention_items(&s->p, least, most);
    if (step == JOIN) return s->m.pieces && s->m.sent != s->m.states ? heads_in_tasks(&s->p, least, most) : 0;
    if (step == MEET) return s->m.own ? heads_in_tasks(&s->p, least, most) : 0;
    if (step == MIXED) return reads_floats(&l->o) ? 0 : rows_in_tasks(rows, least, most);
    return blocks(matrix_of(l, step), rows, least, most);
}

/* What comes beside row r of x, in float32 */
static void beside_row(const pass *s, long r, float *to, long width) {
    const around *a = s->a;
    if (!a || !a->table) memcpy(to, s->beside + r * width, width * sizeof(float));
    else if (a->wide) memcpy(to, (const float *)a->table + a->token[r] * width, width * sizeof(float));
    else {
        const uint16_t *row = (const uint16_t *)a->table + a->token[r] * width;
        for (long c = 0; c < width; c += 8) store_float32(to + c, some_bfloat16(row + c, width - c), width - c);
    }
}

/* One row of the phases between products, into memory of its own: x first where the phase changes it, then the form of the next product's
 * input, then what it is made from. */
static void pass_row(const pass *s, const layer *l, long step, long r, float *own) {
    long width = l->width, d = s->p.width, heads = s->p.heads, kv_heads = s->p.kv_heads;
    float *x = s->x + r * width, *back = s->back + r * l->o.out, *form = own + width, *made = form + form_of(matrix_of(l, step));
    if (step == ENTER || step == MIDDLE) {
        int first = step == ENTER && l == s->layers;
        if (first && s->a && s->a->origin) x = (float *)s->a->origin + s->a->parent[r] * width;
        add_row(own, x, first ? NULL : back, step == MIDDLE ? l->o_bias : NULL, width);
        norm_row(own, step == ENTER ? l->norm : l->mlp_norm, made + (step == ENTER ? inputs_of(l) - width : 0), width, l->epsilon);
        if (step == ENTER && l->beside_norm) {
            beside_row(s, r, made, width);
            norm_row(made, l->beside_norm, made, width, l->epsilon);
        }
    } else if (step == MIXED) made = s->mixed + r * heads * d;
    else if (step == GATED) gate_row(s->gate_up + r * l->gate_up.out, s->gate_up + r * l->gate_up.out + l->inner, made, l->inner);
    else { /* TURN */
        const float *row = s->qkv + r * l->qkv.out;
        add_row(own, row, l->qkv_bias, NULL, (heads + 2 * kv_heads) * d);
        for (long h = 0; l->q_norm && h < heads + kv_heads; h++)
            norm_row(own + h * d, h < heads ? l->q_norm : l->k_norm, own + h * d, d, l->epsilon);
        long at = (s->a && s->a->position ? s->a->position[r] : r) * s->turned;
        rotate_row(own, heads + kv_heads, d, s->turned, s->cos + at, s->sin + at);
        return;
    }
    form_row(matrix_of(l, step), made, form);
}

static long row_memory(const pass *s, const layer *l) {
    long most = largest(form_of(&l->qkv) + inputs_of(l), form_of(&l->gate_up) + l->width);
    most = largest(most, largest(form_of(&l->down) + l->inner, form_of(&l->o)));
    return largest(l->width + most, l->qkv.out);
}

static void pass_work(const job *j, long phase, long first, long last, float *own) {
    const pass *s = (const pass *)j->copied;
    phase += s->begin;
    long step = phase % PHASES, number = phase / PHASES, rows = s->p.rows;
    if (number == s->count) {
        end_work(s, step, first, last, own);
        return;
    }
    const layer *l = s->layers + number;
    if (step == LOOK && s->m.pieces) piece_work(&s->p, &s->m, s->qkv, slab_of(s, number), first, last, own);
    else if (step == LOOK) attention_work(&s->p, s->qkv, slab_of(s, number), first, last, own);
    else if (step == JOIN) join_work(&s->p, &s->m, first, last, own);
    else if (step == MEET) meet_work(&s->p, &s->m, first, last, own);
    else if (step == QKV || step == OUT || step == GATE_UP || step == DOWN) {
        const matrix *m = matrix_of(l, step);
        multiply(m, inputs_in(s, m, step), own, rows, first, last);
    } else
        for (long r = first; r < last; r++) pass_row(s, l, step, r, own + (r - first) * row_memory(s, l));
}

static void pass_keep(const job *j, long phase, long first, long last, const float *own) {
    const pass *s = (const pass *)j->copied;
    phase += s->begin;
    long step = phase % PHASES, number = phase / PHASES, width = s->layers->width, rows = s->p.rows;
    if (number == s->count) {
        end_keep(s, step, first, last, own);
        return;
    }
    const layer *l = s->layers + number;
    const matrix *m = matrix_of(l, step);
    if (step == LOOK && s->m.pieces) keep_piece(&s->p, &s->m, first, last, own);
    else if (step == LOOK) keep_attention(&s->p, s->mixed, NULL, first, last, own);
    else if (step == JOIN && s->m.own) keep_sent(&s->p, &s->m, first, last, own);
    else if (step == JOIN || step == MEET) keep_whole(&s->p, s->mixed, first, last, own);
    else if (step == QKV || step == OUT || step == GATE_UP || step == DOWN) keep_product(m, outputs_of(s, step), own, rows, first, last);
    else
        for (long r = first; r < last; r++, own += row_memory(s, l)) {
            if (step == TURN) {
                memcpy(s->qkv + r * l->qkv.out, own, l->qkv.out * sizeof(float));
                remember(&s->p, own, slab_of(s, number), r);
                continue;
            }
            if (step == ENTER || step == MIDDLE) memcpy(s->x + r * width, own, width * sizeof(float));
            for (long t = 0; step == ENTER && t < s->tapped; t++)
                if (s->taps[t] == number) memcpy(s->features + (r * s->tapped + t) * width, own, width * sizeof(float));
            keep_row(m, inputs_in(s, m, step), r, own + width);
        }
}

static long pass_memory(const pass *s) {
    const layer *l = s->layers;
    long least, most, rows = s->p.rows, attention = s->m.pieces ? piece_memory(&s->p, &s->m) : attention_memory(&s->p);
    rows_in_tasks(rows, &least, &most);
    long outputs = largest(largest(outputs_in_task(&l->qkv, rows), outputs_in_task(&l->o, rows)),
                           largest(outputs_in_task(&l->gate_up, rows), outputs_in_task(&l->down, rows)));
    if (s->m.pieces) attention = largest(attention, join_memory(&s->p, &s->m));
    return largest(largest(attention, end_memory(s)), largest(most * row_memory(s, l), outputs));
}

/* x [rows, width] += attention, then += MLP: `count` decoder layers of one shape over rows. q, k and v read norm(x), or [norm(beside);
 * norm(x)] where something [rows, width] comes beside x (the embeddings of EAGLE-3's draft). keys and values: of the first layer; the next
 * one's lie `apart` bytes further. features [rows, tapped, width]: x as it enters the layers `taps` names, counted from the first. cos and
 * sin [rows, turned]. scratch: for each row the outputs of qkv, of gate_up, of o or down and of attention, and the largest product's
 * `form_of`. m: where states meet, if keys are sharded; else NULL. Phases [begin, end), counted from the first layer's first, are done: all,
 * or up to where a process needs the others' states, and on from there with the same scratch; end -1: to the end. a: of a draft's step, else
 * NULL. Returns as `run` does. */
int eyas_layers(const plan *p, const layer *layers, long count, float *x, const float *beside, const float *cos, const float *sin, long turned,
                void *keys, void *values, int wide, long apart, const long *taps, long tapped, float *features, float *scratch,
                const meeting *m, long begin, long end, const around *a, int threads) {
    long rows = p->rows, both = layers->gate_up.out, out = largest(layers->o.out, layers->down.out);
    float *mixed = scratch + rows * layers->qkv.out, *gate_up = mixed + rows * p->heads * p->width, *back = gate_up + rows * both;
    pass s = {*p, layers, count, wide, apart, tapped, turned, x, beside, cos, sin, keys, values, taps, features, scratch, mixed, gate_up, back,
              back + rows * out, begin, {0}, a};
    if (m) s.m = *m;
    job j = {(end < 0 ? PHASES * count + (a ? LAST : 1) : end) - begin, threads, pass_memory(&s), pass_items, pass_work, pass_keep};
    memcpy(j.copied, &s, sizeof s);
    return run(&j);
}

/* Phases of a layer; those after which queries, keys and values lie in scratch [rows, outputs of qkv]; and those after which a process of
 * several waits for the others' states. */
long eyas_phases(void) { return PHASES; }
long eyas_turned(void) { return LOOK; }
long eyas_joined(void) { return MEET; }

_Static_assert(sizeof(pass) <= sizeof(((job *)0)->copied), "a job's facts fit");
