/* Requests to a disk inside a guest, so many of a kind, and how long they take.
 *
 *   guest_io DEVICE fill BYTES
 *   guest_io DEVICE read|write BYTES_OF_A_REQUEST DEPTH COUNT BYTES SEED
 *
 * O_DIRECT, DEPTH threads, each waiting for its request; places among the first BYTES, at random for requests of 4096
 * bytes, one after another for larger ones. Writes end with one flush, which counts. Every block of 4096 bytes that is
 * written begins with its own number, and a block that is read with another one ends the program. The answer is one
 * line of JSON. Exit status: 0 all right, 1 wrong bytes or failed requests, 2 wrong usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, MAX_DEPTH = 64, FILL_BYTES = 1 << 20 };

static int fd, is_write;
static uint64_t request_bytes, count, range_bytes, seed;
static _Atomic uint64_t next_request, longest_ns;

static void fail(const char *what)
{
    fprintf(stderr, "guest_io: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* splitmix64 */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static void *run(void *unused)
{
    (void)unused;
    char *buffer = aligned_alloc(BLOCK, request_bytes);
    if (buffer == NULL)
        fail("memory");
    memset(buffer, 0x5a, request_bytes);
    uint64_t places = range_bytes / request_bytes;
    for (uint64_t number; (number = next_request++) < count;) {
        uint64_t place = (request_bytes > BLOCK ? number : mix(seed ^ mix(number))) % places * request_bytes;
        if (is_write)
            for (uint64_t at = 0; at < request_bytes; at += BLOCK)
                *(uint64_t *)(buffer + at) = place + at;
        uint64_t begun_ns = now_ns();
        ssize_t done = is_write ? pwrite(fd, buffer, request_bytes, (off_t)place)
                                : pread(fd, buffer, request_bytes, (off_t)place);
        uint64_t took_ns = now_ns() - begun_ns, longest = longest_ns;
        if (done != (ssize_t)request_bytes)
            fail("a request");
        while (took_ns > longest && !atomic_compare_exchange_weak(&longest_ns, &longest, took_ns))
            ;
        for (uint64_t at = 0; at < request_bytes; at += BLOCK)
            if (*(uint64_t *)(buffer + at) != place + at) {
                fprintf(stderr, "guest_io: byte %llu of the disk holds something else\n", (unsigned long long)(place + at));
                exit(1);
            }
    }
    free(buffer);
    return NULL;
}

int main(int argc, char **argv)
{
    int is_fill = argc == 4 && !strcmp(argv[2], "fill");
    if (!is_fill && argc != 8) {
        fprintf(stderr, "usage: guest_io DEVICE fill BYTES | DEVICE read|write BYTES DEPTH COUNT RANGE SEED\n");
        return 2;
    }
    is_write = strcmp(argv[2], "read") != 0;
    request_bytes = is_fill ? FILL_BYTES : strtoull(argv[3], NULL, 10);
    range_bytes = strtoull(argv[is_fill ? 3 : 6], NULL, 10);
    uint64_t depth = is_fill ? 1 : strtoull(argv[4], NULL, 10);
    count = is_fill ? range_bytes / FILL_BYTES : strtoull(argv[5], NULL, 10);
    seed = is_fill ? 0 : strtoull(argv[7], NULL, 10);
    if (depth < 1 || depth > MAX_DEPTH || request_bytes < BLOCK || request_bytes % BLOCK || range_bytes < request_bytes) {
        fprintf(stderr, "guest_io: a number is out of range\n");
        return 2;
    }
    fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        fail(argv[1]);
    pthread_t threads[MAX_DEPTH];
    uint64_t begun_ns = now_ns();
    for (uint64_t i = 0; i < depth; i++)
        if ((errno = pthread_create(&threads[i], NULL, run, NULL)))
            fail("a thread");
    for (uint64_t i = 0; i < depth; i++)
        pthread_join(threads[i], NULL);
    if (is_write && fdatasync(fd))
        fail("the flush");
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"longest_ms\": %.3f}\n", (unsigned long long)count,
           (now_ns() - begun_ns) / 1e9, longest_ns / 1e6);
    return 0;
}
