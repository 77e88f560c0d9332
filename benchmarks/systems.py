"""The systems under test: a row for each, which says how it is started and how an event gets into it.

Each is the least that does the job as its own manual has it (`benchmarks.apps`), tuned as far as its settings go. Ours
and the plain Django ones run with the Python that runs the benchmark, the others in environments of their own.
"""

import json
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import django_sse

from . import cache
from .apps import nginx
from .build import binary
from .launch import HOST, Running, Site, free_port, launch

__all__ = ["SYSTEMS", "Running", "Site", "System"]

ROOT = Path(__file__).absolute().parents[1]
APPS = ROOT / "benchmarks" / "apps"
MOST_CLIENTS = 20_000  # of one process, where a server wants a bound
MOST_THREADS = 4_000  # of gthread, one for each client; they are made when they are needed
MOST_EVENTS = 20_000  # kept for a client that is behind, where a server wants a bound


class System(NamedTuple):
    """A row. `publish` is the form in which `benchmarks.publish` sends an event; None: the system has no events."""

    name: str
    key: str
    needs: Callable[[], str | None]  # makes on first use what pip or npm bring; None, or what is missing
    start: Callable[[Site], Running]
    publish: str | None
    versions: Callable[[], dict[str, str]]
    path: Callable[[str], str] = "/events/{}".format
    publish_path: Callable[[str], str] = "/publish/{}".format


def environ(site: Site) -> dict[str, str]:
    """What the applications are told."""
    return {"PYTHONPATH": str(ROOT), "BENCHMARK_REDIS_PORT": str(site.redis_port)}


def single(site: Site) -> None:
    """Some servers are one process."""
    if site.workers != 1:
        raise ValueError("this system has one worker only")


# Python packages ------------------------------------------------------------------------------------------------------


def found(names: Iterable[str], *path: str) -> dict[str, str]:
    """The versions of those of the distributions `names` that are installed in `path`, or here."""
    there = {each.name.lower(): each.version for each in distributions(path=list(path or sys.path)) if each.name}
    return {name: there[name.lower()] for name in names if name.lower() in there}


class Here(NamedTuple):
    """The Python that runs the benchmark, with its packages."""

    required: Sequence[str]
    ours: bool = True

    def python(self) -> str:
        return sys.executable

    def needs(self) -> str | None:
        missing = set(self.required).difference(found(self.required))
        return f"{', '.join(sorted(missing))}: pip install django-sse[benchmarks]" if missing else None

    def versions(self) -> dict[str, str]:
        ours = {"django-sse": django_sse.__version__} if self.ours else {}
        return {"Python": platform.python_version(), **ours, **found([*self.required, "hiredis"])}


class Apart(NamedTuple):
    """The same Python with packages in a virtual environment of their own."""

    name: str
    requirements: Sequence[str]
    reported: Sequence[str]

    def python(self) -> str:
        return str(cache.virtual_environment(self.name, self.requirements))

    def needs(self) -> str | None:
        return unavailable(self.python)

    def versions(self) -> dict[str, str]:
        packages = Path(self.python()).parents[1].glob("lib/python*/site-packages")
        return {"Python": platform.python_version(), **found(self.reported, *map(str, packages))}


