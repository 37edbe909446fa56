/* A vhost-user front-end that drives one queue of a block back-end and checks every byte that it reads.
 *
 * Spec: QEMU "Vhost-user Protocol"; VIRTIO 1.2 sections 2.7 and 5.2. Every 4096-byte block of the disk holds a
 * pattern made from its own number, so that a wrong block, a torn one and an old one are all seen.
 *
 * usage: vhost_loadgen SOCKET PID fill|read|seqread|write|randwrite KEY=VALUE...
 *   depth=32        requests in flight (1..128)
 *   count=100000    requests to measure (fill: all blocks)
 *   warm=0          requests before measuring, of the same kind
 *   first=0         first block of the range that is used
 *   blocks=0        blocks in that range, 0: to the end of the disk
 *   bytes=4096      bytes of one request, a multiple of 4096
 *   indirect=1      one indirect table per request, as Linux guests do; 0: three chained descriptors
 *   event_idx=1     suppress notifications by index
 *   wait=busy       busy: poll the used ring; eventfd: sleep until called
 *   inflight=1      share an inflight region, as QEMU does
 *   seed=1
 *   flush=0         every so many requests are followed by a FLUSH, which counts as one
 *   report=0        after every so many requests a line: seconds of CLOCK_MONOTONIC, requests done
 *   longest=0       1: such a line has a third number, the longest of the requests since the line before, in us
 * PID is the back-end's process: its CPU time, all threads, is read right before and after the measured part.
 * The answer is one line of JSON. Exit status: 0 all right, 1 wrong bytes or failed requests, 2 cannot run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define QUEUE_SIZE 128
#define MEMORY_BYTES (256ul << 20)
#define GUEST_BASE 0x100000ul /* guest and user addresses differ, so that a mix-up is seen */
#define BLOCK 4096ul
#define MAX_REQUEST (1ul << 20)
#define FLUSH 4 /* VIRTIO_BLK_T_FLUSH */

enum { GET_FEATURES = 1, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE, SET_LOG_FD, SET_VRING_NUM,
       SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR,
       GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE, GET_CONFIG = 24,
       GET_INFLIGHT_FD = 31, SET_INFLIGHT_FD };

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags, idx, ring[QUEUE_SIZE], used_event; };
struct used_elem { uint32_t id, len; };
struct used { uint16_t flags, idx; struct used_elem ring[QUEUE_SIZE]; uint16_t avail_event; };
struct header { uint32_t type, ioprio; uint64_t sector; };
struct slot { struct header header; struct desc table[3]; uint8_t status; char pad[7]; } __attribute__((aligned(64)));
struct message { uint32_t request, flags, size; uint8_t payload[512]; } __attribute__((packed));

static char *memory;
static int sock, kick_fd, call_fd;
static struct desc *descs;
static volatile struct avail *avail;
static volatile struct used *used;
static struct slot *slots;
static char *data;
static uint64_t block_of[QUEUE_SIZE];
static uint16_t avail_idx, seen_idx, kicked_idx;
static long depth = 32, count = 100000, warm, first, blocks, request_bytes = 4096, indirect = 1, event_idx = 1,
            inflight = 1, seed = 1, busy_wait = 1, flush_every, report_every, with_longest;
static double submitted_s[QUEUE_SIZE], longest_s;
static uint64_t bad, failed, calls, kicks;

static void die(const char *what) { perror(what); exit(2); }

static void send_message(uint32_t request, const void *payload, uint32_t size, int fd)
{
    struct message m = { request, 1, size, { 0 } };
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { &m, 12 + size };
    struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1 };
    memcpy(m.payload, payload, size);
    if (fd >= 0) {
        h.msg_control = control;
        h.msg_controllen = sizeof control;
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    if (sendmsg(sock, &h, 0) != (ssize_t)(12 + size)) die("sendmsg");
}

