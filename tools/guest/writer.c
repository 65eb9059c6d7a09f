/*
 * The guest's writer: counts on its disks, so that an image of them shows
 * whether it holds one point in time.
 *
 * Licensed under the Apache License, Version 2.0 (the "License"); you may
 * not use this file except in compliance with the License. You may obtain
 * a copy of the License at
 *
 *      http://www.apache.org/licenses/LICENSE-2.0
 *
 * Unless required by applicable law or agreed to in writing, software
 * distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 * WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 * License for the specific language governing permissions and limitations
 * under the License.
 */

/*
 * Usage:
 *   writer raw PACE_MS CHURN DISK...     e.g. writer raw 0 1 /dev/vda
 *   writer fs PACE_MS DIRECTORY...       mounted file systems
 *
 * In each round the counter goes to ten places of the first disk, then to
 * ten of the second and so on. Every write is on the disk (O_DIRECT and
 * O_SYNC) before the next one starts, so the places of one instant, read in
 * that order, are n...n, n-1...n-1 and nothing else. After a round the
 * counter is printed.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PLACES 10
#define RECORD 4096           /* bytes; also fits disks with 4 KiB sectors */
#define AREA 65536            /* bytes; one qcow2 cluster by default */
#define MAX_DISKS 8
#define MAGIC "snapshot-counter"

#ifndef EXT4_IOC_CHECKPOINT
#define EXT4_IOC_CHECKPOINT _IOW('f', 43, uint32_t)
#endif

/* All integers are little-endian, as the machine is. */
struct record {
    char magic[16];
    uint32_t disk;
    uint32_t place;
    /* The counter fills the rest, so that a torn write shows. */
    uint64_t counter[(RECORD - 24) / 8];
};

struct disk {
    const char *path;
    uint64_t size;             /* bytes; raw mode only */
    int fd[PLACES];            /* raw mode: ten times the same */
    uint64_t offset[PLACES];   /* bytes */
};

static struct disk disks[MAX_DISKS];
static int disk_count;
static struct record *record;
static unsigned char *noise;   /* one area of random content */

static void fail(const char *format, ...)
{
    va_list args;

    printf("writer failed: ");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf(": %s\n", strerror(errno));
    fflush(stdout);
    exit(1);
}

static void put(int fd, const void *data, size_t length, uint64_t offset)
{
    ssize_t done = pwrite(fd, data, length, offset);

    if (done != (ssize_t)length)
        fail("writing %zu bytes at %llu gave %zd", length,
             (unsigned long long)offset, done);
}

static void put_counter(int d, int place, uint64_t counter)
{
    unsigned i;

    memcpy(record->magic, MAGIC, sizeof(record->magic));
    record->disk = d;
    record->place = place;
    for (i = 0; i < sizeof(record->counter) / 8; i++)
        record->counter[i] = counter;
    put(disks[d].fd[place], record, RECORD, disks[d].offset[place]);
}

/* The counter that a place holds; 0 if it was never written. */
static uint64_t get_counter(int d, int place)
{
    ssize_t done = pread(disks[d].fd[place], record, RECORD,
                         disks[d].offset[place]);

    if (done < 0)
        fail("reading %s", disks[d].path);
    if (done != RECORD || memcmp(record->magic, MAGIC, 16) != 0)
        return 0;
    return record->counter[0];
}

static void open_raw(struct disk *disk)
{
    int fd = open(disk->path, O_RDWR | O_DIRECT | O_SYNC);
    int i;

    if (fd < 0)
        fail("opening %s", disk->path);
    if (ioctl(fd, BLKGETSIZE64, &disk->size) < 0)
        fail("size of %s", disk->path);
    if (disk->size < PLACES * AREA) {
        errno = ENOSPC;
        fail("%s", disk->path);
    }
    for (i = 0; i < PLACES; i++) {
        disk->fd[i] = fd;
        disk->offset[i] = disk->size / PLACES * i / AREA * AREA;
    }
}

/*
 * One directory a place: ext4 spreads top-level directories over its block
 * groups, so the places lie apart. The files are made once and overwritten
 * in place ever after.
 */
static void open_fs(struct disk *disk)
{
    char path[256];
    struct stat st;
    uint32_t flags = 0;
    int d = disk - disks;
    int i;

    for (i = 0; i < PLACES; i++) {
        snprintf(path, sizeof(path), "%s/%d", disk->path, i);
        if (mkdir(path, 0755) < 0 && errno != EEXIST)
            fail("making %s", path);
        snprintf(path, sizeof(path), "%s/%d/place", disk->path, i);
        disk->fd[i] = open(path, O_RDWR | O_CREAT | O_DIRECT | O_SYNC, 0644);
        if (disk->fd[i] < 0 || fstat(disk->fd[i], &st) < 0)
            fail("opening %s", path);
        if (st.st_size < RECORD)
            put_counter(d, i, 0);
    }
    if (syncfs(disk->fd[0]) < 0)
        fail("syncing %s", disk->path);
    /* Out of the journal, so that a reader without one finds the files. */
    ioctl(disk->fd[0], EXT4_IOC_CHECKPOINT, &flags);
}