def answers(*command: str) -> str:
    """What a program prints, or nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def unavailable(bring: Callable[[], object]) -> str | None:
    """Why what `bring` makes is not to be had, or None."""
    try:
        bring()
    except cache.Unavailable as error:
        return str(error)
    return None


# Python servers -------------------------------------------------------------------------------------------------------


def uvicorn(packages: Here | Apart, factory: str, site: Site) -> Running:
    words = ["-m", "uvicorn", "--factory", f"benchmarks.apps.{factory}", "--workers", site.workers]
    words += ["--host", HOST, "--port", site.port, "--http", "httptools", "--loop", "uvloop", "--log-level", "warning"]
    return Running(launch(site, [packages.python(), *words, "--no-access-log"], environ(site)), site.port)


def gunicorn(worker: str, site: Site) -> Running:
    words = ["-m", "gunicorn", "benchmarks.apps.ours:wsgi()", "--bind", f"{HOST}:{site.port}", "--no-control-socket"]
    words += ["--workers", site.workers, "--worker-class", worker, "--worker-connections", MOST_CLIENTS]
    # No worker is killed for being busy: to be busy is what it is here for.
    words += ["--threads", MOST_THREADS, "--timeout", 0, "--log-level", "warning"]
    return Running(launch(site, [sys.executable, *words], environ(site)), site.port)


def pywsgi(site: Site) -> Running:
    single(site)
    return Running(launch(site, [sys.executable, "-m", "benchmarks.apps.pywsgi", site.port], environ(site)), site.port)


# django-sse 0.4.1 -----------------------------------------------------------------------------------------------------


class Original(NamedTuple):
    """Python 2.7 with what 0.4.1 runs on: the last Django whose plain response streams is 1.6."""

    requirements: Sequence[str] = ("django-sse==0.4.1", "sse", "Django<1.7", "redis", "gevent")

    def python(self) -> str:
        named = os.environ.get("DJANGO_SSE_PYTHON27", "python2.7")
        if not answers(named, "-m", "pip", "--version"):
            raise cache.Unavailable("Python 2.7 with pip, which 0.4.1 needs: DJANGO_SSE_PYTHON27 may name it")
        return named

    def folder(self) -> Path:
        return cache.target_folder("original", self.python(), self.requirements)

    def needs(self) -> str | None:
        return unavailable(self.folder)

    def versions(self) -> dict[str, str]:
        version = answers(self.python(), "-c", "import platform; print(platform.python_version())")
        return {"Python": version, **found(("django-sse", "Django", "redis", "gevent"), str(self.folder()))}


ORIGINAL = Original()


def original(site: Site) -> Running:
    single(site)
    env = {**environ(site), "PYTHONPATH": str(ORIGINAL.folder())}
    return Running(launch(site, [ORIGINAL.python(), APPS / "original.py", site.port], env), site.port)


# Node -----------------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """Node and packages of npm's."""

    packages: Sequence[str] = ("better-sse", "ioredis")

    def modules(self) -> Path:
        if int(self._version().partition(".")[0] or 0) < NODE:
            raise cache.Unavailable(f"Node {NODE} or newer, with npm: https://nodejs.org/")
        return cache.node_modules("better-sse", self.packages)

    def needs(self) -> str | None:
        return unavailable(self.modules)

    def versions(self) -> dict[str, str]:
        manifests = {name: self.modules() / name / "package.json" for name in self.packages}
        known = {name: json.loads(path.read_text("utf-8"))["version"] for name, path in manifests.items()}
        return {"Node": self._version(), **known}

    @staticmethod
    def _version() -> str:
        return answers("node", "--print", "process.versions.node")


NODE = 20  # the oldest that better-sse runs on
BETTER_SSE = Node()


def better_sse(site: Site) -> Running:
    single(site)
    env = {**environ(site), "NODE_PATH": str(BETTER_SSE.modules())}
    return Running(launch(site, ["node", APPS / "better_sse.cjs", site.port], env), site.port)


# nchan ----------------------------------------------------------------------------------------------------------------


class Nchan:
    """nginx and its module, as the system's own packages bring them."""

    def program(self) -> str | None:
        # Where Debian has it is not on everybody's PATH.
        return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))

    def module(self) -> Path | None:
        folder = re.search(r"--modules-path=(\S+)", self._says("-V"))
        module = Path(folder[1]) / "ngx_nchan_module.so" if folder else None
        return module if module and module.exists() else None

    def needs(self) -> str | None:
        how = "on Debian `apt-get install nginx libnginx-mod-nchan`, elsewhere https://nchan.io/#install"
        return None if self.module() else f"nginx with nchan: {how}"

    def versions(self) -> dict[str, str]:
        version = re.search(r"nginx/(\S+)", self._says("-v"))
        package = answers("dpkg-query", "--show", "--showformat", "${Version}", "libnginx-mod-nchan")
        return {"nginx": version[1] if version else "?", "nchan": package or "?"}

    def _says(self, option: str) -> str:
        program = self.program()
        return subprocess.run([program, option], capture_output=True, text=True).stderr if program else ""


NCHAN = Nchan()


def run_nginx(site: Site, name: str, upstream: str = "", publisher: Running | None = None) -> Running:
    prefix = site.folder / name
    prefix.mkdir()
    configuration = nginx.CONFIGURATION.format(
        module=NCHAN.module(),
        user=pwd.getpwuid(os.getuid()).pw_name,  # so that the workers of root's may use this folder too
        workers=site.workers,
        connections=MOST_CLIENTS,
        port=site.port,
        upstream=upstream,
        buffer=MOST_EVENTS,
        passed="nchan_redis_pass redis;" if upstream else "",
    )
    (prefix / "nginx.conf").write_text(configuration)
    server = launch(site, [NCHAN.program(), "-p", prefix, "-c", "nginx.conf", "-e", "stderr"], name=name)
    return Running(server, site.port, publisher)


