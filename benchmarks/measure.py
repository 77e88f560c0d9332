"""One system on its bench: Redis, the system itself, the load client and the publisher, and what can be read off them.

The system has cores of its own and everything else has the others, as far as there are enough. What is charged to the
system is what the kernel says of its processes: their time, and their memory (PSS: shared pages are divided among those
who share them). Nothing is measured inside of it.
"""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from . import cache, publish
from .build import binary
from .launch import Process, free_port
from .systems import Site, System

HOST = "127.0.0.1"
TICKS = os.sysconf("SC_CLK_TCK")  # of the kernel's clock in a second of CPU time
CONNECT_SECONDS = 300  # for all clients; load.c gives up earlier when there is no progress
SETTLE_SECONDS = 0.5  # in which the system must do next to nothing: then it is done with a connect, or a leave
SETTLED_TICKS = 2  # of CPU time that are next to nothing
UNSETTLED_SECONDS = 20  # after which it has work of its own that does not end
LOST_MS = 15_000  # without an event after which those that are missing are lost; some write nothing while they parse
ROUNDS_PER_SECOND = 50_000  # no system reaches this in lock-step: how many events the load client has to have room for
WARM_UP_SECONDS = 0.5  # of lock-step before anything is measured
SUBSCRIBE_SECONDS = 60  # until every client must have had a first event
REDIS_HOW = "redis-server: on Debian `apt-get install redis-server`, or name one in DJANGO_SSE_REDIS_SERVER"

Figures = dict[str, float]


class Broken(Exception):
    """The measurement makes no sense: clients were refused, or nothing arrives."""


# What the kernel says -------------------------------------------------------------------------------------------------


def tree(root: int) -> list[int]:
    """The process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat(int(each.name))[1]), []).append(int(each.name))
    found = [root]
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return found


def stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on: the name before it may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(pids: list[int]) -> float:
    """User and system time that these processes have had."""
    return sum(int(field) for pid in pids for field in stat(pid)[11:13]) / TICKS


def pss_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def connections_to(port: int, pids: list[int]) -> int:
    """How many TCP connections these processes have with this port of the machine."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor))
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(fields[2].endswith(f":{port:04X}") and f"socket:[{fields[9]}]" in inodes for fields in lines)


def busy_seconds(cores: set[int]) -> float:
    """How long these cores were not idle since the machine was started, whoever used them."""
    names = {f"cpu{core}" for core in cores}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    return sum(sum(map(int, fields[1:4] + fields[6:9])) for fields in lines if fields[0] in names) / TICKS


# The cores ------------------------------------------------------------------------------------------------------------


class Cores(NamedTuple):
    system: set[int]
    others: set[int]


def divide(workers: int = 1) -> Cores:
    """A core for each worker, and the others for everything else; on a small machine they have to be shared."""
    ours = sorted(os.sched_getaffinity(0))
    return Cores(set(ours[:workers]), set(ours[workers:] or ours))


def together(count: int) -> Cores:
    """The same cores for everything."""
    few = set(sorted(os.sched_getaffinity(0))[:count])
    return Cores(few, few)


