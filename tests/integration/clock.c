/* Preloaded into a program, moves the wall clock that Python's interpreter sees: by so many seconds
   as the file $WARMSTATE_TEST_CLOCK says. TensorFlow's threads keep the machine's clock, because
   the kernel measures their timeouts by it, as it would after a real jump. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Returns whether the code at this address is the interpreter's. dladdr is slow: answers are kept. */
static int is_python(void *caller) {
  static struct { void *caller; int answer; } kept[1024];
  size_t place = ((size_t)caller >> 2) % 1024;
  if (kept[place].caller == caller) return kept[place].answer;
  Dl_info from;
  int answer = dladdr(caller, &from) && from.dli_fname && strstr(from.dli_fname, "python") &&
               !strstr(from.dli_fname, "site-packages");
  kept[place].answer = answer;
  kept[place].caller = caller;
  return answer;
}

static double jump(void *caller) {
  if (!is_python(caller)) return 0;
  const char *path = getenv("WARMSTATE_TEST_CLOCK");
  FILE *file = path ? fopen(path, "r") : NULL;
  double seconds = 0;
  if (file) {
    if (fscanf(file, "%lf", &seconds) != 1) seconds = 0;
    fclose(file);
  }
  return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int found = real(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += (time_t)jump(__builtin_return_address(0));
  return found;
}

time_t time(time_t *result) {
  struct timespec now;
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  real(CLOCK_REALTIME, &now);
  now.tv_sec += (time_t)jump(__builtin_return_address(0));
  if (result) *result = now.tv_sec;
  return now.tv_sec;
}
