/* The innermost loops of products with AVX2: 16 registers, so 6 rows by a block at most. Knows packed blocks; what they are is native.c's. */

#define MOST_ROWS 6
#define ASKS_NEXT 1 /* of 7 to 12 rows by 16-bit weights: while a block meets the one half and the other, the next block is asked for */

/* R rows by a block of bfloat16 weights. Sums, two halves of weights and one input must fit 16 registers. An input that was broadcast meets
 * both halves at once: two loads a cycle would otherwise hold up two multiplications. */
#define EXACT(R)                                                                                                                     \
    static void exact_##R(const void *rows, const float *scale, const float *sums, const void *weights, float *y, long in, long out, \
                          const char *ask, long stride) {                                                                            \
        const float *x = rows;                                                                                                       \
        const uint16_t *w = weights;                                                                                                 \
        const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);                                                                   \
        __m256 sum[R][2];                                                                                                            \
        ALL for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();                                                 \
        for (long i = 0; i < in; i += 2) {                                                                                           \
            const __m256i *pairs = (const __m256i *)(w + i * LANES);                                                                 \
            _mm_prefetch(ask, _MM_HINT_T0), ask += stride;                                                                           \
            ALL for (int odd = 0; odd < 2; odd++) {                                                                                  \
                __m256i low = _mm256_loadu_si256(pairs), high = _mm256_loadu_si256(pairs + 1);                                       \
                low = odd ? _mm256_and_si256(low, upper) : _mm256_slli_epi32(low, 16);                                               \
                high = odd ? _mm256_and_si256(high, upper) : _mm256_slli_epi32(high, 16);                                            \
                ALL for (int r = 0; r < R; r++) {                                                                                    \
                    __m256 value = _mm256_broadcast_ss(x + r * in + i + odd);                                                        \
                    sum[r][0] = _mm256_fmadd_ps(value, _mm256_castsi256_ps(low), sum[r][0]);                                         \
                    sum[r][1] = _mm256_fmadd_ps(value, _mm256_castsi256_ps(high), sum[r][1]);                                        \
                }                                                                                                                    \
            }                                                                                                                        \
        }                                                                                                                            \
        ALL for (int r = 0; r < R; r++)                                                                                              \
            ALL for (int half = 0; half < 2; half++) _mm256_storeu_ps(y + r * out + 8 * half, sum[r][half]);                         \
    }

EXACT(1) EXACT(2) EXACT(3) EXACT(4) EXACT(5) EXACT(6)
static inner *const exact[] = {exact_1, exact_2, exact_3, exact_4, exact_5, exact_6};

static inline __m256 load_half(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

/* A pair of a row's inputs meets the pairs of weights of 16 outputs. In assembly: gcc moves the sums of six rows about, which takes as long as
 * the products. Sums, weights, input and product are 16 registers. */
static inline __attribute__((always_inline)) void add_pair(__m256i *sum, const int16_t *x, __m256i first, __m256i second) {
    __m256i pair, product;
    __asm__("vpbroadcastd %4, %2\n\t"
            "vpmaddwd %5, %2, %3\n\t"
            "vpaddd %3, %0, %0\n\t"
            "vpmaddwd %6, %2, %2\n\t"
            "vpaddd %2, %1, %1"
            : "+x"(sum[0]), "+x"(sum[1]), "=&x"(pair), "=&x"(product)
            : "m"(*(const int *)x), "x"(first), "x"(second));
}

#define GROUPED(R, BITS)                                                                                                             \
    static void grouped_##R##_##BITS(const void *rows, const float *scale, const float *sums, const void *weights, float *y,         \
                                     long in, long out, const char *ask, long stride) {                                              \
        const int16_t *q = rows;                                                                                                     \
        const uint8_t *w = weights;                                                                                                  \
        __m256 total[R][2];                                                                                                          \
        ALL for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();                                             \
        for (long g = 0; g < in / GROUP; g++, w += RECORD(BITS)) {                                                                   \
            const uint8_t *n = w + (BITS == 8 ? 2 * LANES : 4 * LANES);                                                              \
            __m256i sum[R][2];                                                                                                       \
            ALL for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();                                          \
            for (long i = g * GROUP; i < (g + 1) * GROUP; i += 2) {                                                                  \
                __m256i first, second;                                                                                               \
                _mm_prefetch((const char *)(n + AHEAD), _MM_HINT_T0);                                                                \
                if (BITS == 8) {                                                                                                     \
                    first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)n));                                               \
                    second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(n + LANES)));                                    \
                    n += 2 * LANES;                                                                                                  \
                } else {                                                                                                             \
                    __m128i both = _mm_loadu_si128((const __m128i *)n), low = _mm_set1_epi8(15);                                     \
                    first = _mm256_cvtepu8_epi16(_mm_and_si128(both, low));                                                          \
                    second = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), low));                                      \
                    n += LANES;                                                                                                      \
                }                                                                                                                    \
                ALL for (int r = 0; r < R; r++) add_pair(sum[r], q + r * in + i, first, second);                                     \
            }                                                                                                                        \
            ALL for (int half = 0; half < 2; half++) {                                                                               \
                __m256 d = load_half(w + half * LANES);                                                                              \
                ALL for (int r = 0; r < R; r++) total[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][half]), d, total[r][half]);\
                if (BITS == 4) {                                                                                                     \
                    __m256 m = load_half(w + 2 * LANES + half * LANES);                                                              \
                    ALL for (int r = 0; r < R; r++)                                                                                  \
                        total[r][half] = _mm256_fmadd_ps(_mm256_set1_ps(sums[r * (in / GROUP) + g]), m, total[r][half]);             \
                }                                                                                                                    \
            }                                                                                                                        \
        }                                                                                                                            \
        ALL for (int r = 0; r < R; r++)                                                                                              \
            ALL for (int half = 0; half < 2; half++)                                                                                 \
                _mm256_storeu_ps(y + r * out + 8 * half, _mm256_mul_ps(total[r][half], _mm256_set1_ps(scale[r])));                   \
    }

#define GROUPED_ROWS(BITS)                                                                                                           \
    GROUPED(1, BITS) GROUPED(2, BITS) GROUPED(3, BITS) GROUPED(4, BITS) GROUPED(5, BITS) GROUPED(6, BITS)                            \
    static inner *const grouped_##BITS[] = {grouped_1_##BITS, grouped_2_##BITS, grouped_3_##BITS,                                    \
                                            grouped_4_##BITS, grouped_5_##BITS, grouped_6_##BITS};

GROUPED_ROWS(8)
GROUPED_ROWS(4)
