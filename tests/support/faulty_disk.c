/* A disk that fails, by LD_PRELOAD. FAULTY_DISK="KIND NUMBER FOLDER" in the environment, asked at each call:
 *   full N, quota N    writes below FOLDER fail with ENOSPC or EDQUOT after N bytes
 *   inodes N           no file or folder can be made below it after N
 *   readonly 0         nothing can be written, made or renamed below it
 * FOLDER is an absolute path. Counts are those of one process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long used;
static char kind[16], folder[4096];
static long limit;

static int asked(void) {
    const char *words = getenv("FAULTY_DISK");
    return words && sscanf(words, "%15s %ld %4095s", kind, &limit, folder) == 3;
}

static int below(int directory, const char *path) {
    char whole[8300], base[4096];
    if (!path) return 0;
    if (path[0] == '/') return !strncmp(path, folder, strlen(folder));
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return !strncmp(whole, folder, strlen(folder));
}

/* 0, or the error of a change of the folder below which `path` lies. `makes`: it would be a new name. */
static int change(int directory, const char *path, int makes) {
    if (!asked() || !below(directory, path)) return 0;
    if (!strcmp(kind, "readonly")) return EROFS;
    if (!strcmp(kind, "inodes") && makes && used++ >= limit) return ENOSPC;
    return 0;
}

static int opening(int directory, const char *path, int flags) {
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return 0;
    struct stat found;
    int makes = (flags & O_CREAT) && fstatat(directory, path, &found, 0) != 0;
    return change(directory, path, makes);
}

static int writing(int file, size_t size) {
    if (!asked() || (strcmp(kind, "full") && strcmp(kind, "quota"))) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    used += size;
    return used > limit ? (strcmp(kind, "quota") ? ENOSPC : EDQUOT) : 0;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAIL(error, value) do { int e = (error); if (e) { errno = e; return value; } } while (0)

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    REAL(name); FAIL(opening(AT_FDCWD, path, flags), -1); return real(path, flags, mode); }
#define OPENAT(name) int name(int directory, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    REAL(name); FAIL(opening(directory, path, flags), -1); return real(directory, path, flags, mode); }
#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    REAL(name); int flags = mode[0] == 'r' ? (strchr(mode, '+') ? O_RDWR : O_RDONLY) : O_WRONLY | O_CREAT; \
    FAIL(opening(AT_FDCWD, path, flags), NULL); return real(path, mode); }
#define PWRITE(name, offset_type) ssize_t name(int file, const void *data, size_t size, offset_type offset) { \
    REAL(name); FAIL(writing(file, size), -1); return real(file, data, size, offset); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write); FAIL(writing(file, size), -1); return real(file, data, size);
}

ssize_t writev(int file, const struct iovec *parts, int number) {
    REAL(writev);
    size_t size = 0;
    for (int i = 0; i < number; i++) size += parts[i].iov_len;
    FAIL(writing(file, size), -1);
    return real(file, parts, number);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir); struct stat found;
    if (stat(path, &found)) FAIL(change(AT_FDCWD, path, 1), -1);
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename); FAIL(change(AT_FDCWD, to, 0), -1); return real(from, to);
}

int unlink(const char *path) {
    REAL(unlink); FAIL(change(AT_FDCWD, path, 0), -1); return real(path);
}

int rmdir(const char *path) {
    REAL(rmdir); FAIL(change(AT_FDCWD, path, 0), -1); return real(path);
}
