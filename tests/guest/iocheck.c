/* iocheck: verified random I/O, run inside guests.
 *
 * Writes random 4 KiB blocks with O_DIRECT, reads back at random and compares every byte with what the block must hold;
 * flushes now and then; at the end flushes and reads all it wrote. The first wrong byte ends it at once, status 3.
 *
 *   iocheck --device PATH (--seconds N | --writes N) [--depth D] [--seed S] [--range BYTES] [--progress]
 *           [--report-file FILE] [--buffered]
 *   iocheck --device PATH --verify-only --flushed N --seed S [--depth D] [--range BYTES] ...
 *
 * Exit status: 0 all right, 1 I/O errors (but no wrong byte), 2 wrong usage or cannot start, 3 a wrong byte.
 * Its last line is the report, one JSON object; with --progress a line every second says that it is alive.
 *
 * A block
 *   0   8  magic          24  8  seed
 *   8   8  block number   32  8  checksum of all the rest
 *   16  8  generation     40     pseudo-random words of (seed, block number, generation)
 *
 * The generation is the number of the write, from 1 on, and which block a write goes to depends on seed, number, depth
 * and range only. So one number says what must be on the disk after a restart: `flushed`, which the progress lines and
 * the report carry: every write up to it was answered before a flush that was answered too. --verify-only repeats the
 * sequence up to there and reads each of its blocks: it must hold its last write up to `flushed`, or a later one of its
 * own. Use another seed for every run on the same disk, or an older run's blocks pass for later writes. A write that
 * was under way when all stopped may be there in part, by sectors of 512 bytes: such a block is counted as `torn`, and
 * is wrong unless each of its sectors is of its last flushed write or of a later one of its own.
 *
 * Each of the D threads has its own writes (number mod D) and its own blocks, so that no two are under way to one block.
 * After a failed write its block may hold either content: it is not checked until it is written again, and `flushed` of
 * its thread stands still.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK_BYTES = 4096, WORDS = BLOCK_BYTES / 8, MAX_DEPTH = 64, MAX_ERRORS = 10000 };
enum { SECTOR_BYTES = 512, SECTORS = BLOCK_BYTES / SECTOR_BYTES, SEARCH_WRITES = 1 << 20 };
enum { MAGIC, NUMBER, GENERATION, SEED, CHECKSUM, FILLING };
enum { STATUS_ERRORS = 1, STATUS_USAGE = 2, STATUS_WRONG = 3 };

static const uint64_t MAGIC_VALUE = 0x4d554c4c494f434bULL; /* "MULLIOCK" */

struct thread {
    pthread_t thread;
    uint64_t index;            /* 0 .. depth - 1 */
    uint64_t random;           /* state of its own choices, which do not touch the sequence of writes */
    uint64_t *buffer, *expected;
    uint32_t *written;         /* blocks it has written, each once */
    uint64_t written_count;
    uint64_t answered;         /* number of its last write that was answered */
    bool has_failed_write;
    _Atomic uint64_t flushed;  /* all its writes up to this number are durable */
};

static const char *device, *report_file;
static int fd = -1;
static uint64_t seed = 1, depth = 1, range_bytes, blocks, write_limit, seconds, flushed_given;
static bool verify_only, with_progress, buffered;
static uint32_t *generations;  /* of each block: number of its last write that was answered, 0 for unknown */
static struct thread threads[MAX_DEPTH];
static _Atomic uint64_t writes, reads, flushes, errors, wrong, torn, longest_ns, finished;
static _Atomic bool stopping;
static uint64_t started_ns;
static pthread_mutex_t verdict = PTHREAD_MUTEX_INITIALIZER;

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

static uint64_t next_random(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15ULL;
    return mix(*state);
}

/* The block that a write goes to. */
static uint64_t target(uint64_t number)
{
    return mix(seed ^ mix(number)) % (blocks / depth) * depth + (number - 1) % depth;
}

static uint64_t checksum(const uint64_t *block)
{
    uint64_t sum = 0;
    for (int i = 0; i < WORDS; i++)
        if (i != CHECKSUM)
            sum = ((sum << 7 | sum >> 57) ^ block[i]) * 0x100000001b3ULL;
    return sum;
}

static void fill(uint64_t *block, uint64_t number, uint64_t generation)
{
    uint64_t state = mix(seed) ^ mix(number + 1) ^ mix(~generation);
    block[MAGIC] = MAGIC_VALUE;
    block[NUMBER] = number;
    block[GENERATION] = generation;
    block[SEED] = seed;
    for (int i = FILLING; i < WORDS; i++)
        block[i] = next_random(&state);
    block[CHECKSUM] = checksum(block);
}

