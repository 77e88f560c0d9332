"""A private PostgreSQL server: its own directory and socket, nothing kept, nothing of the machine's own touched."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg

from tests.helpers.need import need
from tests.helpers.process import Process
from tests.helpers.wait import until

HOW = "PostgreSQL: on Debian `apt-get install postgresql`, elsewhere https://www.postgresql.org/download/"
DEBIAN = Path("/usr/lib/postgresql")  # keeps the programs off PATH, in a folder for each major version

NAME = "census"  # of the user and of the database
CONNECTIONS = 400  # at one time: more than any test opens, so that one that holds too many can be counted
PORT = 5432  # part of the socket's name and nothing else: the server does not listen on the network

WHEEL = "pgserver/pginstall/bin"  # the programs in the wheel of that name, which can be unpacked anywhere

# Becomes the user and group of its first two arguments, then the program of the others.
BECOME = """
import os, sys
user, group, *command = sys.argv[1:]
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
os.execv(command[0], command)
"""


def find():
    """Return the folder of the programs, or None: `DJANGO_SSE_POSTGRES` and PATH come before Debian's place."""
    named = shutil.which(os.environ.get("DJANGO_SSE_POSTGRES", "postgres"))
    debian = sorted(DEBIAN.glob("*/bin/postgres"), key=lambda program: float(program.parts[-3]), reverse=True)
    for program in filter(None, (named, *debian)):
        folder = Path(program).resolve().parent
        if os.access(folder / "initdb", os.X_OK):
            return folder
    return None


class PostgresServer:
    """Runs from `__enter__` to `__exit__`. `settings` is what Django's `DATABASES` takes."""

    def __init__(self, programs=None):
        self.programs = programs or find()
        need(self.programs, HOW)
        # Short, for the path of a Unix socket may have a hundred characters.
        self._directory = tempfile.TemporaryDirectory(prefix="django-sse-pg-")
        self._process = None
        self._connection = None

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def pid(self):
        return self._process.pid

    @property
    def settings(self):
        return {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": self._directory.name,
            "PORT": str(PORT),
            "USER": NAME,
            "NAME": NAME,
        }

    def connections(self, application):
        """Return how many connections the programs that call themselves `application` have just now."""
        query = "select count(*) from pg_stat_activity where application_name = %s"
        return self._connection.execute(query, [application]).fetchone()[0]

    def close(self):
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.stop(signal.SIGQUIT)  # at once, whoever is connected
            self._process.close()
        self._directory.cleanup()

    def _start(self):
        data = Path(self._directory.name, "data")
        prefix, self.programs = self._as_nobody()
        initialise = [self.programs / "initdb", "-D", data, "-U", NAME, "-A", "trust", "-E", "UTF8"]
        self._call([*prefix, *initialise, "--no-locale", "--no-sync", "--no-instructions"])
        serve = [self.programs / "postgres", "-D", data, "-k", self._directory.name, "-p", PORT, "-F"]
        options = {"listen_addresses": "", "max_connections": CONNECTIONS, "shared_buffers": "16MB"}
        serve += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._process = Process("postgres", [str(word) for word in (*prefix, *serve)])
        until(lambda: self._process.returncode is not None or self._connects(), what="an answer of PostgreSQL")
        if self._connection is None:
            raise AssertionError(f"PostgreSQL does not start:\n{self._process.log()}")
        self._connection.execute(f"create database {NAME}")

    def _as_nobody(self):
        """Return what to put before a command, and the folder of the programs: PostgreSQL refuses to run as root."""
        if os.geteuid() != 0:
            return [], self.programs
        user = pwd.getpwnam("nobody")
        os.chown(self._directory.name, user.pw_uid, user.pw_gid)
        prefix = [sys.executable, "-c", BECOME, user.pw_uid, user.pw_gid]
        programs = self.programs
        if programs.match(f"*/{WHEEL}"):
            # Unpacked by root, they may lie in a folder that nobody else may enter.
            copy = Path(self._directory.name, "wheel")
            shutil.copytree(programs.parents[2], copy)
            programs = copy / WHEEL
        return prefix, programs

    @staticmethod
    def _call(command):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"{command} failed:\n{done.stdout}{done.stderr}")

    def _connects(self):
        try:
            self._connection = psycopg.connect(
                host=self._directory.name, port=PORT, user=NAME, dbname="postgres", autocommit=True
            )
        except psycopg.OperationalError:
            return False
        return True