static int receive(uint32_t request, void *payload, uint32_t size)
{
    struct message m;
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { &m, 12 };
    struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    int fd = -1;
    if (recvmsg(sock, &h, MSG_WAITALL) != 12) die("reply");
    struct cmsghdr *c = CMSG_FIRSTHDR(&h);
    if (c) memcpy(&fd, CMSG_DATA(c), sizeof fd);
    if (m.request != request || m.size > sizeof m.payload || m.size < size) {
        fprintf(stderr, "reply %u of %u bytes to request %u\n", m.request, m.size, request);
        exit(2);
    }
    if (recv(sock, m.payload, m.size, MSG_WAITALL) != (ssize_t)m.size) die("reply's payload");
    memcpy(payload, m.payload, size);
    return fd;
}

static uint64_t ask_u64(uint32_t request)
{
    uint64_t value;
    send_message(request, "", 0, -1);
    receive(request, &value, sizeof value);
    return value;
}

static void tell_u64(uint32_t request, uint64_t value, int fd) { send_message(request, &value, sizeof value, fd); }

static void tell_state(uint32_t request, uint32_t index, uint32_t num)
{
    uint32_t state[2] = { index, num };
    send_message(request, state, sizeof state, -1);
}

static uint64_t guest(const volatile void *p) { return (uint64_t)((const volatile char *)p - memory) + GUEST_BASE; }

static void set_up(const char *path)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strncpy(a.sun_path, path, sizeof a.sun_path - 1);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(sock, (struct sockaddr *)&a, sizeof a)) die("connect");
    int fd = memfd_create("guest", 0);
    if (fd < 0 || ftruncate(fd, MEMORY_BYTES)) die("memfd");
    memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) die("mmap");
    descs = (void *)memory;
    avail = (void *)(memory + 0x1000);
    used = (void *)(memory + 0x2000);
    slots = (void *)(memory + 0x4000);
    data = memory + 0x100000;
    kick_fd = eventfd(0, EFD_NONBLOCK);
    call_fd = eventfd(0, EFD_NONBLOCK);

    uint64_t wanted = 1ul << 32 | 1ul << 30 | 1ul << 9 | (event_idx ? 1ul << 29 : 0) | (indirect ? 1ul << 28 : 0);
    uint64_t features = ask_u64(GET_FEATURES);
    if ((features & wanted) != wanted) { fprintf(stderr, "features %lx lack some of %lx\n", features, wanted); exit(2); }
    uint64_t protocol = ask_u64(GET_PROTOCOL_FEATURES) & (1ul << 9 | 1ul << 12);
    tell_u64(SET_PROTOCOL_FEATURES, protocol, -1);
    send_message(SET_OWNER, "", 0, -1);
    uint8_t config[12 + 60] = { 0 };
    uint32_t config_bytes = 60;
    memcpy(config + 4, &config_bytes, 4);
    send_message(GET_CONFIG, config, sizeof config, -1);
    receive(GET_CONFIG, config, sizeof config);
    uint64_t capacity;
    memcpy(&capacity, config + 12, 8);
    if (!blocks) blocks = capacity / 8 - first;
    if (inflight && protocol & 1ul << 12) {
        struct { uint64_t size, offset; uint16_t queues, queue_size; uint32_t pad; } in = { 0, 0, 1, QUEUE_SIZE, 0 };
        send_message(GET_INFLIGHT_FD, &in, sizeof in, -1);
        int region = receive(GET_INFLIGHT_FD, &in, sizeof in);
        send_message(SET_INFLIGHT_FD, &in, sizeof in, region);
    }
    tell_u64(SET_FEATURES, wanted, -1);
    uint64_t table[5] = { 1, GUEST_BASE, MEMORY_BYTES, (uint64_t)memory, 0 };
    send_message(SET_MEM_TABLE, table, sizeof table, fd);
    tell_state(SET_VRING_NUM, 0, QUEUE_SIZE);
    tell_state(SET_VRING_BASE, 0, 0);
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } address = {
        0, 0, (uint64_t)descs, (uint64_t)used, (uint64_t)avail, 0 };
    send_message(SET_VRING_ADDR, &address, sizeof address, -1);
    tell_u64(SET_VRING_CALL, 0, call_fd);
    tell_u64(SET_VRING_KICK, 0, kick_fd);
    tell_state(SET_VRING_ENABLE, 0, 1);
}

