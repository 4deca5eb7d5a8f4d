/* Something happens at the n-th call that touches a disk: it fails, or the process dies.

   Preloaded (LD_PRELOAD), this stands before the C library's functions that write to a disk and, if asked, those that
   begin to read from it. It counts the calls on what lies below FAULT_ROOTS (folders, colons between them), from 1, and
   writes each to the file FAULT_LOG: number, function, kind (0 changes something, 1 takes room, 2 reads), path. Call
   FAULT_AT then comes to grief as FAULT_MODE says; a process that forks sets both for each child by fault_arm instead:

       count       nothing happens
       eio         the call fails with EIO
       eio-on      it and all after it fail with EIO, as on a disk that is dead
       read        the call fails with EIO, and calls that begin to read are counted too
       enospc      it and all after it that take room fail with ENOSPC, as on a disk that is full
       kill        the process dies before the call
       kill-after  ... after it

   fsync and fdatasync are counted, never done: a killed process takes nothing with it that was written. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

enum kind { CHANGE, ROOM, READ };
enum mode { OFF, COUNT, EIO_ONCE, EIO_ON, READ_ONCE, ENOSPC_ON, KILL, KILL_AFTER };
static const char *const MODES[] = {"off", "count", "eio", "eio-on", "read", "enospc", "kill", "kill-after"};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static enum mode mode = OFF;
static long fault_at = 0;
static long counted = 0;
static int log_fd = -1;
static const char *roots = "";
static __thread int is_dying = 0;

/* Count from 1 again, and let something happen at call `number`; -1 if there is no such mode. */
int fault_arm(long number, const char *name) {
    for (unsigned i = 0; i < sizeof MODES / sizeof *MODES; i++) {
        if (strcmp(MODES[i], name) == 0) {
            fault_at = number;
            counted = 0;
            mode = (enum mode)i;
            return 0;
        }
    }
    return -1;
}

__attribute__((constructor)) static void set_up(void) {
    const char *log = getenv("FAULT_LOG"), *at = getenv("FAULT_AT"), *name = getenv("FAULT_MODE");
    roots = getenv("FAULT_ROOTS") ? getenv("FAULT_ROOTS") : "";
    if (log) log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (name && fault_arm(at ? atol(at) : 0, name) != 0) abort();
}

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static int is_below_roots(const char *path) {
    for (const char *root = roots; *root;) {
        size_t length = strcspn(root, ":");
        if (length && strncmp(path, root, length) == 0 && (path[length] == '/' || !path[length])) return 1;
        root += length + (root[length] == ':');
    }
    return 0;
}

/* Spell a name below the folder `at` in full: its folder without links, then the name itself, which may be a link. */
static const char *path_at(int at, const char *name) {
    static __thread char full[2 * PATH_MAX];
    char given[2 * PATH_MAX], folder[PATH_MAX];
    if (at == AT_FDCWD || *name == '/')
        snprintf(given, sizeof given, "%s%s", strchr(name, '/') ? "" : "./", name);
    else
        snprintf(given, sizeof given, "/proc/self/fd/%d/%s", at, name);
    char *base = strrchr(given, '/');
    *base++ = 0;
    if (!realpath(*given ? given : "/", folder)) return "";
    snprintf(full, sizeof full, "%s/%s", folder, base);
    return full;
}

static const char *path_of(int fd) {
    static __thread char full[PATH_MAX];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, full, sizeof full - 1);
    full[length < 0 ? 0 : length] = 0;
    return full;
}

