/* Counters in memory that several processes share: one process counts what it has left there, the others wait until it has come so far. A
 * process that waits looks for a while and then sleeps until the counter moves. Knows counters; knows nothing of what is left where. */

typedef struct {
    _Atomic uint32_t count, sleepers;
    char alone[56]; /* a line of the cache */
} counter;

void eyas_post(counter *c, uint32_t count) {
    atomic_store(&c->count, count);
    if (atomic_load(&c->sleepers)) syscall(SYS_futex, &c->count, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Whether a counter comes as far as `count` within so many looks and then milliseconds. */
int eyas_await(counter *c, uint32_t count, long looks, long milliseconds) {
    struct timespec least = {0, 20000000};
    for (long look = 0; look < looks; look++) {
        if ((int32_t)(atomic_load(&c->count) - count) >= 0) return 1;
        pause_a_moment();
    }
    for (long waited = 0;; waited += 20) {
        uint32_t seen = atomic_load(&c->count);
        if ((int32_t)(seen - count) >= 0) return 1;
        if (waited >= milliseconds) return 0;
        atomic_fetch_add(&c->sleepers, 1);
        syscall(SYS_futex, &c->count, FUTEX_WAIT, seen, &least, NULL, 0);
        atomic_fetch_sub(&c->sleepers, 1);
    }
}
