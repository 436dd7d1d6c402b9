/* A drive whose flush takes SLOW_FLUSH_MS milliseconds, for a process that this library is loaded into (LD_PRELOAD).

   fsync and fdatasync do what they do; then they wait until a flush of an imagined drive has made safe what they wrote.
   The drive, one for each process, makes one flush at a time and holds what it was given before. So whoever comes waits for a flush that began
   after the last sector was written to the device (the kernel counts them: /sys/dev/block/MAJOR:MINOR/stat), all who
   wait share it, and where nothing was written since the last one nothing is waited for. One block more does not count:
   ext4's journal writes its superblock behind a commit, and past the drive's cache (FUA). */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define SUPERBLOCK_SECTORS 8

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
static unsigned long long flushed; /* sectors that had been written when the last flush that has ended began */
static int busy;

static unsigned long long written_sectors(int descriptor)
{
    struct stat file;
    char path[64], line[512];
    unsigned long long sectors = 0;
    if (fstat(descriptor, &file))
        return 0;
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/stat", major(file.st_dev), minor(file.st_dev));
    int statistics = open(path, O_RDONLY | O_CLOEXEC);
    if (statistics < 0) {
        fprintf(stderr, "slow_flush: %s is not there: measure on a file system of one block device (--scratch)\n", path);
        abort();
    }
    ssize_t length = read(statistics, line, sizeof line - 1);
    close(statistics);
    line[length > 0 ? length : 0] = 0;
    sscanf(line, "%*u %*u %*u %*u %*u %*u %llu", &sectors);
    return sectors;
}

static void flush(int descriptor)
{
    const char *setting = getenv("SLOW_FLUSH_MS");
    long nanoseconds = setting ? (long)(1e6 * atof(setting)) : 0;
    if (nanoseconds <= 0)
        return;
    unsigned long long wanted = written_sectors(descriptor);
    pthread_mutex_lock(&lock);
    while (flushed + SUPERBLOCK_SECTORS < wanted) {
        if (busy) {
            pthread_cond_wait(&ended, &lock);
            continue;
        }
        busy = 1;
        pthread_mutex_unlock(&lock);
        unsigned long long begun_at = written_sectors(descriptor);
        struct timespec left = {nanoseconds / 1000000000, nanoseconds % 1000000000};
        while (nanosleep(&left, &left) == -1 && errno == EINTR)
            ;
        pthread_mutex_lock(&lock);
        flushed = begun_at;
        busy = 0;
        pthread_cond_broadcast(&ended);
    }
    pthread_mutex_unlock(&lock);
}

static int synced(const char *name, int descriptor)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = real(descriptor);
    int error = errno;
    if (result == 0)
        flush(descriptor);
    errno = error;
    return result;
}

int fsync(int descriptor) { return synced("fsync", descriptor); }

int fdatasync(int descriptor) { return synced("fdatasync", descriptor); }
