/* Threads that do a job together and never wait for one that the system has put aside.
 *
 * A job is phases that follow each other, a phase is items (rows, blocks of outputs), handed out in tasks of several items. Whoever runs takes
 * the next task, computes it into memory of its own and then keeps it: copies it to where the next phase reads it. A phase is over once all
 * its tasks are kept. Who finds no task left looks at those under way; one that is not kept after a moment is computed again. Whoever is first
 * keeps it, which the stamp of the task decides, and both have computed the same. So a thread without a core costs its share of the work and
 * nothing else. Knows counts and functions; knows nothing of what is computed. */
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_THREADS 64
#define JOBS 128          /* more than threads, so that one is always free of threads that lag behind */
#define MOST_TASKS 16384  /* of a phase */
#define PATIENCE 600      /* looks at a task under way before it is computed again: some ten microseconds, as the smallest tasks take */
#define IDLE 6000         /* looks for a new job before a thread sleeps: some hundred microseconds */

typedef struct job {
    long phases, threads, own; /* own: numbers of memory that a task needs */
    /* How many items a phase has, and how many a task takes at least and at most */
    long (*items)(const struct job *, long phase, long *least, long *most);
    void (*work)(const struct job *, long phase, long first, long last, float *own);       /* reads what all see, writes its own memory */
    void (*keep)(const struct job *, long phase, long first, long last, const float *own); /* copies that to where all see it */
    char copied[512]; /* the facts that these functions read */
    uint64_t base;    /* the stamp of its first phase */
} job;

static job jobs[JOBS];
static _Atomic uint64_t current;               /* the number of the job under way; 0: none */
static _Atomic uint64_t state = 1 << 16;       /* stamp of the phase under way << 16 | its next task; stamps only grow */
static _Atomic uint64_t stamps[MOST_TASKS];    /* of each task: 2 * stamp while it is kept, one more once it is */
static _Atomic uint64_t inside[MOST_THREADS];  /* the job that a thread is in; 0: none */
static _Atomic uint32_t bell, sleeping;
static _Atomic long computed_again;
static pthread_mutex_t leading = PTHREAD_MUTEX_INITIALIZER;
static long workers; /* threads there are beside those that call */
static uint64_t last_job;

static inline void pause_a_moment(void) { _mm_pause(); }

/* A thread's view of a phase: its items, and where its next task begins. */
typedef struct {
    uint64_t stamp;
    long phase, least, most, task, start, left;
} outlook;

static outlook look_at(const job *j, uint64_t stamp) {
    outlook o = {stamp, (long)(stamp - j->base), 0, 0, 0, 0, 0};
    o.left = j->items(j, o.phase, &o.least, &o.most);
    return o;
}

/* The items [first, last) of a task; 0 where the phase has no such task. A task takes a thread's share of what the ones before it left, so
 * that all threads end at about the same time. */
static int bounds(const job *j, outlook *o, long task, long *first, long *last) {
    if (task < o->task) *o = look_at(j, o->stamp);
    for (;;) {
        if (o->left <= 0) return 0;
        long size = o->left / j->threads;
        size = size > o->most ? o->most : size < o->least ? o->least : size;
        size = size > o->left ? o->left : size;
        *first = o->start, *last = o->start + size;
        if (task == o->task) return 1;
        o->task++, o->start += size, o->left -= size;
    }
}

static void do_task(const job *j, uint64_t stamp, long task, long first, long last, float *own) {
    long phase = (long)(stamp - j->base);
    j->work(j, phase, first, last, own);
    uint64_t seen = atomic_load_explicit(&stamps[task], memory_order_acquire);
    if (seen >= 2 * stamp || !atomic_compare_exchange_strong(&stamps[task], &seen, 2 * stamp)) return; /* somebody was first */
    j->keep(j, phase, first, last, own);
    atomic_store_explicit(&stamps[task], 2 * stamp + 1, memory_order_release);
}

/* Whether a task is kept. One that is still under way after a moment is computed again here; it may be a thread's without a core. */
static int settle(const job *j, outlook *o, long task, float *own) {
    uint64_t stamp = o->stamp;
    for (int looks = 0;; looks++) {
        uint64_t seen = atomic_load_explicit(&stamps[task], memory_order_acquire);
        if (seen > 2 * stamp) return 1;
        if (atomic_load_explicit(&state, memory_order_acquire) >> 16 != stamp) return 0; /* the phase is over */
        if (looks < PATIENCE) pause_a_moment();
        else if (seen == 2 * stamp) sched_yield(); /* put aside while it copied, which is rare */
        else {
            long first, last;
            bounds(j, o, task, &first, &last);
            atomic_fetch_add_explicit(&computed_again, 1, memory_order_relaxed);
            do_task(j, stamp, task, first, last, own);
        }
    }
}

