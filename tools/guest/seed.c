/*
 * Tells the kernel that its random numbers are good enough: without that,
 * making a file system waits four seconds for them on an emulated processor.
 * They are not good. No secret is ever made in this guest.
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

#include <fcntl.h>
#include <linux/random.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <time.h>

int main(void)
{
    struct {
        struct rand_pool_info info;
        uint64_t data[8];
    } seed;
    struct timespec now;
    int fd = open("/dev/urandom", O_WRONLY);
    unsigned i;

    for (i = 0; i < 8; i++) {
        clock_gettime(CLOCK_REALTIME, &now);
        seed.data[i] = (uint64_t)now.tv_sec << 32 ^ now.tv_nsec;
    }
    seed.info.entropy_count = 8 * sizeof(seed.data);    /* bits */
    seed.info.buf_size = sizeof(seed.data);             /* bytes */
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &seed) < 0) {
        perror("seed");
        return 1;
    }
    return 0;
}