@contextlib.contextmanager
def pinned(cores: set[int]):
    """Run on these cores, and so does what is started meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# The parts of the bench -----------------------------------------------------------------------------------------------


def redis_program() -> str | None:
    named = os.environ.get("DJANGO_SSE_REDIS_SERVER", "redis-server")
    return shutil.which(named) or shutil.which("valkey-server")


class Redis:
    """A Redis of our own that keeps nothing."""

    def __init__(self, folder: Path, cores: set[int]) -> None:
        self.port = free_port()
        command = [redis_program(), "--port", self.port, "--bind", HOST, "--save", "", "--appendonly", "no"]
        # Subscribers of a busy channel may be behind by more than the 32 MB after which Redis cuts them off.
        command += ["--client-output-buffer-limit", "pubsub 0 0 0", "--maxclients", "30000"]
        self._process = Process(command, folder / "redis.log", cores, {})
        deadline = time.monotonic() + 10
        while not self._answers():
            if self._process.ended or time.monotonic() > deadline:
                self.stop()
                raise Broken(f"redis-server does not start:\n{self._process.log()}")
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.stop()

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), 1) as connection:
                connection.sendall(publish.resp("PING"))
                return connection.recv(64) == b"+PONG\r\n"
        except OSError:
            return False


class Load:
    """The load client: load.c says what each command does."""

    def __init__(self, port: int, path: str) -> None:
        self._process = subprocess.Popen(
            [binary("load"), str(port), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._text = b""

    def connect(self, total: int) -> dict[str, Any]:
        self._say(f"connect {total}")
        return json.loads(self._line(CONNECT_SECONDS))

    def expect(self, first: int, count: int, word: bool = False) -> None:
        self._say(f"expect {first} {count} {word:d}")
        self._line(10)

    def everyone_has(self, number: int, seconds: float) -> bool:
        """Wait until every client has this event; False if it takes longer."""
        deadline = time.monotonic() + seconds
        word = b".%d" % number
        try:
            while self._line(deadline - time.monotonic()) != word:
                pass  # the word on an event that was given up before
        except TimeoutError:
            return False
        return True

    def end(self, sent: int, lost_ms: int = LOST_MS) -> dict[str, Any]:
        self._say(f"end {sent} {lost_ms}")
        while not (line := self._line(CONNECT_SECONDS)).startswith(b"{"):
            pass
        return json.loads(line)

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()

    def _say(self, command: str) -> None:
        self._process.stdin.write(command.encode() + b"\n")

    def _line(self, seconds: float) -> bytes:
        output = self._process.stdout
        deadline = time.monotonic() + seconds
        while b"\n" not in self._text:
            if not select.select([output], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the load client says nothing")
            received = os.read(output.fileno(), 65536)
            if not received:
                raise Broken("the load client has ended")
            self._text += received
        line, _, self._text = self._text.partition(b"\n")
        return line


class Window:
    """What the system's processes and the cores did between two moments."""

    def __init__(self, bench: "Bench") -> None:
        self._bench = bench
        self._start = self._read()

    def _read(self) -> tuple[float, ...]:
        cores = self._bench.cores
        return time.monotonic(), cpu_seconds(self._bench.pids), busy_seconds(cores.system), busy_seconds(cores.others)

    def end(self) -> tuple[float, Figures]:
        """CPU seconds of the system, and what shares of their cores its neighbours had.

        `foreign`: of the system's cores, whoever is not the system; `bench`: of the others, whoever it was.
        """
        wall, cpu, ours, others = (after - before for before, after in zip(self._start, self._read(), strict=True))
        cores = self._bench.cores
        shares = {"bench": others / wall / len(cores.others)}
        if cores.system != cores.others:
            shares["foreign"] = max(0, ours - cpu) / wall / len(cores.system)
        return cpu, shares


# The bench ------------------------------------------------------------------------------------------------------------


