/* Preloaded into a program, fails or kills it at the n-th operation that changes files below a folder.

   Operations are counted from fault_arm on, in the process that called it, and each is appended to a
   log with its data, from which power_loss.py makes what a disk may hold after a power failure. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE = 1, OPEN, WRITE, FSYNC, RENAME, EXCHANGE, MKDIR, UNLINK, RMDIR, TRUNCATE, CLOSE, LINK };
enum action { NOTHING, FAIL, SHORT, FULL, KILL_BEFORE, KILL_AFTER, TEAR };

struct record {
  uint32_t number, kind;
  int32_t result;
  uint32_t path_bytes, other_bytes;
  uint64_t offset, data_bytes;
} __attribute__((packed));

static char root[PATH_MAX];
static size_t root_bytes;
static pid_t owner;
static int log_fd = -1;
static uint32_t count, wanted;
static int action, fault, full;

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t real_write(int fd, const void *data, size_t bytes) {
  REAL(write);
  return real(fd, data, bytes);
}

/* Starts to count. At operation `at` (from 1; 0: none) `what` happens, with this errno if it fails. */
void fault_arm(const char *folder, const char *log, uint32_t at, int what, int number) {
  snprintf(root, sizeof root, "%s", folder);
  root_bytes = strlen(root);
  count = 0, wanted = at, action = what, fault = number, full = 0;
  log_fd = *log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
  owner = getpid();
}

/* Returns the number of operations so far, and stops to count. */
uint32_t fault_disarm(void) {
  owner = 0;
  if (log_fd >= 0) close(log_fd);
  log_fd = -1;
  return count;
}

static int armed(void) { return owner && owner == getpid(); }

static int below_root(const char *path) {
  return !strncmp(path, root, root_bytes) && (path[root_bytes] == '/' || !path[root_bytes]);
}

/* Writes the absolute path of an open file to `path`; returns whether it is below the root. */
static int path_of(int fd, char *path) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t bytes = readlink(link, path, PATH_MAX - 1);
  if (bytes <= 0) return 0;
  path[bytes] = 0;
  return *path == '/' && below_root(path);
}

/* The same for a name relative to a folder's descriptor. */
static int resolved(int folder, const char *name, char *path) {
  if (!name) return 0;
  if (*name == '/') {
    snprintf(path, PATH_MAX, "%s", name);
  } else {
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      char link[40];
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t bytes = readlink(link, base, sizeof base - 1);
      if (bytes <= 0) return 0;
      base[bytes] = 0;
    }
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
  }
  return below_root(path);
}

static void note(uint32_t number, int kind, int64_t result, const char *path, const char *other,
                 uint64_t offset, const void *data, size_t bytes) {
  if (log_fd < 0) return;
  int before = errno;
  struct record head = {number, kind, (int32_t)result, strlen(path), strlen(other), offset, bytes};
  real_write(log_fd, &head, sizeof head);
  real_write(log_fd, path, head.path_bytes);
  real_write(log_fd, other, head.other_bytes);
  if (bytes) real_write(log_fd, data, bytes);
  errno = before;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* Counts an operation. Returns its action; after FAIL errno is set, and it is not to be done. */
static int next(int kind, uint32_t *number) {
  *number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  int now = *number == wanted ? action : NOTHING;
  if (now == KILL_BEFORE) die();
  if (now == FAIL) errno = fault;
  if (now == FULL) full = 1;
  if (full && (kind == CREATE || kind == MKDIR || (kind == WRITE && now != FULL))) {
    errno = ENOSPC;
    return FAIL;
  }
  return now;
}

#define WATCHED(kind, call, path, other) \
  do { \
    uint32_t number; \
    int now = next(kind, &number); \
    if (now == FAIL) { \
      note(number, kind, -1, path, other, 0, 0, 0); \
      return -1; \
    } \
    int found = (call); \
    note(number, kind, found, path, other, 0, 0, 0); \
    if (now == KILL_AFTER) die(); \
    return found; \
  } while (0)

/* ---- Opening ---- */

static int watched_open(int (*real)(int, const char *, int, ...), int folder, const char *name, int flags,
                        mode_t mode) {
  char path[PATH_MAX];
  struct stat found;
  int writes = (flags & O_ACCMODE) != O_RDONLY && (flags & O_TMPFILE) != O_TMPFILE;
  if (!armed() || !writes || !resolved(folder, name, path)) return real(folder, name, flags, mode);
  int is_new = fstatat(folder, name, &found, AT_SYMLINK_NOFOLLOW) && flags & O_CREAT;
  const char *how = flags & O_TRUNC ? "truncate" : "";
  WATCHED(is_new ? CREATE : OPEN, real(folder, name, flags, mode), path, how);
}

#define OPEN_MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list more; \
    va_start(more, flags); \
    mode = va_arg(more, mode_t); \
    va_end(more); \
  }

