/* The load client: many event streams read by one thread, every byte of them checked.
 *
 *     load PORT PATH        a %d in PATH stands for the client's number
 *
 * Rule: it decides nothing. What to do comes line by line on standard input, what was seen goes to standard output:
 *
 *     connect TOTAL         open streams until there are TOTAL             -> a JSON line when each has its answer
 *     expect FIRST COUNT WORD   from now on count the events FIRST to FIRST + COUNT - 1 and nothing before;
 *                           if WORD is 1                                   -> ".N" as soon as every client has event N
 *     end SENT IDLE         SENT of them were published                    -> a JSON line when each client has all of
 *                           them, or when none came for IDLE milliseconds
 *
 * A measured event has the data "T N xxx…": published at T (nanoseconds of CLOCK_MONOTONIC), its number N, and filler up
 * to PAYLOAD bytes; in double quotes if a system sends everything as JSON. HTTP/1.1 is read as RFC 9112 has it (chunked
 * or until the end of the connection), the stream as WHATWG has it (three kinds of line end, anywhere cut in two).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAYLOAD 100               /* bytes of a measured event's data; publish.py says the same */
#define KNOCKING 64               /* clients without an answer at one time: a server's listen queue is finite */
#define LOOK 100                  /* microseconds between two looks at what has come; see main() */
#define LINE 4096                 /* bytes of the longest line or response head; a longer one breaks the client */
#define WINDOW 64                 /* events back for which order and repetition are told apart */
#define PATIENCE 60000000000ull   /* nanoseconds without a single new answer after which `connect` gives up */

enum phase { CONNECTING, HEAD, BODY, CLOSED };
enum coding { SIZE, EXTENSION, SIZE_LF, DATA, DATA_CR, DATA_LF, TRAILER, UNTIL_CLOSE };

struct client {
    int fd;
    uint8_t phase, coding, digits;
    uint8_t skip_lf;              /* the last line ended with CR: an LF now belongs to it */
    uint8_t data_lines, named;    /* of the event being read: lines of data, and whether it has a name but "message" */
    uint8_t measured;             /* its data were those of a measured event */
    uint64_t chunk;               /* bytes left of the chunk */
    char *kept;                   /* the beginning of a line or head whose end has not come yet */
    uint32_t length;
    uint64_t time, number;        /* of the event being read */
    uint64_t next, seen;          /* the event after the highest one, and which of the WINDOW before it have come */
};