/* Count and log a call; give the error that it is to fail with, or 0. */
static int step(const char *function, enum kind kind, const char *path) {
    int before = errno, failure = 0;
    if (mode == OFF || (kind == READ && mode != READ_ONCE) || !is_below_roots(path)) return 0;
    pthread_mutex_lock(&lock);
    long number = ++counted;
    char line[2 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%ld %s %d %s\n", number, function, kind, path);
    if (log_fd >= 0) syscall(SYS_write, log_fd, line, (size_t)length);
    if (number == fault_at && mode == KILL) kill(getpid(), SIGKILL);
    is_dying = number == fault_at && mode == KILL_AFTER;
    if (number == fault_at && (mode == EIO_ONCE || mode == READ_ONCE)) failure = EIO;
    if (number >= fault_at && mode == EIO_ON) failure = EIO;
    if (number >= fault_at && mode == ENOSPC_ON && kind == ROOM) failure = ENOSPC;
    pthread_mutex_unlock(&lock);
    errno = before;
    return failure;
}

static void done(void) {
    if (is_dying) kill(getpid(), SIGKILL);
}

#define STEP(FUNCTION, KIND, PATH, FAILED)                                              \
    do {                                                                                \
        int failure = step(#FUNCTION, KIND, PATH);                                      \
        if (failure) {                                                                  \
            errno = failure;                                                            \
            return FAILED;                                                              \
        }                                                                               \
    } while (0)

#define PASS_ON(TYPE, FUNCTION, KIND, PATH, FAILED, ...)                                \
    do {                                                                                \
        STEP(FUNCTION, KIND, PATH, FAILED);                                             \
        TYPE result = ((__typeof__(&FUNCTION))real(#FUNCTION))(__VA_ARGS__);            \
        done();                                                                         \
        return result;                                                                  \
    } while (0)

/* What opens. */

static enum kind kind_of_open(int flags) {
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) return ROOM;
    return (flags & O_ACCMODE) == O_RDONLY ? READ : CHANGE;
}

#define OPEN(FUNCTION, PATH, PARAMETERS, ...)                                           \
    int FUNCTION PARAMETERS {                                                           \
        va_list rest;                                                                   \
        va_start(rest, flags);                                                          \
        mode_t bits = kind_of_open(flags) == ROOM ? va_arg(rest, mode_t) : 0;           \
        va_end(rest);                                                                   \
        PASS_ON(int, FUNCTION, kind_of_open(flags), PATH, -1, __VA_ARGS__, bits);       \
    }

OPEN(open, path_at(AT_FDCWD, path), (const char *path, int flags, ...), path, flags)
OPEN(open64, path_at(AT_FDCWD, path), (const char *path, int flags, ...), path, flags)
OPEN(openat, path_at(at, path), (int at, const char *path, int flags, ...), at, path, flags)
OPEN(openat64, path_at(at, path), (int at, const char *path, int flags, ...), at, path, flags)

int creat(const char *path, mode_t bits) { PASS_ON(int, creat, ROOM, path_at(AT_FDCWD, path), -1, path, bits); }
int creat64(const char *path, mode_t bits) { PASS_ON(int, creat64, ROOM, path_at(AT_FDCWD, path), -1, path, bits); }
DIR *opendir(const char *path) { PASS_ON(DIR *, opendir, READ, path_at(AT_FDCWD, path), NULL, path); }
DIR *fdopendir(int fd) { PASS_ON(DIR *, fdopendir, READ, path_of(fd), NULL, fd); }

/* What writes into an open file. */

#define ON_FD(TYPE, FUNCTION, KIND, PARAMETERS, ...) \
    TYPE FUNCTION PARAMETERS { PASS_ON(TYPE, FUNCTION, KIND, path_of(fd), -1, __VA_ARGS__); }

ON_FD(ssize_t, write, ROOM, (int fd, const void *data, size_t count), fd, data, count)
ON_FD(ssize_t, pwrite, ROOM, (int fd, const void *data, size_t count, off_t at), fd, data, count, at)
ON_FD(ssize_t, pwrite64, ROOM, (int fd, const void *data, size_t count, off64_t at), fd, data, count, at)
ON_FD(ssize_t, writev, ROOM, (int fd, const struct iovec *parts, int count), fd, parts, count)
ON_FD(ssize_t, pwritev, ROOM, (int fd, const struct iovec *parts, int count, off_t at), fd, parts, count, at)
ON_FD(ssize_t, pwritev64, ROOM, (int fd, const struct iovec *parts, int count, off64_t at), fd, parts, count, at)
ON_FD(ssize_t, pwritev2, ROOM, (int fd, const struct iovec *parts, int count, off_t at, int flags), fd, parts, count,
      at, flags)
ON_FD(ssize_t, pwritev64v2, ROOM, (int fd, const struct iovec *parts, int count, off64_t at, int flags), fd, parts,
      count, at, flags)
ON_FD(ssize_t, sendfile, ROOM, (int fd, int from, off_t *at, size_t count), fd, from, at, count)
ON_FD(ssize_t, sendfile64, ROOM, (int fd, int from, off64_t *at, size_t count), fd, from, at, count)
ON_FD(ssize_t, copy_file_range, ROOM,
      (int from, off64_t *from_at, int fd, off64_t *at, size_t count, unsigned int flags), from, from_at, fd, at, count,
      flags)
ON_FD(int, ftruncate, ROOM, (int fd, off_t length), fd, length)
ON_FD(int, ftruncate64, ROOM, (int fd, off64_t length), fd, length)
ON_FD(int, fallocate, ROOM, (int fd, int how, off_t at, off_t length), fd, how, at, length)
ON_FD(int, fallocate64, ROOM, (int fd, int how, off64_t at, off64_t length), fd, how, at, length)
ON_FD(int, fchmod, CHANGE, (int fd, mode_t bits), fd, bits)
ON_FD(int, futimens, CHANGE, (int fd, const struct timespec times[2]), fd, times)
ON_FD(int, fsetxattr, CHANGE, (int fd, const char *name, const void *value, size_t size, int flags), fd, name, value,
      size, flags)

/* These two give their error back, errno stays as it is. */
#define FALLOCATE(FUNCTION, OFFSET)                                                     \
    int FUNCTION(int fd, OFFSET at, OFFSET length) {                                    \
        int failure = step(#FUNCTION, ROOM, path_of(fd));                               \
        if (failure) return failure;                                                    \
        int result = ((__typeof__(&FUNCTION))real(#FUNCTION))(fd, at, length);          \
        done();                                                                         \
        return result;                                                                  \
    }

FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

#define SYNC(FUNCTION)                                                                  \
    int FUNCTION(int fd) {                                                              \
        STEP(FUNCTION, CHANGE, path_of(fd), -1);                                        \
        int is_ours = is_below_roots(path_of(fd));                                      \
        int result = is_ours ? 0 : ((__typeof__(&FUNCTION))real(#FUNCTION))(fd);        \
        done();                                                                         \
        return result;                                                                  \
    }

SYNC(fsync)
SYNC(fdatasync)

/* What changes a folder. */

#define ON_NAME(FUNCTION, KIND, AT, NAME, PARAMETERS, ...) \
    int FUNCTION PARAMETERS { PASS_ON(int, FUNCTION, KIND, path_at(AT, NAME), -1, __VA_ARGS__); }

ON_NAME(rename, CHANGE, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_NAME(renameat, CHANGE, to_at, to, (int at, const char *from, int to_at, const char *to), at, from, to_at, to)
ON_NAME(renameat2, CHANGE, to_at, to, (int at, const char *from, int to_at, const char *to, unsigned int flags), at,
        from, to_at, to, flags)
ON_NAME(link, ROOM, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_NAME(linkat, ROOM, to_at, to, (int at, const char *from, int to_at, const char *to, int flags), at, from, to_at, to,
        flags)
ON_NAME(symlink, ROOM, AT_FDCWD, to, (const char *text, const char *to), text, to)
ON_NAME(symlinkat, ROOM, at, to, (const char *text, int at, const char *to), text, at, to)
ON_NAME(unlink, CHANGE, AT_FDCWD, path, (const char *path), path)
ON_NAME(unlinkat, CHANGE, at, path, (int at, const char *path, int flags), at, path, flags)
ON_NAME(rmdir, CHANGE, AT_FDCWD, path, (const char *path), path)
ON_NAME(mkdir, ROOM, AT_FDCWD, path, (const char *path, mode_t bits), path, bits)
ON_NAME(mkdirat, ROOM, at, path, (int at, const char *path, mode_t bits), at, path, bits)
ON_NAME(truncate, ROOM, AT_FDCWD, path, (const char *path, off_t length), path, length)
ON_NAME(truncate64, ROOM, AT_FDCWD, path, (const char *path, off64_t length), path, length)
ON_NAME(chmod, CHANGE, AT_FDCWD, path, (const char *path, mode_t bits), path, bits)
ON_NAME(fchmodat, CHANGE, at, path, (int at, const char *path, mode_t bits, int flags), at, path, bits, flags)
ON_NAME(setxattr, CHANGE, AT_FDCWD, path,
        (const char *path, const char *name, const void *value, size_t size, int flags), path, name, value, size, flags)
ON_NAME(lsetxattr, CHANGE, AT_FDCWD, path,
        (const char *path, const char *name, const void *value, size_t size, int flags), path, name, value, size, flags)
ON_NAME(utimensat, CHANGE, at, path, (int at, const char *path, const struct timespec times[2], int flags), at, path,
        times, flags)
