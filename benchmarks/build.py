"""The programs in C, compiled when they are first wanted and kept in the cache, by the text they were made from."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from . import cache

HERE = Path(__file__).resolve().parent
HOW = "a C compiler: on Debian `apt-get install gcc libc6-dev`, elsewhere any `cc`"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def binary(name: str) -> Path:
    """Return the program made of `<name>.c`. Raises `cache.Unavailable`."""
    source = HERE / f"{name}.c"
    program = cache.folder("programs") / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if program.exists():
        return program
    if not compiler():
        raise cache.Unavailable(HOW)
    unfinished = program.with_suffix(f".{os.getpid()}")  # renamed when it is whole: another process may want it too
    command = [compiler(), "-O2", "-Wall", "-Wextra", "-o", unfinished, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise cache.Unavailable(f"{source.name} cannot be compiled:\n{done.stderr}")
    unfinished.rename(program)
    return program