/* Work on a job until its last phase is over. */
static void take_part(const job *j, float *own) {
    uint64_t now = atomic_load_explicit(&state, memory_order_acquire);
    for (long first, last; (now >> 16) - j->base < (uint64_t)j->phases; now = atomic_load_explicit(&state, memory_order_acquire)) {
        outlook o = look_at(j, now >> 16);
        while (now >> 16 == o.stamp && bounds(j, &o, now & 0xffff, &first, &last))
            if (atomic_compare_exchange_weak(&state, &now, now + 1)) {
                do_task(j, o.stamp, now & 0xffff, first, last, own);
                now = atomic_load_explicit(&state, memory_order_acquire);
            }
        if (now >> 16 != o.stamp) continue;
        long settled = 0, tasks = now & 0xffff;
        while (settled < tasks && settle(j, &o, settled, own)) settled++;
        if (settled == tasks) atomic_compare_exchange_strong(&state, &now, (o.stamp + 1) << 16);
    }
}

static float *room_for(float **own, long *room, long wanted) {
    if (*room < wanted) {
        free(*own);
        *own = aligned_alloc(64, (size_t)(*room = (wanted + 15) / 16 * 16) * sizeof(float));
    }
    return *own;
}

static uint64_t next_job(uint64_t done) {
    for (int looks = 0;; looks++) {
        uint32_t heard = atomic_load(&bell);
        uint64_t found = atomic_load(&current);
        if (found && found != done) return found;
        if (looks < IDLE) pause_a_moment();
        else {
            atomic_fetch_add(&sleeping, 1);
            syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, heard, NULL, NULL, 0);
            atomic_fetch_sub(&sleeping, 1);
            looks = 0;
        }
    }
}

static void *serve(void *number) {
    long me = (long)number, room = 0;
    float *own = NULL;
    for (uint64_t done = 0;;) {
        uint64_t found = next_job(done);
        atomic_store(&inside[me], found);
        if (atomic_load(&current) == found) { /* it has not ended before this thread could say that it is in */
            const job *j = &jobs[found % JOBS];
            if (me + 1 < j->threads) take_part(j, room_for(&own, &room, j->own));
        }
        atomic_store(&inside[me], 0);
        done = found;
    }
    return NULL;
}

static void alone_again(void) { /* a forked child has none of its parent's threads */
    workers = 0;
    for (int i = 0; i < MOST_THREADS; i++) atomic_store(&inside[i], 0);
    atomic_store(&current, 0);
    atomic_store(&sleeping, 0);
    atomic_store(&state, ((atomic_load(&state) >> 16) + (1 << 20)) << 16); /* behind every phase of a job that was under way */
    pthread_mutex_init(&leading, NULL);
}

static void enlist(long wanted) {
    static int prepared;
    if (!prepared) pthread_atfork(NULL, NULL, alone_again), prepared = 1;
    sigset_t all, before; /* signals are for the threads that call */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; workers < wanted && workers < MOST_THREADS; workers++)
        if (pthread_create(&thread, &attributes, serve, (void *)workers)) break;
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int lagging(uint64_t slot) { /* whether a thread is still in a job that had this place */
    for (long i = 0; i < workers; i++) {
        uint64_t other = atomic_load(&inside[i]);
        if (other && (slot == JOBS || other % JOBS == slot)) return 1;
    }
    return 0;
}

/* Do a job. Returns whether a thread is still in it, or in an earlier one: until a later call returns 0, what it reads must stay. */
static int run(job *j) {
    static _Thread_local float *own;
    static _Thread_local long room;
    room_for(&own, &room, j->own);
    if (j->threads > MOST_THREADS) j->threads = MOST_THREADS;
    if (j->threads < 2 || pthread_mutex_trylock(&leading)) { /* alone, or others are busy with somebody else's job */
        for (uint64_t phase = 0; phase < (uint64_t)j->phases; phase++) {
            outlook o = look_at(j, phase);
            for (long first, last, task = 0; bounds(j, &o, task, &first, &last); task++) {
                j->work(j, o.phase, first, last, own);
                j->keep(j, o.phase, first, last, own);
            }
        }
        return lagging(JOBS);
    }
    enlist(j->threads - 1);
    do last_job++;
    while (last_job % JOBS == 0 || lagging(last_job % JOBS));
    j->base = atomic_load(&state) >> 16;
    jobs[last_job % JOBS] = *j;
    atomic_store(&current, last_job);
    atomic_fetch_add(&bell, 1);
    if (atomic_load(&sleeping)) syscall(SYS_futex, &bell, FUTEX_WAKE_PRIVATE, MOST_THREADS, NULL, NULL, 0);
    take_part(&jobs[last_job % JOBS], own);
    atomic_store(&current, 0);
    for (int looks = 0; looks < PATIENCE && lagging(JOBS); looks++) pause_a_moment();
    int left = lagging(JOBS);
    pthread_mutex_unlock(&leading);
    return left;
}

/* Whether a thread is still in a job; when this is asked, that may have ended long ago. */
int eyas_lagging(void) { return lagging(JOBS); }

/* How many tasks were computed again since the process began, as their thread had no core. */
long eyas_computed_again(void) { return atomic_load(&computed_again); }
