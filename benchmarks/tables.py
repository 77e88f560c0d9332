"""The tables: what each run does with a system, and which figures make a column."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .measure import Bench, Figures, divide, together
from .systems import System

IDLE_SECONDS = 1.0  # before memory is read: what a connect left to be done is done
FIRST_CLIENTS = 100  # connected before a connect is measured: first requests import and cache
LATENCY_RATE = 10  # events/s
ELSEWHERE = 2000  # events published on a channel that nobody listens to
PAIR = ("handover", "nchan-redis")  # what is promised of ours is compared with nchan; of others, the number of clients
USUAL_CLIENTS = 1000  # as many as in the other tables, or the nearest


class Column(NamedTuple):
    """`figure` of a run, divided by `scale`; with `against`, its ratio to that system in the same run."""

    heading: str
    figure: str
    unit: str  # "rate", "number", "ratio" or "faults": how report writes it
    against: str | None = None


class Table(NamedTuple):
    title: str
    about: str
    systems: str  # measured if nothing else is said
    clients: str  # as many, or several numbers
    variants: Callable[[System, Namespace], Sequence[Figures]]
    run: Callable[[System, Figures, Namespace], Figures]
    columns: Sequence[Column]


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.replace("_", "").split(",")]


def by_clients(_system: System, options: Namespace) -> list[Figures]:
    return [{"clients": clients} for clients in numbers(options.clients)]


# fanout, wsgi ---------------------------------------------------------------------------------------------------------


def run_fanout(system: System, variant: Figures, options: Namespace) -> Figures:
    with Bench(system, divide()) as bench:
        figures = bench.connect(variant["clients"])
        bench.warm_up()
        figures |= bench.lockstep(options.seconds) | bench.burst(options.burst)
        figures |= bench.paced(LATENCY_RATE, options.seconds)
        return figures | bench.faults


def delivery_columns(against: str) -> list[Column]:
    return [
        Column("lock-step\ndeliveries/s", "lockstep_per_s", "rate"),
        Column(f"\n× {against}", "lockstep_per_s", "ratio", against),
        Column("CPU µs\nper delivery", "lockstep_cpu_us", "number"),
        Column(f"\n× {against}", "lockstep_cpu_us", "ratio", against),
        Column("burst\ndeliveries/s", "burst_per_s", "rate"),
        Column(f"\n× {against}", "burst_per_s", "ratio", against),
        Column("latency\np50 ms", "p50_ms", "number"),
        Column("latency\np99 ms", "p99_ms", "number"),
        Column("lost / twice\n/ disordered", "lost", "faults"),
    ]


FANOUT = Table(
    "Fan-out",
    "One channel; lock-step: the next event only when all clients have the last; burst: as fast as Redis takes them; "
    f"p50 and p99 from publishing to each client, at {LATENCY_RATE} events/s.",
    "limit,handover,handler,nchan-redis,nchan,better-sse,starlette,plain,eventstream",
    "1000",
    by_clients,
    run_fanout,
    delivery_columns("nchan-redis"),
)

WSGI = Table(
    "WSGI servers",
    "As fan-out. A thread of gthread serves one client, so there are fewer.",
    "limit,gthread,gunicorn-gevent,pywsgi,original",
    "200",
    by_clients,
    run_fanout,
    delivery_columns("original"),
)


# memory ---------------------------------------------------------------------------------------------------------------


def run_memory(system: System, variant: Figures, options: Namespace) -> Figures:
    with Bench(system, divide()) as bench:
        return memory(bench, variant["clients"]) | bench.faults


def memory(bench: Bench, clients: int) -> Figures:
    """Connect them; what each costs is what all but the first tenth add: the first ones also pay for what is shared."""
    first = max(1, clients // 10)
    bench.connect(first)
    bench.warm_up()
    before = idle_pss(bench)
    bench.connect(clients)
    bench.warm_up()
    after = idle_pss(bench)
    return {
        "pss_kib": (after - before) / (clients - first) / 1024,
        "pss_mib": after / 2**20,
        "redis_connections": bench.redis_connections(),
    }


def idle_pss(bench: Bench) -> int:
    time.sleep(IDLE_SECONDS)
    return bench.pss()


MEMORY = Table(
    "Memory",
    "Every client is connected, has had an event and waits. PSS of all processes of the server.",
    "handover,handler,gthread,gunicorn-gevent,pywsgi,nchan-redis,nchan,better-sse,starlette,plain,eventstream,original",
    "2000",
    by_clients,
    run_memory,
    [
        Column("PSS KiB\nper client", "pss_kib", "number"),
        Column("PSS MiB\nin all", "pss_mib", "number"),
        Column("connections\nto Redis", "redis_connections", "number"),
    ],
)


# connect --------------------------------------------------------------------------------------------------------------


def run_connect(system: System, variant: Figures, options: Namespace) -> Figures:
    with Bench(system, divide()) as bench:
        bench.connect(FIRST_CLIENTS)
        figures = bench.connect(FIRST_CLIENTS + variant["clients"]) | bench.leave()
        # Some end Django's request at the connect, others when the client leaves: only the sum compares them.
        return figures | {"visit_cpu_us": figures["connect_cpu_us"] + figures["leave_cpu_us"]}


CONNECT = Table(
    "Connects",
    "Clients that connect as fast as they are let in, 64 at a time, and leave, all at once; the CPU time of the server "
    "for each. To compare is the sum: the hand-over ends Django's request at the connect, the others when the client "
    "leaves.",
    "bare,handover,handler,plain,nchan-redis",
    "2000",
    by_clients,
    run_connect,
    [
        Column("CPU µs\nper connect", "connect_cpu_us", "number"),
        Column("CPU µs\nper leave", "leave_cpu_us", "number"),
        Column("CPU µs\nof both", "visit_cpu_us", "number"),
        Column("\n× bare", "visit_cpu_us", "ratio", "bare"),
        Column("connects/s", "connects_per_s", "rate"),
    ],
)


# scaling --------------------------------------------------------------------------------------------------------------


def scaling_variants(system: System, options: Namespace) -> list[Figures]:
    """Each number of clients; and for the PAIR the most of them with a channel each, and one worker and two."""
    counts = numbers(options.clients)
    crowd = [{"clients": clients, "channels": 1, "workers": 1, "cores": 0} for clients in counts]
    if system.key not in PAIR:
        return crowd
    most, usual = max(counts), min(counts, key=lambda count: abs(count - USUAL_CLIENTS))
    crowd.append({"clients": most, "channels": most, "workers": 1, "cores": 0})
    return crowd + [{"clients": usual, "channels": 1, "workers": n, "cores": n} for n in (1, 2)]


def run_scaling(system: System, variant: Figures, options: Namespace) -> Figures:
    workers = variant["workers"]
    cores = together(workers) if variant["cores"] else divide(workers)
    with Bench(system, cores, channels=variant["channels"], workers=workers) as bench:
        figures = memory(bench, variant["clients"])
        figures |= bench.lockstep(options.seconds) | bench.elsewhere(ELSEWHERE)
        return figures | bench.faults


SCALING = Table(
    "Scaling",
    "Lock-step. Where a number of cores is given, the server, Redis, the publisher and the load client share them: "
    "what two workers gain is then what a second core gains.",
    "handover,handler,nchan-redis,better-sse,starlette,plain",
    "100,300,1000,3000,10000",
    scaling_variants,
    run_scaling,
    [
        Column("deliveries/s", "lockstep_per_s", "rate"),
        Column("CPU µs\nper delivery", "lockstep_cpu_us", "number"),
        Column("PSS KiB\nper client", "pss_kib", "number"),
        Column("CPU µs per event\nwithout clients", "elsewhere_cpu_us", "number"),
        Column("lost / twice\n/ disordered", "lost", "faults"),
    ],
)

TABLES = {"fanout": FANOUT, "memory": MEMORY, "connect": CONNECT, "scaling": SCALING, "wsgi": WSGI}
