/* The innermost loops of products with AVX-512 and its dot products: 32 registers, so up to 12 rows. Knows packed blocks; what they are is
 * native.c's. A pair of weights of 16 outputs fills a register, and a pair of a row's inputs is broadcast to meet it. */

#define MOST_ROWS 12
#define ASKS_NEXT 0 /* what to ask for is settled here: AHEAD of the weights in use; another way was not measured */

#define EACH_OF(R) ALL for (int r = 0; r < R; r++)
#define OPEN(NAME, R)                                                                                                                \
    static void NAME##_##R(const void *rows, const float *scale, const float *sums, const void *weights, float *y, long in, long out,  \
                           const char *ask, long stride) {

/* float32 x with bfloat16 weights */
#define EXACT(R)                                                                                                                     \
    OPEN(exact, R)                                                                                                                   \
        const float *x = rows;                                                                                                       \
        const uint16_t *w = weights;                                                                                                 \
        const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);                                                                   \
        __m512 sum[R];                                                                                                               \
        EACH_OF(R) sum[r] = _mm512_setzero_ps();                                                                                     \
        for (long i = 0; i < in; i += 2) {                                                                                           \
            _mm_prefetch((const char *)(w + i * LANES) + AHEAD, _MM_HINT_T0);                                                        \
            __m512i pair = _mm512_loadu_si512(w + i * LANES);                                                                        \
            __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), second = _mm512_castsi512_ps(_mm512_and_si512(pair, upper)); \
            EACH_OF(R) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * in + i]), first, sum[r]);                                         \
            EACH_OF(R) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * in + i + 1]), second, sum[r]);                                    \
        }                                                                                                                            \
        EACH_OF(R) _mm512_storeu_ps(y + r * out, sum[r]);                                                                            \
    }

/* Dot products of pairs, added to sums: x points at a row's pair, w holds those of 16 outputs. In assembly, since gcc moves sums about. */
static inline __m512 dot_bfloat16(__m512 sum, const uint16_t *x, __m512i w) {
    __asm__("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*(const int *)x), "v"(w));
    return sum;
}
static inline __m512i dot_int16(__m512i sum, const int16_t *x, __m512i w) {
    __asm__("vpdpwssd %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*(const int *)x), "v"(w));
    return sum;
}

/* bfloat16 x and weights */
#define ROUND(R)                                                                                                                     \
    OPEN(rounded, R)                                                                                                                 \
        const uint16_t *x = rows, *w = weights;                                                                                      \
        __m512 sum[R], other[R]; /* every second pair's, so that a lone row's additions wait less for each other */                    \
        EACH_OF(R) sum[r] = other[r] = _mm512_setzero_ps();                                                                          \
        long i = 0;                                                                                                                  \
        for (; i + 4 <= in; i += 4) {                                                                                                \
            _mm_prefetch((const char *)(w + i * LANES) + AHEAD, _MM_HINT_T0);                                                        \
            _mm_prefetch((const char *)(w + i * LANES) + AHEAD + 64, _MM_HINT_T0);                                                   \
            __m512i pair = _mm512_loadu_si512(w + i * LANES), next = _mm512_loadu_si512(w + (i + 2) * LANES);                          \
            EACH_OF(R) sum[r] = dot_bfloat16(sum[r], x + r * in + i, pair);                                                            \
            EACH_OF(R) other[r] = dot_bfloat16(other[r], x + r * in + i + 2, next);                                                    \
        }                                                                                                                            \
        if (i < in) EACH_OF(R) sum[r] = dot_bfloat16(sum[r], x + r * in + i, _mm512_loadu_si512(w + i * LANES));                       \
        EACH_OF(R) _mm512_storeu_ps(y + r * out, _mm512_add_ps(sum[r], other[r]));                                                     \
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
#define GROUPED(R, BITS)                                                                                                             \
    OPEN(grouped_##BITS, R)                                                                                                          \
        enum { STEP = LANES * BITS / 4, CHAINS = R < 2 ? 4 : R < 4 ? 2 : 1 }; /* bytes of a pair; sums that do not wait for each other */  \
        const int16_t *q = rows;                                                                                                     \
        const uint8_t *w = weights;                                                                                                  \
        __m512 total[R];                                                                                                             \
        EACH_OF(R) total[r] = _mm512_setzero_ps();                                                                                   \
        for (long g = 0; g < in / GROUP; g++, w += RECORD(BITS)) {                                                                   \
            const uint8_t *n = w + (BITS == 8 ? 2 : 4) * LANES;                                                                      \
            __m512i sum[R][CHAINS];                                                                                                  \
            EACH_OF(R) ALL for (int c = 0; c < CHAINS; c++) sum[r][c] = _mm512_setzero_si512();                                        \
            for (int at = 0; at < RECORD(BITS); at += 64) _mm_prefetch((const char *)w + at + AHEAD, _MM_HINT_T0);                     \
            for (int i = 0; i < GROUP / 2; i += CHAINS)                                                                              \
                ALL for (int c = 0; c < CHAINS; c++) {                                                                               \
                    __m512i pair = pair_##BITS(n + (i + c) * STEP);                                                                  \
                    EACH_OF(R) sum[r][c] = dot_int16(sum[r][c], q + r * in + g * GROUP + 2 * (i + c), pair);                           \
                }                                                                                                                    \
            EACH_OF(R) ALL for (int c = 1; c < CHAINS; c++) sum[r][0] = _mm512_add_epi32(sum[r][0], sum[r][c]);                        \
            __m512 d = load_half(w);                                                                                                 \
            EACH_OF(R) total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), d, total[r]);                                         \
            if (BITS == 4) {                                                                                                         \
                __m512 m = load_half(w + 2 * LANES);                                                                                 \
                EACH_OF(R) total[r] = _mm512_fmadd_ps(_mm512_set1_ps(sums[r * (in / GROUP) + g]), m, total[r]);                        \
            }                                                                                                                        \
        }                                                                                                                            \
        EACH_OF(R) _mm512_storeu_ps(y + r * out, _mm512_mul_ps(total[r], _mm512_set1_ps(scale[r])));                                   \
    }

#define EIGHT_BITS(R) GROUPED(R, 8)
#define FOUR_BITS(R) GROUPED(R, 4)
#define EACH(KIND)                                                                                                                   \
    KIND(1) KIND(2) KIND(3) KIND(4) KIND(5) KIND(6) KIND(7) KIND(8) KIND(9) KIND(10) KIND(11) KIND(12)
#define CHOICES(NAME)                                                                                                                \
    static inner *const NAME[] = {NAME##_1, NAME##_2,  NAME##_3,  NAME##_4,  NAME##_5,  NAME##_6,  NAME##_7,  NAME##_8,                \
                                  NAME##_9, NAME##_10, NAME##_11, NAME##_12};

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