static void pattern(uint64_t *words, uint64_t block)
{
    for (unsigned i = 0; i < BLOCK / 8; i++) words[i] = block * 0x9E3779B97F4A7C15ul ^ (uint64_t)i << 48 ^ block;
}

static uint64_t next_random(void)
{
    static uint64_t state;
    if (!state) state = 0x2545F4914F6CDD1Dul * (uint64_t)(seed + 1);
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static double now_s(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t)) die("clock");
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void submit(unsigned i, uint64_t block, int type)
{
    struct slot *s = &slots[i];
    char *buffer = data + i * MAX_REQUEST;
    int is_write = type == 1;
    s->header = (struct header){ type, 0, block * (BLOCK / 512) };
    s->status = 0xFF;
    block_of[i] = block;
    if (with_longest) submitted_s[i] = now_s(CLOCK_MONOTONIC);
    if (is_write)
        for (long at = 0; at < request_bytes; at += BLOCK) pattern((uint64_t *)(buffer + at), block + at / BLOCK);
    struct desc *d = indirect ? s->table : &descs[i * 3];
    unsigned n = indirect ? 0 : i * 3;
    d[0] = (struct desc){ guest(&s->header), 16, 1, n + 1 };
    d[1] = (struct desc){ guest(buffer), request_bytes, is_write ? 1 : 3, n + 2 };
    d[2] = (struct desc){ guest(&s->status), 1, 2, 0 };
    if (type == FLUSH) d[1] = d[2];
    if (indirect) descs[i] = (struct desc){ guest(s->table), (type == FLUSH ? 2 : 3) * sizeof *d, 4, 0 };
    avail->ring[avail_idx % QUEUE_SIZE] = indirect ? i : i * 3;
    __atomic_store_n(&avail->idx, ++avail_idx, __ATOMIC_RELEASE);
}

static void kick(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    int wanted = event_idx ? (uint16_t)(avail_idx - used->avail_event - 1) < (uint16_t)(avail_idx - kicked_idx)
                           : !(used->flags & 1);
    if (wanted && avail_idx != kicked_idx) {
        kicks++;
        if (eventfd_write(kick_fd, 1)) die("kick");
    }
    kicked_idx = avail_idx;
}

static void sleep_until_used(void)
{
    avail->used_event = seen_idx;
    avail->flags = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) == seen_idx) {
        struct pollfd p[2] = { { call_fd, POLLIN, 0 }, { sock, POLLIN, 0 } };
        if (poll(p, 2, 30000) <= 0) { fprintf(stderr, "no answer in 30 s\n"); exit(2); }
        if (p[1].revents) { fprintf(stderr, "the back-end closed the connection\n"); exit(2); }
        eventfd_t n;
        if (!eventfd_read(call_fd, &n)) calls++;
    }
}

static void complete(unsigned i, int is_write)
{
    static uint64_t expected[BLOCK / 8];
    char *buffer = data + i * MAX_REQUEST;
    if (with_longest) {
        double took_s = now_s(CLOCK_MONOTONIC) - submitted_s[i];
        if (took_s > longest_s) longest_s = took_s;
    }
    if (slots[i].status) { failed++; return; }
    if (is_write || slots[i].header.type == FLUSH) return;
    for (long at = 0; at < request_bytes; at += BLOCK) {
        pattern(expected, block_of[i] + at / BLOCK);
        if (memcmp(expected, buffer + at, BLOCK)) bad++;
    }
}

