"""python -m benchmarks TABLE [options]      measure, and print the table
python -m benchmarks page FILE...          write what --json kept into docs/benchmarks.rst, with its plots
python -m benchmarks systems               what can be measured here, and what the others need

TABLE: fanout, memory, connect, scaling, wsgi
"""

import argparse
import contextlib
import fcntl
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from . import report
from .measure import Broken, missing
from .systems import SYSTEMS, System
from .tables import FANOUT, TABLES, Table

LIMIT = "limit"  # the system that shows what the bench itself can do


def say(line: str) -> None:
    """Progress; the table alone goes to standard output."""
    print(line, file=sys.stderr, flush=True)


def at_hand(_arguments: Sequence[str]) -> int:
    for key, system in SYSTEMS.items():
        print(f"{key:16} {system.name}: {missing(system) or 'ready'}")
    return 0


def options_of(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    table = TABLES[name]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=table.about)
    parser.add_argument("--systems", default=table.systems, help="keys, separated by commas; default: %(default)s")
    parser.add_argument("--clients", default=table.clients, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="of each system, in turns; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement; default: %(default)s")
    parser.add_argument("--burst", type=int, default=1000, help="events in a burst; default: %(default)s")
    parser.add_argument(
        "--lock", type=Path, metavar="FILE", help="hold it during each run: for machines that are shared"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures of every run")
    options = parser.parse_args(arguments)
    unknown = [key for key in options.systems.split(",") if key not in SYSTEMS]
    if unknown:
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    options.command = shlex.join(["python", "-m", "benchmarks", name, *chosen(parser, options)])
    return options


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[str]:
    """What was said on the command line, as far as the figures depend on it: no names of files."""
    for key in ("systems", "clients", "runs", "seconds", "burst"):
        if getattr(options, key) != parser.get_default(key):
            yield f"--{key}={getattr(options, key)}"


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def attempt(table: Table, system: System, variant: report.Row, options: argparse.Namespace) -> report.Row:
    """One run; a system that fails does not keep the others from being measured."""
    try:
        with locked(options.lock):
            return table.run(system, variant, options)
    except (Broken, OSError, RuntimeError, ValueError) as error:
        say(f"  failed: {error}")
        return {"failed": str(error) or type(error).__name__}


def own_limit(options: argparse.Namespace) -> report.Row:
    """What the load client, the publisher and Redis can do with a server that costs next to nothing."""
    say("limit of the bench")
    clients = int(options.clients.split(",")[0])
    brief = argparse.Namespace(**{**vars(options), "seconds": min(1, options.seconds)})
    figures = attempt(FANOUT, SYSTEMS[LIMIT], {"clients": clients}, brief)
    return {} if "failed" in figures else figures


def measured(name: str, options: argparse.Namespace) -> report.Result:
    table, systems = TABLES[name], [SYSTEMS[key] for key in options.systems.split(",")]
    reasons = {system.name: missing(system) for system in systems}
    rows = [
        {"key": system.key, "name": system.name, "variant": variant, "versions": system.versions(), "runs": []}
        for system in systems
        if not reasons[system.name]
        for variant in table.variants(system, options)
    ]
    limit = own_limit(options) if rows else {}
    for run in range(options.runs):
        for row in rows:  # in turns, so that a machine that drifts drifts for all of them
            say(f"{name}, run {run + 1} of {options.runs}: {report.label(row, rows)}")
            row["runs"].append(attempt(table, SYSTEMS[row["key"]], row["variant"], options))
    return {
        "table": name,
        "command": options.command,
        "date": report.today(),
        "machine": report.machine(),
        "limit": limit,
        "rows": rows,
        "missing": {name: why for name, why in reasons.items() if why},
    }


def measure(name: str, arguments: Sequence[str]) -> int:
    options = options_of(name, arguments)
    result = measured(name, options)
    if options.json:
        report.save(result, options.json)
    print(report.render(result))
    return int(any("failed" in run for row in result["rows"] for run in row["runs"]))


def page(arguments: Sequence[str]) -> int:
    if not arguments:
        say("python -m benchmarks page: name the files that --json wrote")
        return 2
    report.write_page([report.load(Path(name)) for name in arguments])
    return 0


COMMANDS = {"page": page, "systems": at_hand, **{name: partial(measure, name) for name in TABLES}}


def main(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name](rest)
    print(__doc__)
    return 0 if name in ("-h", "--help", "help") else 2


if __name__ == "__main__":
    # Whoever ends the benchmark also ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a process that Ctrl-C ended