static uint64_t flushed_by_all(void)
{
    uint64_t least = UINT64_MAX;
    for (uint64_t i = 0; i < depth; i++)
        if (threads[i].flushed < least)
            least = threads[i].flushed;
    return least;
}

static void print_report(FILE *file)
{
    fprintf(file,
            "{\"writes\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"flushes\": %" PRIu64 ", \"wrong\": %" PRIu64
            ", \"torn\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"longest_pause_ms\": %" PRIu64 ", \"flushed\": %" PRIu64
            ", \"seed\": %" PRIu64 ", \"depth\": %" PRIu64 ", \"range\": %" PRIu64 ", \"elapsed_ms\": %" PRIu64 "}\n",
            (uint64_t)writes, (uint64_t)reads, (uint64_t)flushes, (uint64_t)wrong, (uint64_t)torn,
            (uint64_t)errors, longest_ns / 1000000, verify_only ? flushed_given : flushed_by_all(), seed, depth, blocks * BLOCK_BYTES,
            (now_ns() - started_ns) / 1000000);
    fflush(file);
}

static void report(void)
{
    if (report_file) {
        char temporary[4096];
        snprintf(temporary, sizeof temporary, "%s.new", report_file);
        FILE *file = fopen(temporary, "w");
        if (file == NULL) {
            fprintf(stderr, "iocheck: cannot write %s: %s\n", temporary, strerror(errno));
        } else {
            print_report(file);
            fsync(fileno(file));
            if (fclose(file) != 0 || rename(temporary, report_file) != 0)
                fprintf(stderr, "iocheck: cannot write %s: %s\n", report_file, strerror(errno));
        }
    }
    print_report(stdout);
}

/* Say what was found where something else belongs, and end. */
static void wrong_bytes(uint64_t number, const uint64_t *found, const uint64_t *expected)
{
    pthread_mutex_lock(&verdict); /* never given back: one thread speaks, and the process ends */
    int byte = 0;
    while (byte < BLOCK_BYTES && ((const char *)found)[byte] == ((const char *)expected)[byte])
        byte++;
    wrong = 1;
    fprintf(stderr, "iocheck: WRONG DATA in block %" PRIu64 " (byte %" PRIu64 " of the disk, %d of the block): "
            "expected write %" PRIu64 ", found ",
            number, number * BLOCK_BYTES + (uint64_t)byte, byte, expected[GENERATION]);
    bool is_zero = true;
    for (int i = 0; i < WORDS; i++)
        is_zero = is_zero && found[i] == 0;
    if (is_zero)
        fprintf(stderr, "zeros\n");
    else if (found[MAGIC] != MAGIC_VALUE)
        fprintf(stderr, "something that is not ours: %016" PRIx64 "\n", found[MAGIC]);
    else
        fprintf(stderr, "write %" PRIu64 " of block %" PRIu64 ", seed %" PRIu64 ", checksum %s\n", found[GENERATION],
                found[NUMBER], found[SEED], found[CHECKSUM] == checksum(found) ? "right: an older or misplaced write"
                                                                               : "wrong: a torn or damaged block");
    report();
    _exit(STATUS_WRONG);
}

static void io_error(const char *what, uint64_t number)
{
    uint64_t before = atomic_fetch_add(&errors, 1);
    if (before < 10)
        fprintf(stderr, "iocheck: cannot %s block %" PRIu64 ": %s\n", what, number, strerror(errno));
    if (before + 1 >= MAX_ERRORS)
        stopping = true;
}

static void took(uint64_t since_ns)
{
    uint64_t duration = now_ns() - since_ns, longest = longest_ns;
    while (duration > longest && !atomic_compare_exchange_weak(&longest_ns, &longest, duration))
        ;
}

static bool read_block(uint64_t number, uint64_t *buffer)
{
    uint64_t since = now_ns();
    errno = 0;
    ssize_t got = pread(fd, buffer, BLOCK_BYTES, (off_t)(number * BLOCK_BYTES));
    took(since);
    if (got != BLOCK_BYTES) {
        if (got >= 0)
            errno = EIO;
        io_error("read", number);
        return false;
    }
    reads++;
    return true;
}