/* A small text file, rewritten in place and synced. */
static void put_text(int fd, uint64_t value)
{
    char text[32];
    int length = snprintf(text, sizeof(text), "%20llu\n",
                          (unsigned long long)value);

    put(fd, text, length, 0);
    if (fsync(fd) < 0)
        fail("fsync");
}

static int open_text(const char *directory, const char *name)
{
    char path[256];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", directory, name);
    fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0)
        fail("opening %s", path);
    return fd;
}

static uint64_t count_boot(const char *directory)
{
    char text[32] = "";
    int fd = open_text(directory, "boots");
    uint64_t boots;

    if (pread(fd, text, sizeof(text) - 1, 0) < 0)
        fail("reading boots");
    boots = strtoull(text, NULL, 10) + 1;
    put_text(fd, boots);
    close(fd);
    return boots;
}

/* xorshift64: quick, and good enough to be incompressible. */
static uint64_t random64(void)
{
    static uint64_t state;

    while (state == 0)
        if (getrandom(&state, sizeof(state), GRND_NONBLOCK) < 0)
            state = time(NULL) * 2654435761u + 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int is_place(const struct disk *disk, uint64_t offset)
{
    int i;

    for (i = 0; i < PLACES; i++)
        if (disk->offset[i] == offset)
            return 1;
    return 0;
}

static void fill_area(struct disk *disk, uint64_t area)
{
    uint64_t *words = (uint64_t *)noise;
    unsigned i;

    if (is_place(disk, area * AREA))
        return;
    for (i = 0; i < AREA / 8; i++)
        words[i] = random64();
    put(disk->fd[0], noise, AREA, area * AREA);
}

/*
 * What else a busy guest does to its disk: data where there was none, other
 * data where there was some, and discards.
 */
static void churn(struct disk *disk, uint64_t round)
{
    uint64_t areas = disk->size / AREA;
    uint64_t range[2] = {0, AREA};

    /* A stride prime to most sizes: in time every area gets written. */
    fill_area(disk, round * 7919 % areas);
    fill_area(disk, (round - random64() % (round + 1)) * 7919 % areas);
    range[0] = random64() % areas * AREA;
    /* A disk without discard refuses, and that is fine. */
    if (round % 4 == 0 && !is_place(disk, range[0]))
        ioctl(disk->fd[0], BLKDISCARD, range);
}

static void wait_ms(long ms)
{
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000};

    if (ms > 0)
        nanosleep(&pause, NULL);
}

int main(int argc, char **argv)
{
    int raw = argc > 1 && strcmp(argv[1], "raw") == 0;
    int first = raw ? 4 : 3;
    int churning = 0;
    int counter_fd = -1;
    uint64_t counter, round;
    long pace_ms;
    int d, place;

    if (argc <= first || argc - first > MAX_DISKS) {
        fprintf(stderr, "usage: writer raw PACE_MS CHURN DISK...\n"
                        "       writer fs PACE_MS DIRECTORY...\n");
        return 2;
    }
    pace_ms = atol(argv[2]);
    if (raw)
        churning = atoi(argv[3]);
    if (posix_memalign((void **)&record, RECORD, RECORD) != 0 ||
        posix_memalign((void **)&noise, RECORD, AREA) != 0)
        fail("memory");
    for (d = 0; d < argc - first; d++) {
        disks[d].path = argv[first + d];
        if (raw)
            open_raw(&disks[d]);
        else
            open_fs(&disks[d]);
        disk_count++;
    }
    /* The first place of the first disk is always the most advanced. */
    counter = get_counter(0, 0);
    printf("booted from %llu\n", (unsigned long long)counter);
    if (!raw) {
        printf("boots %llu\n",
               (unsigned long long)count_boot(disks[0].path));
        counter_fd = open_text(disks[0].path, "counter");
    }
    fflush(stdout);
    for (round = 0;; round++) {
        counter++;
        for (d = 0; d < disk_count; d++)
            for (place = 0; place < PLACES; place++)
                put_counter(d, place, counter);
        if (!raw)
            put_text(counter_fd, counter);
        printf("counter %llu\n", (unsigned long long)counter);
        fflush(stdout);
        if (churning)
            for (d = 0; d < disk_count; d++)
                churn(&disks[d], round);
        wait_ms(pace_ms);
    }
}
