/*
 * Grows the last partition of an MBR disk, or a mounted ext4, to the space
 * that there is: the guest's image is small and its disk need not be.
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
 *   grow partition DISK NUMBER       e.g. grow partition /dev/vda 2
 *   grow fs DIRECTORY DEVICE         DEVICE is mounted on DIRECTORY
 */

#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/statfs.h>
#include <unistd.h>

#ifndef EXT4_IOC_RESIZE_FS
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)
#endif

#define SECTOR 512             /* bytes; the unit of an MBR */

static int fail(const char *what)
{
    perror(what);
    return 1;
}

static uint64_t device_size(int fd)
{
    uint64_t size = 0;

    if (ioctl(fd, BLKGETSIZE64, &size) < 0)
        perror("BLKGETSIZE64");
    return size;
}

static int grow_partition(const char *disk, int number)
{
    unsigned char mbr[SECTOR];
    unsigned char *entry = mbr + 446 + 16 * (number - 1);
    struct blkpg_partition partition;
    struct blkpg_ioctl_arg request;
    uint32_t start, length;
    uint64_t space;
    int fd = open(disk, O_RDWR);

    if (fd < 0 || pread(fd, mbr, SECTOR, 0) != SECTOR)
        return fail(disk);
    memcpy(&start, entry + 8, 4);
    memcpy(&length, entry + 12, 4);
    space = device_size(fd) / SECTOR - start;
    if (space > UINT32_MAX)    /* an MBR counts to 2 TiB */
        space = UINT32_MAX;
    if (space <= length)
        return 0;
    length = space;
    memcpy(entry + 12, &length, 4);
    if (pwrite(fd, mbr, SECTOR, 0) != SECTOR || fsync(fd) < 0)
        return fail("partition table");
    memset(&partition, 0, sizeof(partition));
    partition.start = (long long)start * SECTOR;
    partition.length = (long long)length * SECTOR;
    partition.pno = number;
    memset(&request, 0, sizeof(request));
    request.op = BLKPG_RESIZE_PARTITION;
    request.datalen = sizeof(partition);
    request.data = &partition;
    if (ioctl(fd, BLKPG, &request) < 0)
        return fail("BLKPG_RESIZE_PARTITION");
    return 0;
}

static int grow_fs(const char *directory, const char *device)
{
    int dir = open(directory, O_RDONLY);
    int dev = open(device, O_RDONLY);
    struct statfs now;
    uint64_t blocks;

    if (dir < 0 || dev < 0 || fstatfs(dir, &now) < 0)
        return fail(directory);
    blocks = device_size(dev) / now.f_bsize;
    if (ioctl(dir, EXT4_IOC_RESIZE_FS, &blocks) < 0)
        return fail("EXT4_IOC_RESIZE_FS");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "partition") == 0)
        return grow_partition(argv[2], atoi(argv[3]));
    if (argc == 4 && strcmp(argv[1], "fs") == 0)
        return grow_fs(argv[2], argv[3]);
    fprintf(stderr, "usage: grow partition DISK NUMBER\n"
                    "       grow fs DIRECTORY DEVICE\n");
    return 2;
}