static void check_block(struct thread *self, uint64_t number)
{
    if (generations[number] == 0 || !read_block(number, self->buffer))
        return;
    fill(self->expected, number, generations[number]);
    if (memcmp(self->buffer, self->expected, BLOCK_BYTES) != 0)
        wrong_bytes(number, self->buffer, self->expected);
}

static void write_block(struct thread *self, uint64_t generation)
{
    uint64_t number = target(generation);
    fill(self->buffer, number, generation);
    bool is_new = generations[number] == 0;
    uint64_t since = now_ns();
    errno = 0;
    ssize_t put = pwrite(fd, self->buffer, BLOCK_BYTES, (off_t)(number * BLOCK_BYTES));
    took(since);
    if (put != BLOCK_BYTES) {
        if (put >= 0)
            errno = EIO;
        io_error("write", number);
        self->has_failed_write = true;
        generations[number] = 0;
        return;
    }
    writes++;
    self->answered = generation;
    generations[number] = (uint32_t)generation;
    /* A block whose write failed once is listed twice; that costs one more read and nothing else. */
    if (is_new && self->written_count < blocks / depth)
        self->written[self->written_count++] = (uint32_t)number;
}

static void flush(struct thread *self)
{
    uint64_t since = now_ns();
    int failed = fdatasync(fd);
    took(since);
    if (failed) {
        self->has_failed_write = true; /* what it covered may be lost, and a later flush would not say so */
        io_error("flush", 0);
        return;
    }
    flushes++;
    if (!self->has_failed_write)
        self->flushed = self->answered;
}

static void *run(void *argument)
{
    struct thread *self = argument;
    uint64_t generation = self->index + 1;
    while (!stopping && generation <= write_limit) {
        uint64_t choice = next_random(&self->random);
        if (choice % 100 < 45 && self->written_count) {
            check_block(self, self->written[(choice >> 16) % self->written_count]);
            continue;
        }
        write_block(self, generation);
        generation += depth;
        if ((choice >> 16) % 32 == 0)
            flush(self);
    }
    flush(self);
    if (generation > write_limit && !self->has_failed_write)
        self->flushed = write_limit; /* it has no more writes to do up to there */
    for (uint64_t i = 0; i < self->written_count && !(stopping && errors >= MAX_ERRORS); i++)
        check_block(self, self->written[i]);
    finished++;
    return NULL;
}

static void mark_sectors(bool *known, const uint64_t *found, const uint64_t *expected)
{
    for (int i = 0; i < SECTORS; i++)
        known[i] = known[i] || memcmp((const char *)found + i * SECTOR_BYTES,
                                      (const char *)expected + i * SECTOR_BYTES, SECTOR_BYTES) == 0;
}

/* Whether each sector is of the block's last flushed write or of a later write to it. */
static bool is_torn(struct thread *self, uint64_t number)
{
    bool known[SECTORS] = {false};
    fill(self->expected, number, generations[number]);
    mark_sectors(known, self->buffer, self->expected);
    for (uint64_t later = flushed_given + 1; later <= flushed_given + SEARCH_WRITES; later++) {
        if (target(later) != number)
            continue;
        fill(self->expected, number, later);
        mark_sectors(known, self->buffer, self->expected);
    }
    for (int i = 0; i < SECTORS; i++)
        if (!known[i])
            return false;
    return true;
}

/* After a restart: every block that the first `flushed_given` writes went to. */
static void verify(struct thread *self)
{
    for (uint64_t generation = 1; generation <= flushed_given; generation++)
        generations[target(generation)] = (uint32_t)generation;
    for (uint64_t number = 0; number < blocks && !stopping; number++) {
        if (generations[number] == 0 || !read_block(number, self->buffer))
            continue;
        uint64_t found = self->buffer[GENERATION];
        bool may_be_later = found > generations[number] && target(found) == number;
        fill(self->expected, number, may_be_later ? found : generations[number]);
        if (memcmp(self->buffer, self->expected, BLOCK_BYTES) == 0)
            continue;
        if (is_torn(self, number)) {
            torn++;
        } else {
            fill(self->expected, number, generations[number]);
            wrong_bytes(number, self->buffer, self->expected);
        }
    }
}

static void on_signal(int number)
{
    (void)number;
    stopping = true;
}

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "iocheck: %s: %s\n", what, why);
    exit(STATUS_USAGE);
}

static uint64_t parse_number(const char *name, const char *text)
{
    char *end = NULL;
    errno = 0;
    unsigned long long value = text ? strtoull(text, &end, 10) : 0;
    if (text == NULL || *text < '0' || *text > '9' || *end || errno)
        fail(name, "takes a whole number");
    return value;
}

