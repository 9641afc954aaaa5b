/* A network of chosen delay and rate between network namespaces, for kernels without the netem queue.

   delayed_links NAMESPACE...: makes device `eyas0` in each, reads packets there, and hands each to the namespace of its address
   10.77.0.(1 + n) once it has left its sender at the rate set and `delay` more has passed. So a sender's packets queue behind each other as
   on a card of that rate, and nothing else delays them but this program's own work, which is to be measured and named.

   A line on stdin, "MICROSECONDS BYTES_A_SECOND" (0: without limit), sets both from then on and is answered with a line. The end of stdin
   ends the program. Knows packets of IPv4; knows nothing of what they carry. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, SIZE = 65536, WAITING = 4096, AT_ONCE = 8 };

typedef struct packet {
    struct packet *next;
    int64_t due; /* nanoseconds */
    int size, to;
    unsigned char bytes[SIZE];
} packet;

typedef struct {
    int file, waiting;
    int64_t free_at; /* when what was sent before has left */
    packet *first, *last;
} sender;

static sender senders[MOST];
static packet *spare;

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int device_in(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int space = open(path, O_RDONLY), file = -1;
    struct ifreq wanted = {.ifr_name = "eyas0", .ifr_flags = IFF_TUN | IFF_NO_PI};
    if (space < 0 || setns(space, CLONE_NEWNET) || (file = open("/dev/net/tun", O_RDWR | O_NONBLOCK)) < 0 || ioctl(file, TUNSETIFF, &wanted)) {
        fprintf(stderr, "no device in namespace %s: %s\n", name, strerror(errno));
        exit(1);
    }
    close(space);
    return file;
}

/* Read what a sender has; returns whether it had something. */
static int taken(sender *from, int count, int64_t delay, double rate)
{
    int some = 0;
    for (; some < AT_ONCE && from->waiting < WAITING; some++) {
        packet *each = spare ? spare : malloc(sizeof *each);
        spare = spare ? spare->next : NULL;
        each->size = read(from->file, each->bytes, SIZE);
        each->to = each->size >= 20 && each->bytes[0] >> 4 == 4 ? each->bytes[19] - 1 : -1;
        if (each->to < 0 || each->to >= count) {
            int empty = each->size <= 0;
            each->next = spare;
            spare = each;
            if (empty)
                break;
            continue;
        }
        int64_t time = now();
        from->free_at = (from->free_at > time ? from->free_at : time) + (rate > 0 ? (int64_t)(each->size / rate * 1e9) : 0);
        each->due = from->free_at + delay;
        each->next = NULL;
        *(from->first ? &from->last->next : &from->first) = each;
        from->last = each;
        from->waiting++;
    }
    return some > 0;
}

int main(int count, char **names)
{
    count--;
    struct pollfd files[MOST + 1];
    if (count < 1 || count > MOST)
        return 1;
    for (int i = 0; i < count; i++)
        senders[i].file = device_in(names[i + 1]);
    prctl(PR_SET_TIMERSLACK, 1);
    int64_t delay = 0;
    double rate = 0;
    puts("ready");
    fflush(stdout);
    for (;;) {
        int64_t next = INT64_MAX;
        for (int i = 0; i < count; i++) {
            sender *from = senders + i;
            while (from->first && from->first->due <= now()) {
                packet *each = from->first;
                from->first = each->next;
                from->waiting--;
                if (write(senders[each->to].file, each->bytes, each->size) < 0 && errno != EIO)
                    perror("a packet is lost");
                each->next = spare;
                spare = each;
            }
            if (from->first && from->first->due < next)
                next = from->first->due;
            files[i] = (struct pollfd){from->file, from->waiting < WAITING ? POLLIN : 0, 0};
        }
        files[count] = (struct pollfd){0, POLLIN, 0};
        int64_t left = next == INT64_MAX ? 3600000000000LL : next - now();
        struct timespec wait = {left > 0 ? left / 1000000000LL : 0, left > 0 ? left % 1000000000LL : 0};
        if (ppoll(files, count + 1, &wait, NULL) <= 0)
            continue;
        for (int i = 0; i < count; i++)
            if (files[i].revents & POLLIN)
                taken(senders + i, count, delay, rate);
        if (files[count].revents) {
            char line[128];
            double microseconds;
            if (!fgets(line, sizeof line, stdin) || sscanf(line, "%lf %lf", &microseconds, &rate) != 2)
                return 0;
            delay = (int64_t)(microseconds * 1000);
            puts("set");
            fflush(stdout);
        }
    }
}
