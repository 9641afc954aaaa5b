/* The innermost loops of products with AVX-512 and its dot products: 32 registers, so up to 16 rows. Knows packed blocks; what they are is
 * native.c's. A pair of weights of 16 outputs fills a register, and a pair of a row's inputs is broadcast to meet it. */

#define MOST_ROWS 16

/* Stores, and loops over rows and blocks with every index known to the compiler. */
#define ROWS_BLOCKS(R, B) ALL for (int r = 0; r < R; r++) ALL for (int b = 0; b < B; b++)

#define OPEN(NAME, R, B)                                                                                                             \
    static void NAME##_##R##_##B(const void *rows, const float *scale, const float *sums, const void *weights, float *y, long in, long out) {

/* float32 x with bfloat16 weights */
#define EXACT(R, B)                                                                                                                  \
    OPEN(exact, R, B)                                                                                                                \
        const float *x = rows;                                                                                                       \
        const uint16_t *w = weights;                                                                                                 \
        const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);                                                                   \
        __m512 sum[R][B];                                                                                                            \
        ROWS_BLOCKS(R, B) sum[r][b] = _mm512_setzero_ps();                                                                           \
        for (long i = 0; i < in; i += 2)                                                                                             \
            ALL for (int b = 0; b < B; b++) {                                                                                        \
                const uint16_t *at = w + (b * in + i) * LANES;                                                                       \
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);                                                                 \
                __m512i pair = _mm512_loadu_si512(at);                                                                               \
                __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));                                                     \
                __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));                                                  \
                ALL for (int r = 0; r < R; r++) {                                                                                    \
                    sum[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * in + i]), first, sum[r][b]);                                      \
                    sum[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * in + i + 1]), second, sum[r][b]);                                 \
                }                                                                                                                    \
            }                                                                                                                        \
        ROWS_BLOCKS(R, B) _mm512_storeu_ps(y + r * out + b * LANES, sum[r][b]);                                                        \
    }

/* bfloat16 x and weights: vdpbf16ps */
#define ROUND(R, B)                                                                                                                  \
    OPEN(rounded, R, B)                                                                                                              \
        const uint16_t *x = rows, *w = weights;                                                                                      \
        __m512 sum[R][B];                                                                                                            \
        ROWS_BLOCKS(R, B) sum[r][b] = _mm512_setzero_ps();                                                                           \
        for (long i = 0; i < in; i += 2) {                                                                                           \
            __m512bh pair[B];                                                                                                        \
            ALL for (int b = 0; b < B; b++) {                                                                                        \
                const uint16_t *at = w + (b * in + i) * LANES;                                                                       \
                _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);                                                                 \
                pair[b] = (__m512bh)_mm512_loadu_si512(at);                                                                          \
            }                                                                                                                        \
            ALL for (int r = 0; r < R; r++) {                                                                                        \
                int two;                                                                                                             \
                memcpy(&two, x + r * in + i, sizeof two);                                                                            \
                __m512bh value = (__m512bh)_mm512_set1_epi32(two);                                                                   \
                ALL for (int b = 0; b < B; b++) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], value, pair[b]);                               \
            }                                                                                                                        \
        }                                                                                                                            \
        ROWS_BLOCKS(R, B) _mm512_storeu_ps(y + r * out + b * LANES, sum[r][b]);                                                        \
    }

static inline __m512 load_half(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* The pair of weights at n of 16 outputs, as int16 */
static inline __m512i pair_8(const uint8_t *n) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)n)); }
static inline __m512i pair_4(const uint8_t *n) {
    __m128i both = _mm_loadu_si128((const __m128i *)n), low = _mm_set1_epi8(15);
    __m128i first = _mm_and_si128(both, low), second = _mm_and_si128(_mm_srli_epi16(both, 4), low);
    return _mm512_cvtepu8_epi16(_mm256_set_m128i(second, first));
}

