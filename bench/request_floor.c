/* The processor time of the least that a back end can do for one write at a time: wait for an eventfd, pwrite 4 KiB at a
   random place, write an eventfd; and after so many an fdatasync instead. The requests come from another process, which
   sleeps until each is answered. Usage: request_floor FILE BLOCKS COUNT FLUSH CORE-OF-THE-BACK-END CORE-OF-THE-LOAD.
   Prints microseconds a request. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096 };

static int waiter(int fd)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        err(1, "epoll");
    return epoll;
}

static void await(int epoll)
{
    struct epoll_event event;
    if (epoll_wait(epoll, &event, 1, -1) != 1)
        err(1, "epoll_wait");
}

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        err(1, "sched_setaffinity");
}

static double processor_us(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e6 + usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        errx(2, "FILE BLOCKS COUNT FLUSH CORE CORE");
    long blocks = atol(argv[2]), count = atol(argv[3]), flush = atol(argv[4]);
    int file = open(argv[1], O_RDWR | O_CLOEXEC);
    int kick = eventfd(0, EFD_CLOEXEC), call = eventfd(0, EFD_CLOEXEC);
    if (file < 0 || kick < 0 || call < 0)
        err(1, "%s", argv[1]);
    pid_t back_end = fork();
    if (back_end < 0)
        err(1, "fork");
    pin(atoi(argv[back_end ? 6 : 5]));
    int epoll = waiter(back_end ? call : kick);
    if (back_end) {
        for (long number = 0; number < count; number++) {
            eventfd_write(kick, 1);
            await(epoll);
        }
        int status;
        waitpid(back_end, &status, 0);
        return status != 0;
    }
    static char block[BLOCK];
    double begin = processor_us();
    for (long number = 0; number < count; number++) {
        await(epoll);
        if (number % (flush + 1) == flush) {
            if (fdatasync(file))
                err(1, "fdatasync");
        } else if (pwrite(file, block, BLOCK, (off_t)(random() % blocks) * BLOCK) != BLOCK)
            err(1, "pwrite");
        eventfd_write(call, 1);
    }
    printf("%.3f\n", (processor_us() - begin) / count);
    return 0;
}
