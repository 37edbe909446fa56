/* A load generator for NBD servers on unix sockets: random reads at a fixed depth on one connection, every byte checked.
 *
 *   nbd_loadgen SOCKET BLOCKS COUNT DEPTH SEED
 *
 * Reads COUNT blocks of 4096 bytes at random places among the first BLOCKS; prints the seconds that took, on one line.
 * Block N holds the words `(N * 0x9E3779B97F4A7C15) ^ (i << 48) ^ N`, i = 0 to 511, little-endian. Negotiates structured
 * replies, as QEMU, libnbd and Linux' own clients do, and takes simple ones too. Requests that replies made room for are
 * sent together, as those clients do when they are busy. Exit status 1 and a line on standard error when anything is
 * wrong.
 */
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, MAX_DEPTH = 256, BUFFER = 4 << 20 };

static uint8_t buffer[BUFFER];
static uint64_t places[MAX_DEPTH];

static void fail(const char *what)
{
    fprintf(stderr, "nbd_loadgen: %s (%s)\n", what, strerror(errno));
    exit(1);
}

static void send_all(int fd, const void *data, size_t size)
{
    for (const uint8_t *at = data; size;) {
        ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent <= 0)
            fail("cannot send");
        at += sent;
        size -= sent;
    }
}

static void receive_all(int fd, void *data, size_t size)
{
    for (uint8_t *at = data; size;) {
        ssize_t got = recv(fd, at, size, 0);
        if (got <= 0)
            fail("cannot receive");
        at += got;
        size -= got;
    }
}

static uint16_t get16(const uint8_t *at) { uint16_t v; memcpy(&v, at, 2); return be16toh(v); }
static uint32_t get32(const uint8_t *at) { uint32_t v; memcpy(&v, at, 4); return be32toh(v); }
static uint64_t get64(const uint8_t *at) { uint64_t v; memcpy(&v, at, 8); return be64toh(v); }
static void put16(uint8_t *at, uint16_t v) { v = htobe16(v); memcpy(at, &v, 2); }
static void put32(uint8_t *at, uint32_t v) { v = htobe32(v); memcpy(at, &v, 4); }
static void put64(uint8_t *at, uint64_t v) { v = htobe64(v); memcpy(at, &v, 8); }

/* Send an option and swallow its replies up to the ACK. */
static void ask(int fd, uint32_t option, const void *data, uint32_t length)
{
    uint8_t head[20];
    memcpy(head, "IHAVEOPT", 8);
    put32(head + 8, option);
    put32(head + 12, length);
    send_all(fd, head, 16);
    send_all(fd, data, length);
    for (;;) {
        receive_all(fd, head, 20);
        uint32_t kind = get32(head + 12), left = get32(head + 16);
        if (kind >> 31 || left > BUFFER)
            fail("an option was refused");
        receive_all(fd, buffer, left);
        if (kind == 1)
            return;
    }
}

static int open_export(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        fail("cannot connect");
    uint8_t greeting[18], flags[4] = { 0, 0, 0, 3 }, go[6] = { 0 };
    receive_all(fd, greeting, sizeof greeting);
    send_all(fd, flags, sizeof flags);
    ask(fd, 8, "", 0);
    ask(fd, 7, go, sizeof go);
    return fd;
}

static uint64_t random_state;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void put_request(uint8_t *at, uint64_t cookie, uint64_t block)
{
    places[cookie] = block;
    put32(at, 0x25609513);
    put16(at + 4, 0);
    put16(at + 6, 0);
    put64(at + 8, cookie);
    put64(at + 16, block * BLOCK);
    put32(at + 24, BLOCK);
}

static void check(const uint8_t *data, uint64_t block)
{
    const uint64_t first = block * UINT64_C(0x9E3779B97F4A7C15) ^ block;
    uint64_t differs = 0;
    for (uint64_t i = 0; i < BLOCK / 8; i++) {
        uint64_t word;
        memcpy(&word, data + 8 * i, 8);
        differs |= le64toh(word) ^ first ^ i << 48;
    }
    if (differs)
        fail("wrong data");
}

/* The length of the reply at `at` of which `have` bytes are there, 0 when more must come; its cookie. */
static size_t take_reply(const uint8_t *at, size_t have, uint64_t *cookie)
{
    if (have < 16)
        return 0;
    *cookie = get64(at + 8);
    if (*cookie >= MAX_DEPTH)
        fail("an unknown cookie");
    if (get32(at) == 0x67446698) {
        if (get32(at + 4))
            fail("a request failed");
        if (have < 16 + BLOCK)
            return 0;
        check(at + 16, places[*cookie]);
        return 16 + BLOCK;
    }
    if (have < 28 + BLOCK)
        return 0;
    if (get32(at) != 0x668E33EF || get16(at + 4) != 1 || get16(at + 6) != 1 || get32(at + 16) != 8 + BLOCK)
        fail("a reply that is not one piece of data");
    if (get64(at + 20) != places[*cookie] * BLOCK)
        fail("data of another place");
    check(at + 28, places[*cookie]);
    return 28 + BLOCK;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        fail("usage: nbd_loadgen SOCKET BLOCKS COUNT DEPTH SEED");
    const uint64_t blocks = strtoull(argv[2], 0, 10), count = strtoull(argv[3], 0, 10);
    const uint64_t depth = strtoull(argv[4], 0, 10);
    random_state = strtoull(argv[5], 0, 10) * 2654435761u + 1;
    if (!blocks || depth < 1 || depth > MAX_DEPTH || count < depth)
        fail("a number that makes no sense");
    int fd = open_export(argv[1]);
    static uint8_t requests[MAX_DEPTH * 28];
    uint64_t sent = 0, done = 0;
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (; sent < depth; sent++)
        put_request(requests + 28 * sent, sent, next_random() % blocks);
    send_all(fd, requests, 28 * depth);
    size_t have = 0;
    while (done < count) {
        ssize_t got = recv(fd, buffer + have, BUFFER - have, 0);
        if (got <= 0)
            fail("the server hung up");
        have += got;
        size_t at = 0, length, batch = 0;
        uint64_t cookie;
        while ((length = take_reply(buffer + at, have - at, &cookie))) {
            at += length;
            done++;
            if (sent < count) {
                put_request(requests + 28 * batch++, cookie, next_random() % blocks);
                sent++;
            }
        }
        memmove(buffer, buffer + at, have - at);
        have -= at;
        if (batch)
            send_all(fd, requests, 28 * batch);
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%.6f\n", ended.tv_sec - begun.tv_sec + (ended.tv_nsec - begun.tv_nsec) / 1e9);
    return 0;
}