static void parse(int argc, char **argv)
{
    bool has_flushed = false;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(name, "--verify-only") == 0) { verify_only = true; continue; }
        if (strcmp(name, "--progress") == 0) { with_progress = true; continue; }
        if (strcmp(name, "--buffered") == 0) { buffered = true; continue; }
        i++;
        if (strcmp(name, "--device") == 0) device = value;
        else if (strcmp(name, "--report-file") == 0) report_file = value;
        else if (strcmp(name, "--seconds") == 0) seconds = parse_number(name, value);
        else if (strcmp(name, "--writes") == 0) write_limit = parse_number(name, value);
        else if (strcmp(name, "--depth") == 0) depth = parse_number(name, value);
        else if (strcmp(name, "--seed") == 0) seed = parse_number(name, value);
        else if (strcmp(name, "--range") == 0) range_bytes = parse_number(name, value);
        else if (strcmp(name, "--flushed") == 0) { flushed_given = parse_number(name, value); has_flushed = true; }
        else fail(name, "is not known");
    }
    if (device == NULL)
        fail("--device", "is missing");
    if (verify_only ? !has_flushed || seconds || write_limit : has_flushed || !seconds == !write_limit)
        fail("usage", "one of --seconds N, --writes N, --verify-only --flushed N");
    if (depth < 1 || depth > MAX_DEPTH)
        fail("--depth", "is 1 to 64");
    if (write_limit > UINT32_MAX || flushed_given > UINT32_MAX)
        fail("--writes", "at most 4294967295");
    if (seconds)
        write_limit = UINT32_MAX;
}

static void open_device(void)
{
    fd = open(device, (verify_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | (buffered ? 0 : O_DIRECT));
    if (fd < 0)
        fail(device, strerror(errno));
    struct stat found;
    uint64_t size = 0;
    if (fstat(fd, &found) != 0)
        fail(device, strerror(errno));
    if (S_ISBLK(found.st_mode) ? ioctl(fd, BLKGETSIZE64, &size) != 0 : (size = (uint64_t)found.st_size, 0))
        fail(device, strerror(errno));
    if (range_bytes == 0)
        range_bytes = size;
    if (range_bytes > size)
        fail("--range", "is more than the device has");
    blocks = range_bytes / BLOCK_BYTES / depth * depth;
    if (blocks == 0 || blocks > UINT32_MAX)
        fail(device, "is too small for the depth, or too large");
}

static void *allocate(uint64_t bytes)
{
    void *memory = NULL;
    int error = posix_memalign(&memory, BLOCK_BYTES, bytes);
    if (error)
        fail("memory", strerror(error));
    memset(memory, 0, bytes);
    return memory;
}

static void run_threads(void)
{
    for (uint64_t i = 0; i < depth; i++) {
        int error = pthread_create(&threads[i].thread, NULL, run, &threads[i]);
        if (error)
            fail("thread", strerror(error));
    }
    uint64_t said_ns = started_ns;
    while (finished < depth) {
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        uint64_t now = now_ns();
        if (seconds && now - started_ns >= seconds * 1000000000u)
            stopping = true;
        if (with_progress && now - said_ns >= 1000000000u) {
            said_ns = now;
            printf("iocheck: alive elapsed_ms=%" PRIu64 " writes=%" PRIu64 " reads=%" PRIu64 " errors=%" PRIu64
                   " flushed=%" PRIu64 " longest_pause_ms=%" PRIu64 "\n",
                   (now - started_ns) / 1000000, (uint64_t)writes, (uint64_t)reads, (uint64_t)errors, flushed_by_all(),
                   longest_ns / 1000000);
            fflush(stdout);
        }
    }
    for (uint64_t i = 0; i < depth; i++)
        pthread_join(threads[i].thread, NULL);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    open_device();
    generations = allocate(blocks * sizeof *generations);
    for (uint64_t i = 0; i < depth; i++) {
        threads[i].index = i;
        threads[i].random = mix(seed + 1) ^ mix(i);
        threads[i].buffer = allocate(BLOCK_BYTES);
        threads[i].expected = allocate(BLOCK_BYTES);
        threads[i].written = verify_only ? NULL : allocate(blocks / depth * sizeof *threads[i].written);
    }
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    started_ns = now_ns();
    if (verify_only)
        verify(&threads[0]);
    else
        run_threads();
    report();
    return errors ? STATUS_ERRORS : 0;
}