static struct client *clients;
static uint64_t total, wanted, knocking;   /* clients started, asked for, without an answer */
static uint64_t connected, refused, closed, broken;
static uint64_t first, count, word, sent, idle;
static int counting, ending;
static uint64_t events, duplicated, disordered, stray, other, unknown, received;
static uint64_t first_published, last_received, last_progress, connect_began;
static double cpu_before;
static uint32_t *have;            /* clients that have event first + i */
static int epoll, port;
static const char *path;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static double cpu_seconds(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

/* Latencies: STEPS buckets to each doubling, so a percentile is known to 1 %. ------------------------------------- */

#define STEPS 128
#define BUCKETS (58 * STEPS)
static uint64_t latency[BUCKETS], slowest;

static int bucket(uint64_t v) {
    if (v < STEPS) return v;
    int shift = 63 - __builtin_clzll(v) - 7;
    return (shift + 1) * STEPS + (v >> shift) - STEPS;
}

static double percentile_us(double share) {
    uint64_t passed = 0, enough = events * share + 0.5;
    for (int i = 0; i < BUCKETS; i++) {
        passed += latency[i];
        if (passed && passed >= enough) {
            uint64_t low = i < STEPS ? (uint64_t)i : ((uint64_t)(i % STEPS) + STEPS) << (i / STEPS - 1);
            return low / 1e3;
        }
    }
    return 0;
}

/* Events ------------------------------------------------------------------------------------------------------------ */

static void arrived(struct client *c, uint64_t number, uint64_t published, uint64_t now) {
    uint64_t i = number - first;  /* wraps below `first`, and is then too large as well */
    if (!counting || i >= count) { stray++; return; }
    if (i >= c->next) {
        uint64_t up = i - c->next + 1;
        c->seen = (up < WINDOW ? c->seen << up : 0) | 1;
        c->next = i + 1;
    } else {
        uint64_t back = c->next - 1 - i;
        if (back >= WINDOW || c->seen >> back & 1) { duplicated++; return; }
        c->seen |= 1ull << back;
        disordered++;
    }
    events++;
    if (!first_published || published < first_published) first_published = published;
    last_received = last_progress = now;
    uint64_t took = now > published ? now - published : 0;
    latency[bucket(took)]++;
    if (took > slowest) slowest = took;
    if (++have[i] == connected && word) dprintf(1, ".%lu\n", number);
}

/* A frame that was read once need not be read again: the same bytes mean the same event. This is what makes the client
 * several times faster than any server that joins frames. */

#define REMEMBERED 2048           /* frames, by number */
#define FRAME 256                 /* bytes of the longest that is remembered */
static struct frame { uint64_t number, time; uint32_t length; char text[FRAME]; } frames[REMEMBERED];

static void remember(const struct client *c, const char *from, const char *to) {
    if (!from || to - from > FRAME || to[-1] != '\n' || unknown) return;   /* what is wrong is counted every time */
    struct frame *f = &frames[c->number % REMEMBERED];
    f->number = c->number;
    f->time = c->time;
    f->length = to - from;
    memcpy(f->text, from, to - from);
}

static const struct frame *recall(const struct client *c, const char *p, const char *end) {
    const struct frame *f = &frames[(first + c->next) % REMEMBERED];
    int same = f->length && f->number == first + c->next && f->length <= end - p && !memcmp(f->text, p, f->length);
    return same ? f : NULL;
}

/* The stream -------------------------------------------------------------------------------------------------------- */

static int number_at(const char **p, const char *end, uint64_t *value) {
    const char *from = *p;
    for (*value = 0; *p < end && **p >= '0' && **p <= '9'; ++*p) *value = *value * 10 + (**p - '0');
    return *p > from && *p < end && *(*p)++ == ' ';
}

static int payload(struct client *c, const char *p, const char *end) {
    if (end - p == PAYLOAD + 2 && *p == '"' && end[-1] == '"') p++, end--;
    if (end - p != PAYLOAD || !number_at(&p, end, &c->time) || !number_at(&p, end, &c->number)) return 0;
    while (p < end && *p == 'x') p++;
    return p == end;
}

static int field(const char *p, const char *colon, const char *name) {
    size_t n = strlen(name);
    return (size_t)(colon - p) == n && !memcmp(p, name, n);
}

/* One line without its end; returns 1 where it ended a measured event. */
static int line(struct client *c, const char *p, const char *end) {
    if (p == end) {
        int measured = c->measured && c->data_lines == 1 && !c->named;
        if (c->data_lines && !measured) other++;
        c->data_lines = c->named = c->measured = 0;
        return measured;
    }
    const char *colon = memchr(p, ':', end - p);
    if (colon == p) return 0;
    if (!colon) colon = end;
    const char *value = colon == end ? end : colon + 1;
    if (value < end && *value == ' ') value++;
    if (field(p, colon, "data")) {
        if (c->data_lines < 2) c->data_lines++;
        c->measured = payload(c, value, end);
    } else if (field(p, colon, "event")) {
        c->named = value < end && !field(value, end, "message");
    } else if (!field(p, colon, "id") && !field(p, colon, "retry")) {
        unknown++;
    }
    return 0;
}

static int keep(struct client *c, const char *p, size_t n) {
    if (c->length + n > LINE) return 0;
    if (!c->kept && !(c->kept = malloc(LINE))) return 0;
    memcpy(c->kept + c->length, p, n);
    c->length += n;
    return 1;
}

static int stream(struct client *c, const char *p, const char *end, uint64_t now) {
    const char *frame = c->length || c->data_lines || c->named ? NULL : p;   /* where this event began, if in here */
    while (p < end) {
        if (c->skip_lf) {
            c->skip_lf = 0;
            if (*p == '\n') {
                if (frame == p) frame++;
                p++;
                continue;
            }
        }
        const struct frame *known = frame == p ? recall(c, p, end) : NULL;
        if (known) {
            arrived(c, known->number, known->time, now);
            frame = p += known->length;
            continue;
        }
        const char *lf = memchr(p, '\n', end - p), *cr = memchr(p, '\r', (lf ? lf : end) - p);
        const char *stop = cr ? cr : lf;
        if (!stop) return keep(c, p, end - p);
        int whole, empty = stop == p && !c->length;
        if (c->length) {
            if (!keep(c, p, stop - p)) return 0;
            whole = line(c, c->kept, c->kept + c->length);
            c->length = 0;
        } else {
            whole = line(c, p, stop);
        }
        c->skip_lf = cr != NULL;
        p = stop + 1;
        if (whole) {
            remember(c, frame, p);
            arrived(c, c->number, c->time, now);
        }
        if (empty) frame = p;
    }
    return 1;
}

/* HTTP -------------------------------------------------------------------------------------------------------------- */

static int hex(char ch) {
    if (ch >= '0' && ch <= '9') return ch - '0';
    ch |= 32;
    return ch >= 'a' && ch <= 'f' ? ch - 'a' + 10 : -1;
}

/* 1: goes on; 0: ended as it should; -1: broken. */
static int body(struct client *c, const char *p, const char *end, uint64_t now) {
    while (p < end) {
        switch (c->coding) {
        case SIZE: {
            int digit = hex(*p);
            if (digit >= 0) {
                if (++c->digits > 8) return -1;
                c->chunk = c->chunk * 16 + digit;
            } else if (!c->digits || (*p != '\r' && *p != ';')) {
                return -1;
            } else {
                c->coding = *p == '\r' ? SIZE_LF : EXTENSION;
            }
            p++;
            break;
        }
        case EXTENSION:
            if (*p++ == '\r') c->coding = SIZE_LF;
            break;
        case SIZE_LF:
            if (*p++ != '\n') return -1;
            c->digits = 0;
            c->coding = c->chunk ? DATA : TRAILER;
            break;
        case DATA: {
            uint64_t n = end - p;
            if (n > c->chunk) n = c->chunk;
            if (!stream(c, p, p + n, now)) return -1;
            p += n;
            if (!(c->chunk -= n)) c->coding = DATA_CR;
            break;
        }
        case DATA_CR:
        case DATA_LF:
            if (*p++ != (c->coding == DATA_CR ? '\r' : '\n')) return -1;
            c->coding = c->coding == DATA_CR ? DATA_LF : SIZE;
            break;
        case TRAILER:
            return 0;
        case UNTIL_CLOSE:
            return stream(c, p, end, now) ? 1 : -1;
        }
    }
    return c->coding != TRAILER;
}

static int header(const char *head, const char *name, const char *value) {
    for (const char *p = strstr(head, "\r\n"); p && p[2] != '\r'; p = strstr(p + 2, "\r\n")) {
        size_t n = strlen(name);
        if (strncasecmp(p + 2, name, n) || p[2 + n] != ':') continue;
        p += 3 + n;
        p += strspn(p, " ");
        return !strncasecmp(p, value, strlen(value));
    }
    return 0;
}

static void leave(struct client *c, uint64_t *why) {
    if (c->phase == CONNECTING || c->phase == HEAD) knocking--;
    close(c->fd);
    c->phase = CLOSED;
    ++*why;
}

static void head(struct client *c, const char *p, size_t n, uint64_t now) {
    /* Only what belongs to the head is kept: the stream that may follow at once can be longer than LINE. */
    size_t before = c->length, room = LINE - 1 - before, taken = n < room ? n : room;
    if (!keep(c, p, taken)) { leave(c, &refused); return; }
    c->kept[c->length] = 0;
    char *stop = strstr(c->kept, "\r\n\r\n");
    if (!stop) {
        if (taken < n) leave(c, &refused);
        return;
    }
    stop[2] = 0;
    if (strncmp(c->kept, "HTTP/1.1 200", 12) || !header(c->kept, "content-type", "text/event-stream")) {
        leave(c, &refused);
        return;
    }
    c->coding = header(c->kept, "transfer-encoding", "chunked") ? SIZE : UNTIL_CLOSE;
    size_t rest = n - (stop + 4 - c->kept - before);
    c->length = 0;
    c->phase = BODY;
    knocking--;
    connected++;
    last_progress = now;
    if (rest && body(c, p + n - rest, p + n, now) < 1) leave(c, &broken);
}

static void readable(struct client *c) {
    static char buffer[1 << 18];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    uint64_t now = now_ns();
    if (n <= 0) {
        leave(c, c->phase == HEAD ? &refused : &closed);
        return;
    }
    received += n;
    if (c->phase == HEAD) {
        head(c, buffer, n, now);
        return;
    }
    int goes_on = body(c, buffer, buffer + n, now);
    if (goes_on < 1) leave(c, goes_on ? &broken : &closed);
}

static void watch(struct client *c, int how, uint32_t what) {
    struct epoll_event event = {.events = what, .data.u64 = c - clients + 1};
    epoll_ctl(epoll, how, c->fd, &event);
}

static void knock(struct client *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->phase = CONNECTING;
    knocking++;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)) {
        leave(c, &refused);
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void ask(struct client *c) {
    char request[LINE];
    const char *number = strstr(path, "%d");
    int n = snprintf(request, sizeof request, "GET %.*s", (int)(number ? number - path : (long)strlen(path)), path);
    if (number) n += snprintf(request + n, sizeof request - n, "%ld%s", (long)(c - clients), number + 2);
    n += snprintf(request + n, sizeof request - n,
                  " HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n", port);
    if (send(c->fd, request, n, MSG_NOSIGNAL) != n) {
        leave(c, &refused);
        return;
    }
    c->phase = HEAD;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

/* Commands ---------------------------------------------------------------------------------------------------------- */

static void say_connected(uint64_t now) {
    printf("{\"connected\":%lu,\"refused\":%lu,\"broken\":%lu,\"seconds\":%.6f}\n", connected, refused, broken,
           (now - connect_began) / 1e9);
    fflush(stdout);
    connect_began = 0;
}

static void say_counted(uint64_t now) {
    double seconds = events ? (last_received - first_published) / 1e9 : 0;
    printf("{\"clients\":%lu,\"sent\":%lu,\"events\":%lu,\"lost\":%ld,\"duplicated\":%lu,\"disordered\":%lu,",
           connected, sent, events, (long)(connected * sent - events), duplicated, disordered);
    printf("\"stray\":%lu,\"other\":%lu,\"unknown\":%lu,\"closed\":%lu,\"broken\":%lu,\"bytes\":%lu,", stray, other,
           unknown, closed, broken, received);
    printf("\"seconds\":%.6f,\"first_ns\":%lu,\"last_ns\":%lu,\"now_ns\":%lu,", seconds, first_published, last_received,
           now);
    printf("\"p50_us\":%.1f,\"p90_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f,\"cpu_s\":%.6f}\n", percentile_us(.5),
           percentile_us(.9), percentile_us(.99), slowest / 1e3, cpu_seconds() - cpu_before);
    fflush(stdout);
    counting = ending = 0;
}

static void expect(void) {
    counting = 1;
    ending = 0;
    events = duplicated = disordered = stray = other = unknown = received = closed = broken = 0;
    first_published = last_received = slowest = 0;
    memset(latency, 0, sizeof latency);
    for (uint64_t i = 0; i < total; i++) clients[i].next = clients[i].seen = 0;
    free(have);
    have = calloc(count, sizeof *have);
    cpu_before = cpu_seconds();
    dprintf(1, "{}\n");
}

static void command(const char *text) {
    if (sscanf(text, "connect %lu", &wanted) == 1) {
        clients = reallocarray(clients, wanted, sizeof *clients);
        if (wanted > total) memset(clients + total, 0, (wanted - total) * sizeof *clients);
        connect_began = last_progress = now_ns();
    } else if (sscanf(text, "expect %lu %lu %lu", &first, &count, &word) == 3) {
        expect();
    } else if (sscanf(text, "end %lu %lu", &sent, &idle) == 2) {
        ending = 1;
        last_progress = now_ns();
    } else {
        fprintf(stderr, "load: no such command: %s\n", text);
        exit(2);
    }
}

static void commands(void) {
    static char text[1024];
    static size_t length;
    ssize_t n = read(0, text + length, sizeof text - 1 - length);
    if (n <= 0) exit(0);
    text[length += n] = 0;
    for (char *stop; (stop = strchr(text, '\n')); ) {
        *stop = 0;
        command(text);
        length -= stop + 1 - text;
        memmove(text, stop + 1, length + 1);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: load PORT PATH\n");
        return 2;
    }
    port = atoi(argv[1]);
    path = argv[2];
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1000);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event input = {.events = EPOLLIN, .data.u64 = 0}, ready[1024];
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &input);
    for (;;) {
        while (total < wanted && knocking < KNOCKING) knock(&clients[total++]);
        uint64_t now = now_ns();
        if (connect_began && ((total == wanted && !knocking) || now - last_progress > PATIENCE)) say_connected(now);
        if (ending && (events >= connected * sent || now - last_progress > idle * 1000000ull)) say_counted(now);
        /* Who sleeps in epoll_wait is woken at each event, and the server is charged with it. Clients that are on other
         * machines do not cost it that: so while events come, look for them now and then. */
        if (counting && events) usleep(LOOK);
        int n = epoll_wait(epoll, ready, 1024, connect_began || ending ? 20 : -1);
        for (int i = 0; i < n; i++) {
            if (!ready[i].data.u64) {
                commands();
                continue;
            }
            struct client *c = &clients[ready[i].data.u64 - 1];
            if (c->phase == CONNECTING) ask(c);
            else if (c->phase != CLOSED) readable(c);
        }
    }
}
