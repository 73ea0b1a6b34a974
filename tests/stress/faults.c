/* Makes the N-th call fail: preloaded by test_faults.py into a host or a drain, before moetrace's own library.

   FAULT_CALL   malloc, mmap, open, ftruncate, fallocate, write, fsync, rename, mkdir, unlink, ...; see below
   FAULT_ERRNO  what it fails with; for write also "short": half of the bytes are written
   FAULT_NTH    which call of it, counted from 1 among those that FAULT_ONLY lets through; 0: none, only count
   FAULT_ONLY   for malloc and mmap: called out of an object whose path holds this text; for the rest: paths that do
   FAULT_LOG    file that the number of calls is written to when the process ends */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static const char * call_wanted, * only;
static int          error_wanted;
static long         nth;
static atomic_long  n_calls;
static __thread int inside;

static int number_of(const char * name) {
    return !name ? 0 : !strcmp(name, "ENOSPC") ? ENOSPC : !strcmp(name, "EIO") ? EIO : !strcmp(name, "EINTR") ? EINTR :
        !strcmp(name, "ENOMEM") ? ENOMEM : !strcmp(name, "EACCES") ? EACCES : !strcmp(name, "short") ? -1 : 0;
}

__attribute__((constructor)) static void begin(void) {
    call_wanted  = getenv("FAULT_CALL");
    only         = getenv("FAULT_ONLY");
    error_wanted = number_of(getenv("FAULT_ERRNO"));
    nth          = getenv("FAULT_NTH") ? atol(getenv("FAULT_NTH")) : 0;
}

__attribute__((destructor)) static void end(void) {
    const char * path = getenv("FAULT_LOG");
    if (path) {
        FILE * f = fopen(path, "w");
        if (f) {
            fprintf(f, "%ld\n", (long) n_calls);
            fclose(f);
        }
    }
}

/* whether this call is the one */
static int is_hit(const char * call) {
    return call_wanted && strcmp(call, call_wanted) == 0 && atomic_fetch_add(&n_calls, 1) + 1 == nth;
}

static int from_object(const void * caller) {
    Dl_info info;
    return !only || (dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, only));
}

static int of_path(const char * path) { return !only || (path && strstr(path, only)); }

static int of_file(int fd) {
    char link[64], path[4096];
    if (!only) {
        return 1;
    }
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof(path) - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0 && strstr(path, only) != NULL;
}

static int wants(const char * call) { return call_wanted && strcmp(call, call_wanted) == 0; }

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

/* operator new of the library that is linked in statically comes here, too */
extern void * __libc_malloc(size_t);
void * malloc(size_t size) {
    if (!inside && wants("malloc")) {
        inside = 1;
        const int hit = from_object(__builtin_return_address(0)) && is_hit("malloc");
        inside = 0;
        if (hit) {
            errno = ENOMEM;
            return NULL;
        }
    }
    return __libc_malloc(size);
}

void * mmap(void * at, size_t size, int protection, int flags, int fd, off_t offset) {
    if (wants("mmap") && fd >= 0 && of_file(fd) && is_hit("mmap")) {
        errno = error_wanted;
        return MAP_FAILED;
    }
    return REAL(mmap)(at, size, protection, flags, fd, offset);
}

int posix_fallocate(int fd, off_t offset, off_t size) {
    return wants("fallocate") && of_file(fd) && is_hit("fallocate") ? error_wanted : REAL(posix_fallocate)(fd, offset, size);
}

static int open_failed(const char * path) {
    if (wants("open") && of_path(path) && is_hit("open")) {
        errno = error_wanted;
        return 1;
    }
    return 0;
}

int open(const char * path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return open_failed(path) ? -1 : REAL(open)(path, flags, mode);
}

int open64(const char * path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return open_failed(path) ? -1 : REAL(open64)(path, flags, mode);
}

#define FAILS(call, test) (wants(call) && (test) && is_hit(call) ? (errno = error_wanted, 1) : 0)

int ftruncate(int fd, off_t size)   { return FAILS("ftruncate", of_file(fd)) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return FAILS("ftruncate", of_file(fd)) ? -1 : REAL(ftruncate64)(fd, size); }
int fsync(int fd)                   { return FAILS("fsync", of_file(fd)) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd)               { return FAILS("fsync", of_file(fd)) ? -1 : REAL(fdatasync)(fd); }
int rename(const char * a, const char * b) { return FAILS("rename", of_path(b)) ? -1 : REAL(rename)(a, b); }
int unlink(const char * path)       { return FAILS("unlink", of_path(path)) ? -1 : REAL(unlink)(path); }
int mkdir(const char * path, mode_t mode) { return FAILS("mkdir", of_path(path)) ? -1 : REAL(mkdir)(path, mode); }

ssize_t write(int fd, const void * data, size_t size) {
    if (wants("write") && of_file(fd) && is_hit("write")) {
        if (error_wanted < 0) {
            size = (size + 1)/2;
        } else {
            errno = error_wanted;
            return -1;
        }
    }
    return REAL(write)(fd, data, size);
}

static ssize_t pwrite_or_fail(int fd, const void * data, size_t size, off64_t offset) {
    if (wants("write") && of_file(fd) && is_hit("write")) {
        if (error_wanted < 0) {
            size = (size + 1)/2;
        } else {
            errno = error_wanted;
            return -1;
        }
    }
    return REAL(pwrite64)(fd, data, size, offset);
}

ssize_t pwrite(int fd, const void * data, size_t size, off_t offset)     { return pwrite_or_fail(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void * data, size_t size, off64_t offset) { return pwrite_or_fail(fd, data, size, offset); }
