"""What the benchmarks make once and keep: one folder of the user, outside of the project, that may be removed any time.

Packages that are compared with ours are installed here, each set in an environment of its own, so that measuring them
never changes the versions that the project is developed with. They are named, not pinned: the tables say what was run.
"""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

BUILD_SECONDS = 600  # for one environment: downloading and compiling on a slow machine


class Unavailable(Exception):
    """A part that could not be brought here; the text says which and why."""


def folder(name: str) -> Path:
    """Return the folder for what goes by `name`, made if it is missing."""
    named = os.environ.get("DJANGO_SSE_BENCHMARKS_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "django-sse-benchmarks"
    path = base.expanduser().resolve() / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def virtual_environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python of a virtual environment with `requirements`. Raises `Unavailable`."""
    with _place(name, "venv", sys.version, *requirements) as (path, ready):
        python = path / "bin" / "python"
        if not ready:
            _build(name, sys.executable, "-m", "venv", "--clear", path)
            _build(name, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
    return python


def target_folder(name: str, python: str, requirements: Sequence[str]) -> Path:
    """Return a folder with `requirements` for PYTHONPATH, for a Python without venv. Raises `Unavailable`."""
    with _place(name, "target", python, *requirements) as (path, ready):
        if not ready:
            _build(name, python, "-m", "pip", "install", "--quiet", "--upgrade", "--target", path, *requirements)
    return path


def node_modules(name: str, packages: Sequence[str]) -> Path:
    """Return the `node_modules` folder with `packages`. Raises `Unavailable`."""
    with _place(name, "npm", *packages) as (path, ready):
        if not ready:
            _build(
                name, "npm", "install", "--loglevel", "error", "--no-audit", "--no-fund", "--prefix", path, *packages
            )
    return path / "node_modules"


@contextlib.contextmanager
def _place(name: str, *facts: str) -> Iterator[tuple[Path, bool]]:
    """The folder of one environment, for one process at a time, and whether an earlier one has finished it.

    It is known by whatever makes another one necessary.
    """
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
    path = folder(f"{name}-{key}")
    stamp = path.with_suffix(".ready")  # beside the folder, which some tools empty first
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path, stamp.exists()
        stamp.touch()


def _build(name: str, *command: object) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{name}: {error}") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise Unavailable(f"{name}: {' '.join(words[:4])} ... failed: {''.join(lines[:1])}")