def nchan(site: Site) -> Running:
    return run_nginx(site, "nginx")


def nchan_redis(site: Site) -> Running:
    """Two of them: one publishes, so that the one that is measured gets its events from Redis only, as ours does."""
    upstream = nginx.UPSTREAM.format(redis_port=site.redis_port)
    others = os.sched_getaffinity(0).difference(site.cores)
    publisher = run_nginx(site._replace(port=free_port(), cores=others, workers=1), "publisher", upstream)
    try:
        return run_nginx(site, "nginx", upstream, publisher)
    except BaseException:
        publisher.stop()
        raise


# The limit ------------------------------------------------------------------------------------------------------------


class Limit:
    """What a server could do that does nothing but `send()`: a program of ours in C."""

    def needs(self) -> str | None:
        return unavailable(partial(binary, "limit"))

    def versions(self) -> dict[str, str]:
        return {}


LIMIT = Limit()


def limit(site: Site) -> Running:
    single(site)
    return Running(launch(site, [binary("limit"), site.port, site.redis_port]), site.port)


# The table ------------------------------------------------------------------------------------------------------------

ASGI = Here(("Django", "redis", "uvicorn", "httptools", "uvloop"))
DJANGO = ASGI._replace(ours=False)
GTHREAD = Here(("Django", "redis", "gunicorn"))
GEVENT = Here(("Django", "redis", "gunicorn", "gevent"))
PYWSGI = Here(("Django", "redis", "gevent"))
EVENTSTREAM = Apart(
    "eventstream",
    ("django-eventstream", "redis[hiredis]", "uvicorn[standard]"),
    ("django-eventstream", "Django", "redis", "hiredis", "uvicorn", "httptools", "uvloop"),
)
STARLETTE = Apart(
    "starlette",
    ("sse-starlette", "redis[hiredis]", "uvicorn[standard]"),
    ("sse-starlette", "starlette", "redis", "hiredis", "uvicorn", "httptools", "uvloop"),
)

Packages = Here | Apart | Original | Node | Nchan | Limit


def row(name: str, key: str, packages: Packages, start: Callable[[Site], Running], publish: str | None) -> System:
    return System(name, key, packages.needs, start, publish, packages.versions)


def row_uvicorn(name: str, key: str, packages: Here | Apart, factory: str, publish: str | None) -> System:
    return row(name, key, packages, partial(uvicorn, packages, factory), publish)


ROWS = (
    row_uvicorn("django-sse, hand-over", "handover", ASGI, "ours:handover", "redis:pair"),
    row_uvicorn("django-sse, inside Django's handler", "handler", ASGI, "ours:handler", "redis:pair"),
    row("django-sse, gunicorn gthread", "gthread", GTHREAD, partial(gunicorn, "gthread"), "redis:pair"),
    row("django-sse, gunicorn gevent", "gunicorn-gevent", GEVENT, partial(gunicorn, "gevent"), "redis:pair"),
    row("django-sse, gevent pywsgi", "pywsgi", PYWSGI, pywsgi, "redis:pair"),
    row_uvicorn("bare async Django view", "bare", DJANGO, "bare:asgi", None),
    row("nchan fed by Redis", "nchan-redis", NCHAN, nchan_redis, "http"),
    row("nchan, own memory", "nchan", NCHAN, nchan, "http"),
    row("better-sse, ioredis", "better-sse", BETTER_SSE, better_sse, "redis:raw"),
    row_uvicorn("sse-starlette, one Redis reader", "starlette", STARLETTE, "starlette:asgi", "redis:raw"),
    row_uvicorn("plain Django, Redis per client", "plain", DJANGO, "plain:asgi", "redis:raw"),
    row_uvicorn("django-eventstream", "eventstream", EVENTSTREAM, "eventstream:asgi", "redis:eventstream"),
    row("epoll and send() in C", "limit", LIMIT, limit, "redis:raw"),
    row("django-sse 0.4.1, gevent", "original", ORIGINAL, original, "redis:pair"),
)

SYSTEMS = {system.key: system for system in ROWS}
