/* Binds a worker's gRPC server to loopback. TensorFlow binds it to every interface, whatever address
   the cluster names, and it has no password. Preloaded into workers of one machine by loopback.py.

   Only the worker's port in the cluster is changed: other servers listen where they were told to. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>

static int is_cluster_port(in_port_t port) {
  const char *text = getenv("WARMSTATE_LOOPBACK_PORT");
  return text && ntohs(port) == atoi(text);
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
  int (*next)(int, const struct sockaddr *, socklen_t) =
      (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "bind");
  if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
    struct sockaddr_in local = *(const struct sockaddr_in *)address;
    if (is_cluster_port(local.sin_port) && local.sin_addr.s_addr == htonl(INADDR_ANY)) {
      local.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      return next(fd, (const struct sockaddr *)&local, sizeof local);
    }
  }
  if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
    struct sockaddr_in6 local = *(const struct sockaddr_in6 *)address;
    if (is_cluster_port(local.sin6_port) && IN6_IS_ADDR_UNSPECIFIED(&local.sin6_addr)) {
      inet_pton(AF_INET6, "::ffff:127.0.0.1", &local.sin6_addr); /* peers connect by IPv4 */
      return next(fd, (const struct sockaddr *)&local, sizeof local);
    }
  }
  return next(fd, address, length);
}