static void run(long total, int is_write, int is_sequential)
{
    uint64_t per_request = request_bytes / BLOCK, places = blocks / per_request, position = 0;
    long submitted = 0, completed = 0, reported = 0;
    unsigned free_slots[QUEUE_SIZE], free_count = 0;
    for (long i = depth - 1; i >= 0; i--) free_slots[free_count++] = i;
    if (busy_wait) { /* no calls: an event index that is never passed, or the flag */
        avail->flags = 1;
        avail->used_event = seen_idx - 1;
    }
    while (completed < total) {
        while (free_count && submitted < total) {
            if (flush_every && submitted % (flush_every + 1) == flush_every) {
                submit(free_slots[--free_count], 0, FLUSH);
                submitted++;
                continue;
            }
            uint64_t place = is_sequential ? position++ : next_random() % places;
            submit(free_slots[--free_count], first + place * per_request, is_write);
            submitted++;
        }
        kick();
        uint16_t now = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE);
        if (now == seen_idx && !busy_wait) {
            sleep_until_used();
            now = __atomic_load_n(&used->idx, __ATOMIC_ACQUIRE);
        }
        while (seen_idx != now) {
            unsigned id = used->ring[seen_idx++ % QUEUE_SIZE].id;
            unsigned i = indirect ? id : id / 3;
            if (i >= (unsigned)depth) { fprintf(stderr, "used element %u was never submitted\n", id); exit(2); }
            complete(i, is_write);
            free_slots[free_count++] = i;
            completed++;
        }
        if (busy_wait) avail->used_event = seen_idx - 1;
        if (report_every && completed - reported >= report_every) {
            reported = completed;
            printf("%.6f %ld", now_s(CLOCK_MONOTONIC), completed);
            if (with_longest) printf(" %.0f", longest_s * 1e6);
            putchar('\n');
            longest_s = 0;
            fflush(stdout);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 4) { fprintf(stderr, "usage: vhost_loadgen SOCKET PID fill|read|seqread|write|randwrite KEY=VALUE...\n"); return 2; }
    struct { const char *name; long *value; } keys[] = {
        { "depth", &depth }, { "count", &count }, { "warm", &warm }, { "first", &first }, { "blocks", &blocks },
        { "bytes", &request_bytes }, { "indirect", &indirect }, { "event_idx", &event_idx }, { "inflight", &inflight },
        { "seed", &seed }, { "flush", &flush_every }, { "report", &report_every },
        { "longest", &with_longest } };
    for (int i = 4; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value) { fprintf(stderr, "%s: KEY=VALUE\n", argv[i]); return 2; }
        *value++ = 0;
        if (!strcmp(argv[i], "wait")) { busy_wait = !strcmp(value, "busy"); continue; }
        size_t k = 0;
        while (k < sizeof keys / sizeof *keys && strcmp(keys[k].name, argv[i])) k++;
        if (k == sizeof keys / sizeof *keys) { fprintf(stderr, "unknown key %s\n", argv[i]); return 2; }
        *keys[k].value = strtol(value, NULL, 0);
    }
    if (depth < 1 || depth > (indirect ? QUEUE_SIZE : QUEUE_SIZE / 3) || request_bytes % BLOCK
        || request_bytes < (long)BLOCK || request_bytes > (long)MAX_REQUEST) {
        fprintf(stderr, "depth or bytes out of range\n");
        return 2;
    }
    int is_fill = !strcmp(argv[3], "fill"), is_write = is_fill || strstr(argv[3], "write") != NULL;
    clockid_t cpu;
    if (clock_getcpuclockid(atoi(argv[2]), &cpu)) { fprintf(stderr, "no process %s\n", argv[2]); return 2; }
    set_up(argv[1]);
    if (is_fill) count = blocks / (request_bytes / BLOCK);
    if (warm) run(warm, is_write, 0);
    kicks = calls = 0;
    double cpu_s = now_s(cpu), wall_s = now_s(CLOCK_MONOTONIC);
    run(count, is_write, is_fill || !strcmp(argv[3], "write") || !strcmp(argv[3], "seqread"));
    cpu_s = now_s(cpu) - cpu_s;
    wall_s = now_s(CLOCK_MONOTONIC) - wall_s;
    printf("{\"requests\": %ld, \"cpu_us\": %.4f, \"wall_us\": %.4f, \"kicks\": %lu, \"calls\": %lu, \"bad\": %lu, "
           "\"failed\": %lu}\n",
           count, cpu_s / count * 1e6, wall_s / count * 1e6, kicks, calls, bad, failed);
    return bad || failed ? 1 : 0;
}