/* int16 x and weights of 8 or 4 bits: vpdpwssd, whose sums are exact */
#define GROUPED(R, B, BITS)                                                                                                          \
    OPEN(grouped_##BITS, R, B)                                                                                                       \
        const int16_t *q = rows;                                                                                                     \
        const long wide = in / GROUP * RECORD(BITS), step = GROUP * LANES * BITS / 8 / (GROUP / 2);                                    \
        __m512 total[R][B];                                                                                                          \
        ROWS_BLOCKS(R, B) total[r][b] = _mm512_setzero_ps();                                                                         \
        for (long g = 0; g < in / GROUP; g++) {                                                                                      \
            const uint8_t *w = (const uint8_t *)weights + g * RECORD(BITS), *n = w + (BITS == 8 ? 2 : 4) * LANES;                      \
            __m512i sum[R][B];                                                                                                       \
            ROWS_BLOCKS(R, B) sum[r][b] = _mm512_setzero_si512();                                                                    \
            for (int i = 0; i < GROUP / 2; i++, n += step) {                                                                         \
                __m512i pair[B];                                                                                                     \
                ALL for (int b = 0; b < B; b++) {                                                                                    \
                    if (i % (64 / step) == 0) _mm_prefetch((const char *)n + b * wide + AHEAD, _MM_HINT_T0);                           \
                    pair[b] = pair_##BITS(n + b * wide);                                                                             \
                }                                                                                                                    \
                ALL for (int r = 0; r < R; r++) {                                                                                    \
                    int two;                                                                                                         \
                    memcpy(&two, q + r * in + g * GROUP + 2 * i, sizeof two);                                                        \
                    __m512i value = _mm512_set1_epi32(two);                                                                          \
                    ALL for (int b = 0; b < B; b++) sum[r][b] = _mm512_dpwssd_epi32(sum[r][b], value, pair[b]);                        \
                }                                                                                                                    \
            }                                                                                                                        \
            ALL for (int b = 0; b < B; b++) {                                                                                        \
                __m512 d = load_half(w + b * wide);                                                                                  \
                ALL for (int r = 0; r < R; r++) total[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][b]), d, total[r][b]);          \
                if (BITS == 4) {                                                                                                     \
                    __m512 m = load_half(w + b * wide + 2 * LANES);                                                                  \
                    ALL for (int r = 0; r < R; r++)                                                                                  \
                        total[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(sums[r * (in / GROUP) + g]), m, total[r][b]);                     \
                }                                                                                                                    \
            }                                                                                                                        \
        }                                                                                                                            \
        ROWS_BLOCKS(R, B) _mm512_storeu_ps(y + r * out + b * LANES, _mm512_mul_ps(total[r][b], _mm512_set1_ps(scale[r])));             \
    }

#define EIGHT_BITS(R, B) GROUPED(R, B, 8)
#define FOUR_BITS(R, B) GROUPED(R, B, 4)

/* As many blocks at once as make about 8 sums, and one; which of them for how many rows. */
#define EACH(KIND)                                                                                                                   \
    KIND(1, 6) KIND(2, 6) KIND(3, 3) KIND(4, 3) KIND(5, 2) KIND(6, 2) KIND(7, 2) KIND(8, 2)                                            \
    KIND(1, 1) KIND(2, 1) KIND(3, 1) KIND(4, 1) KIND(5, 1) KIND(6, 1) KIND(7, 1) KIND(8, 1)                                            \
    KIND(9, 1) KIND(10, 1) KIND(11, 1) KIND(12, 1) KIND(13, 1) KIND(14, 1) KIND(15, 1) KIND(16, 1)
#define CHOICES(NAME)                                                                                                                \
    static const choice NAME[] = {{NAME##_1_1, NAME##_1_6, 6},    {NAME##_2_1, NAME##_2_6, 6},    {NAME##_3_1, NAME##_3_3, 3},            \
                                  {NAME##_4_1, NAME##_4_3, 3},    {NAME##_5_1, NAME##_5_2, 2},    {NAME##_6_1, NAME##_6_2, 2},            \
                                  {NAME##_7_1, NAME##_7_2, 2},    {NAME##_8_1, NAME##_8_2, 2},    {NAME##_9_1, NAME##_9_1, 1},            \
                                  {NAME##_10_1, NAME##_10_1, 1}, {NAME##_11_1, NAME##_11_1, 1}, {NAME##_12_1, NAME##_12_1, 1},         \
                                  {NAME##_13_1, NAME##_13_1, 1}, {NAME##_14_1, NAME##_14_1, 1}, {NAME##_15_1, NAME##_15_1, 1},         \
                                  {NAME##_16_1, NAME##_16_1, 1}};

EACH(EXACT)
EACH(EIGHT_BITS)
EACH(FOUR_BITS)
CHOICES(exact)
CHOICES(grouped_8)
CHOICES(grouped_4)
#ifdef __AVX512BF16__
#define ROUNDED
EACH(ROUND)
CHOICES(rounded)
#endif