class Bench:
    """A context: Redis and `system` run in it, and so does one load client.

    `channels`: how many there are; with one, all clients listen to it, with more, each client has one of its own.
    Each figure is named with its unit; `faults` adds up what must not happen.
    """

    def __init__(self, system: System, cores: Cores, *, channels: int = 1, workers: int = 1) -> None:
        self.system = system
        self.cores = cores
        self.channels = ["bench"] if channels == 1 else [f"bench-{i}" for i in range(channels)]
        self.pids: list[int] = []
        self.clients = 0
        self.faults = dict.fromkeys(("lost", "duplicated", "disordered", "other", "unknown", "broken", "closed"), 0)
        self._workers = workers
        self._number = 0  # of the next event
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Bench":
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        add = self._stack
        folder = Path(add.enter_context(tempfile.TemporaryDirectory(prefix="django-sse-bench-")))
        folder.chmod(0o755)  # nginx, started by root, changes its user
        add.enter_context(pinned(self.cores.others))
        self._redis = Redis(folder, self.cores.others)
        add.callback(self._redis.stop)
        site = Site(free_port(), self._redis.port, folder, self.cores.system, self._workers)
        self._running = add.enter_context(self.system.start(site))
        channel = "bench" if len(self.channels) == 1 else "bench-%d"
        self._load = Load(self._running.port, self.system.path(channel))
        add.callback(self._load.stop)
        if self.system.publish:
            ports = self._redis.port, self._running.publish_port
            self._out = publish.outlet(self.system.publish, *ports, self.system.publish_path)
            add.callback(self._out.close)

    def connect(self, total: int) -> Figures:
        """Open streams until there are `total`."""
        self.pids = tree(self._running.pid)
        window, more = Window(self), total - self.clients
        told = self._load.connect(total)
        if told["connected"] != total:
            raise Broken(f"{told['connected']} of {total} clients were let in; the log ends:\n{self._log_end()}")
        self._settle()
        cpu, _ = window.end()
        self.clients = total
        self.pids = tree(self._running.pid)  # some servers start workers as they are needed
        return {"connects_per_s": more / told["seconds"], "connect_cpu_us": cpu / more * 1e6}

    def leave(self) -> Figures:
        """Have all clients leave at once. None comes back: this is the last thing to do with a bench."""
        window = Window(self)
        self._load.stop()
        self._settle()
        cpu, _ = window.end()
        return {"leave_cpu_us": cpu / self.clients * 1e6}

    def _settle(self) -> None:
        """Return when what has happened last is done with."""
        deadline, used = time.monotonic() + UNSETTLED_SECONDS, cpu_seconds(self.pids)
        while time.monotonic() < deadline:
            time.sleep(SETTLE_SECONDS)
            before, used = used, cpu_seconds(self.pids)
            # One that would run and may not, on a machine that is shared, uses no time either.
            if round((used - before) * TICKS) <= SETTLED_TICKS and not any(stat(pid)[0] == "R" for pid in self.pids):
                break

    def warm_up(self) -> None:
        """Return when every client has had an event: a subscription may come into force after the response's head."""
        deadline = time.monotonic() + SUBSCRIBE_SECONDS
        self._load.expect(self._number, SUBSCRIBE_SECONDS + 1, word=True)
        while True:
            number, self._number = self._number, self._number + 1
            self._out.publish(self.channels, range(number, number + 1))
            if self._load.everyone_has(number, 1):
                break
            if time.monotonic() > deadline:
                got = self._load.end(1, 0)
                raise Broken(f"not every client gets events: {got}; the log ends:\n{self._log_end()}")
        self._load.end(0, 0)
        self.lockstep(WARM_UP_SECONDS)

    def lockstep(self, seconds: float) -> Figures:
        """The next event only when every client has the last: nothing can be joined."""
        self._load.expect(self._number, int(seconds * ROUNDS_PER_SECOND) + 1, word=True)
        window = Window(self)
        sent = publish.lockstep(self._out, self.channels, self._number, seconds, self._load.everyone_has)
        got = self._ended(sent)
        cpu, shares = window.end()
        return shares | {
            "lockstep_per_s": got["events"] / got["seconds"],
            "lockstep_cpu_us": cpu / got["events"] * 1e6,
        }

    def burst(self, count: int) -> Figures:
        """All of them as fast as they are taken: what waits may be joined."""
        self._load.expect(self._number, count)
        window = Window(self)
        publish.burst(self._out, self.channels, range(self._number, self._number + count))
        got = self._ended(count)
        cpu, _ = window.end()
        return {"burst_per_s": got["events"] / got["seconds"], "burst_cpu_us": cpu / got["events"] * 1e6}

    def paced(self, per_second: float, seconds: float) -> Figures:
        """As many as the system should have no trouble with: how long an event takes to each client."""
        count = max(1, round(per_second * seconds))
        self._load.expect(self._number, count)
        publish.paced(self._out, self.channels, range(self._number, self._number + count), per_second)
        got = self._ended(count)
        return {"p50_ms": got["p50_us"] / 1e3, "p99_ms": got["p99_us"] / 1e3}

    def elsewhere(self, count: int) -> Figures:
        """Events on a channel that nobody listens to."""
        window = Window(self)
        self._out.publish(["elsewhere"], range(count))
        cpu, _ = window.end()
        return {"elsewhere_cpu_us": cpu / count * 1e6}

    def pss(self) -> int:
        """Bytes of the system's memory."""
        return pss_bytes(tree(self._running.pid))

    def redis_connections(self) -> int:
        """Those of the system's own processes."""
        return connections_to(self._redis.port, tree(self._running.pid))

    def _ended(self, sent: int) -> dict[str, Any]:
        self._number += sent
        got = self._load.end(sent)
        for fault in self.faults:
            self.faults[fault] += got[fault]
        if not got["events"]:
            raise Broken(f"no event arrived; the log ends:\n{self._log_end()}")
        return got

    def _log_end(self) -> str:
        return self._running.log()[-2000:]


def missing(system: System) -> str | None:
    """Why the system cannot be measured here, or None."""
    if not redis_program():
        return REDIS_HOW
    try:
        binary("load")
    except cache.Unavailable as unavailable:
        return str(unavailable)
    return system.needs()