int openat(int folder, const char *name, int flags, ...) {
  OPEN_MODE
  REAL(openat);
  return watched_open(real, folder, name, flags, mode);
}
int openat64(int folder, const char *name, int flags, ...) {
  OPEN_MODE
  REAL(openat64);
  return watched_open(real, folder, name, flags, mode);
}
int open(const char *name, int flags, ...) {
  OPEN_MODE
  REAL(openat);
  return watched_open(real, AT_FDCWD, name, flags, mode);
}
int open64(const char *name, int flags, ...) {
  OPEN_MODE
  REAL(openat64);
  return watched_open(real, AT_FDCWD, name, flags, mode);
}
int creat(const char *name, mode_t mode) { return open(name, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open64(name, O_WRONLY | O_CREAT | O_TRUNC, mode); }

/* The C library's own streams write without calling `write` below: they get ours. */
static ssize_t stream_write(void *fd, const char *data, size_t bytes) {
  ssize_t found = write((int)(intptr_t)fd, data, bytes);
  return found < 0 ? 0 : found;
}
static int stream_close(void *fd) { return close((int)(intptr_t)fd); }

static FILE *watched_fopen(FILE *(*real)(const char *, const char *), const char *name, const char *mode) {
  char path[PATH_MAX];
  if (!armed() || (*mode != 'w' && *mode != 'a') || strchr(mode, '+') || !resolved(AT_FDCWD, name, path))
    return real(name, mode);
  int fd = open(name, O_WRONLY | O_CREAT | O_CLOEXEC | (*mode == 'w' ? O_TRUNC : O_APPEND), 0666);
  if (fd < 0) return NULL;
  cookie_io_functions_t functions = {.write = stream_write, .close = stream_close};
  return fopencookie((void *)(intptr_t)fd, mode, functions);
}
FILE *fopen(const char *name, const char *mode) {
  REAL(fopen);
  return watched_fopen(real, name, mode);
}
FILE *fopen64(const char *name, const char *mode) {
  REAL(fopen64);
  return watched_fopen(real, name, mode);
}

int close(int fd) {
  REAL(close);
  char path[PATH_MAX];
  if (!armed() || fd == log_fd || !path_of(fd, path) || (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
    return real(fd);
  uint32_t number;
  int now = next(CLOSE, &number), saved = errno, found = real(fd);
  if (now == FAIL) errno = saved, found = -1; /* as NFS does: it is closed, and says what failed */
  note(number, CLOSE, found, path, "", 0, 0, 0);
  if (now == KILL_AFTER) die();
  return found;
}

/* ---- Data ---- */

ssize_t write(int fd, const void *data, size_t bytes) {
  char path[PATH_MAX];
  if (!armed() || fd == log_fd || !path_of(fd, path)) return real_write(fd, data, bytes);
  uint32_t number;
  int now = next(WRITE, &number);
  if (now == FAIL) {
    note(number, WRITE, -1, path, "", 0, 0, 0);
    return -1;
  }
  if (now == SHORT || now == FULL || now == TEAR) bytes = bytes > 1 ? bytes / 2 : bytes;
  struct stat found;
  off_t at = lseek(fd, 0, SEEK_CUR);
  if (fcntl(fd, F_GETFL) & O_APPEND) at = fstat(fd, &found) ? 0 : found.st_size;
  ssize_t written = real_write(fd, data, bytes);
  note(number, WRITE, written, path, "", at, data, written > 0 ? written : 0);
  if (now == KILL_AFTER || now == TEAR) die();
  return written;
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
  REAL(writev);
  char path[PATH_MAX];
  if (!armed() || !path_of(fd, path)) return real(fd, parts, number);
  for (int i = 0; i < number; i++) /* a short write is allowed */
    if (parts[i].iov_len) return write(fd, parts[i].iov_base, parts[i].iov_len);
  return 0;
}

#define SYNC(name) \
  int name(int fd) { \
    REAL(name); \
    char path[PATH_MAX]; \
    if (!armed() || !path_of(fd, path)) return real(fd); \
    WATCHED(FSYNC, real(fd), path, ""); \
  }
SYNC(fsync)
SYNC(fdatasync)

#define CUT(name, type) \
  int name(int fd, type size) { \
    REAL(name); \
    char path[PATH_MAX], text[24]; \
    if (!armed() || !path_of(fd, path)) return real(fd, size); \
    snprintf(text, sizeof text, "%lld", (long long)size); \
    WATCHED(TRUNCATE, real(fd, size), path, text); \
  }
CUT(ftruncate, off_t)
CUT(ftruncate64, off64_t)

/* ---- Names ---- */

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  REAL(renameat2);
  char path[PATH_MAX], other[PATH_MAX];
  if (!armed() || !resolved(from, old, path) || !resolved(to, new, other))
    return real(from, old, to, new, flags);
  WATCHED(flags & 2 ? EXCHANGE : RENAME, real(from, old, to, new, flags), path, other);
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int mkdirat(int folder, const char *name, mode_t mode) {
  REAL(mkdirat);
  char path[PATH_MAX];
  if (!armed() || !resolved(folder, name, path)) return real(folder, name, mode);
  WATCHED(MKDIR, real(folder, name, mode), path, "");
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int folder, const char *name, int flags) {
  REAL(unlinkat);
  char path[PATH_MAX];
  if (!armed() || !resolved(folder, name, path)) return real(folder, name, flags);
  WATCHED(flags & AT_REMOVEDIR ? RMDIR : UNLINK, real(folder, name, flags), path, "");
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
  REAL(linkat);
  char path[PATH_MAX], other[PATH_MAX];
  if (!armed() || !resolved(from, old, path) || !resolved(to, new, other))
    return real(from, old, to, new, flags);
  WATCHED(LINK, real(from, old, to, new, flags), path, other);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
