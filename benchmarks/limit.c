/* The limit of the bench: what is left of a server when everything but the system calls is taken away.
 *
 *     limit PORT REDIS_PORT
 *
 * Rule: it does the least that still is the job. One thread and epoll; one subscription to Redis; a frame is written once
 * into its channel's log, and each client takes from there what it has not had, in one send(). It serves /ping and
 * /events/CHANNEL with the channels bench and bench-0, bench-1, … What it reaches, no server and not the load client can
 * be blamed for not surpassing.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHANNELS 65536            /* bench is 0, bench-N is N + 1 */
#define FILES 65536               /* the highest file descriptor */

struct client {
    int channel, next;            /* next: the next client of the channel, by its file descriptor */
    size_t offset;                /* of the channel's log: what it has had */
    int waits;                    /* its socket is full */
};

struct channel {
    int clients;                  /* the first, by its file descriptor; 0: none */
    int touched;
    char *log;                    /* frames that some client has not had yet */
    size_t length, room;
};

static struct client clients[FILES];
static struct channel channels[CHANNELS];
static int touched[CHANNELS], touched_count;
static int epoll, listener, broker;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void watch(int how, int fd, uint32_t what) {
    struct epoll_event event = {.events = what, .data.fd = fd};
    if (epoll_ctl(epoll, how, fd, &event)) die("epoll_ctl");
}

static int channel_number(const char *name) {
    if (strncmp(name, "bench", 5)) return -1;
    int number = name[5] == '-' ? atoi(name + 6) + 1 : 0;
    return number < CHANNELS ? number : -1;
}

static void leave(int fd) {
    struct client *c = &clients[fd];
    if (c->channel >= 0) {
        int *link = &channels[c->channel].clients;
        while (*link != fd) link = &clients[*link].next;
        *link = c->next;
    }
    close(fd);
}

/* 1: has all there is. */
static int give(int fd) {
    struct client *c = &clients[fd];
    struct channel *ch = &channels[c->channel];
    ssize_t n = send(fd, ch->log + c->offset, ch->length - c->offset, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) c->offset += n;
    int full = c->offset < ch->length;
    if (full != c->waits) watch(EPOLL_CTL_MOD, fd, EPOLLIN | (full ? EPOLLOUT : 0));
    c->waits = full;
    return !full;
}

static void flush(void) {
    for (int i = 0; i < touched_count; i++) {
        struct channel *ch = &channels[touched[i]];
        int all = 1;
        for (int fd = ch->clients; fd; fd = clients[fd].next) all &= !clients[fd].waits && give(fd);
        if (all) {
            for (int fd = ch->clients; fd; fd = clients[fd].next) clients[fd].offset = 0;
            ch->length = 0;
        }
        ch->touched = 0;
    }
    touched_count = 0;
}

static void publish(int number, const char *payload, int length) {
    struct channel *ch = &channels[number];
    if (ch->length + length + 64 > ch->room) {
        ch->room = 2 * (ch->room + length + 64);
        ch->log = realloc(ch->log, ch->room);
    }
    ch->length += sprintf(ch->log + ch->length, "%x\r\ndata: %.*s\n\n\r\n", length + 8, length, payload);
    if (!ch->touched) touched[touched_count++] = number;
    ch->touched = 1;
}

/* A reply of Redis is read as the list of its bulk strings: *4, "pmessage", pattern, channel, payload. */
static const char *bulk(const char *p, const char *end, int *length) {
    const char *stop = memmem(p, end - p, "\r\n", 2);
    if (!stop) return NULL;
    *length = atoi(p + 1);
    return stop + 2 + *length + 2 <= end ? stop + 2 : NULL;
}

static void heard(void) {
    static char text[1 << 20];
    static size_t kept;
    ssize_t n = recv(broker, text + kept, sizeof text - 1 - kept, 0);
    if (n <= 0) die("Redis");
    const char *p = text, *end = text + kept + n;
    text[kept + n] = 0;
    while (p < end) {
        const char *strings[4], *q = memmem(p, end - p, "\r\n", 2);
        int lengths[4], i = 0, wanted = atoi(p + 1);
        if (!q) break;
        q += 2;
        if (wanted == 4) {
            while (i < 4 && (strings[i] = bulk(q, end, &lengths[i]))) q = strings[i] + lengths[i] + 2, i++;
            if (i < 4) break;
            int number = channel_number(strings[2]);
            if (number >= 0 && channels[number].clients) publish(number, strings[3], lengths[3]);
        } else {                  /* the confirmation of PSUBSCRIBE: two strings and a number */
            q = memmem(q, end - q, "\r\n:1\r\n", 6);
            if (!q) break;
            q += 6;
        }
        p = q;
    }
    kept = end - p;
    memmove(text, p, kept);
    flush();
}

static void asked(int fd) {
    char request[4096], answer[256];
    struct client *c = &clients[fd];
    ssize_t n = recv(fd, request, sizeof request - 1, 0);
    if (n <= 0 || c->channel >= 0) {
        leave(fd);
        return;
    }
    request[n] = 0;
    int number = strncmp(request, "GET /events/", 12) ? -1 : channel_number(request + 12);
    if (number < 0) {
        char pid[16];
        int length = sprintf(pid, "%d", getpid());
        n = sprintf(answer, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", length, pid);
        send(fd, answer, n, MSG_NOSIGNAL);
        leave(fd);
        return;
    }
    n = sprintf(answer, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    send(fd, answer, n, MSG_NOSIGNAL);
    *c = (struct client){.channel = number, .next = channels[number].clients, .offset = channels[number].length};
    channels[number].clients = fd;
}

static void listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) die("listen");
    watch(EPOLL_CTL_ADD, listener, EPOLLIN);
}

static void subscribe(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    broker = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(broker, (struct sockaddr *)&address, sizeof address)) die("Redis");
    static const char text[] = "PSUBSCRIBE bench*\r\n";
    if (send(broker, text, sizeof text - 1, 0) != sizeof text - 1) die("Redis");
    watch(EPOLL_CTL_ADD, broker, EPOLLIN);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: limit PORT REDIS_PORT\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll = epoll_create1(0);
    subscribe(atoi(argv[2]));
    listen_on(atoi(argv[1]));
    struct epoll_event ready[1024];
    for (;;) {
        int n = epoll_wait(epoll, ready, 1024, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == broker) {
                heard();
            } else if (fd == listener) {
                int new = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (new < 0) continue;
                if (new >= FILES) {
                    close(new);
                    continue;
                }
                setsockopt(new, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
                clients[new] = (struct client){.channel = -1};
                watch(EPOLL_CTL_ADD, new, EPOLLIN);
            } else if (ready[i].events & EPOLLOUT) {
                give(fd);
            } else {
                asked(fd);
            }
        }
    }
}
