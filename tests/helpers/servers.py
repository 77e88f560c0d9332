"""
The servers on which the package must work, each as a real process on a free port of the loopback interface.

    with serve("uvicorn", env={"TEST_REDIS_LOCATION": redis_server.location}) as server:
        request("GET", server.url + "/ping")
"""

import os
import signal
import sys
import uuid
from pathlib import Path

from tests.helpers.client import request
from tests.helpers.need import need_module
from tests.helpers.process import Process, free_port
from tests.helpers.wait import until

WSGI_SERVERS = ("runserver", "gunicorn-gthread", "gunicorn-gevent", "pywsgi")
ASGI_SERVERS = ("uvicorn", "daphne", "hypercorn", "granian")
SERVERS = WSGI_SERVERS + ASGI_SERVERS
GEVENT_SERVERS = ("gunicorn-gevent", "pywsgi")
PATIENCE = 20  # seconds in which a server must answer; eight of them may be starting on a busy machine

ROOT = Path(__file__).resolve().parents[2]
MODULE = {  # what must be importable for the server to run
    "runserver": "django",
    "gunicorn-gthread": "gunicorn",
    "gunicorn-gevent": "gunicorn",
    "pywsgi": "gevent",
}


def command(name, port, app, workers, threads, extra):
    """The command line of each server; `extra` goes where the server takes options."""
    host, bind = "127.0.0.1", f"127.0.0.1:{port}"
    # The control socket of gunicorn 25.1 and later would be one file in the home directory, shared by all of them.
    gunicorn = ["gunicorn", app, "--bind", bind, "--workers", workers, "--graceful-timeout", 1, "--no-control-socket"]
    arguments = {
        "runserver": ["django", "runserver", "--noreload", bind],
        "gunicorn-gthread": [*gunicorn, "--worker-class", "gthread", "--threads", threads],
        "gunicorn-gevent": [*gunicorn, "--worker-class", "gevent"],
        "pywsgi": ["tests.helpers.pywsgi_main", port, app],
        "uvicorn": ["uvicorn", app, "--host", host, "--port", port, "--loop", "auto", "--workers", workers],
        "daphne": ["daphne", "--bind", host, "--port", port, app],
        "hypercorn": ["hypercorn", app, "--bind", bind, "--workers", workers],
        "granian": ["granian", app, "--interface", "asgi", "--host", host, "--port", port, "--workers", workers],
    }[name]
    return [sys.executable, "-m", *map(str, arguments), *map(str, extra)]


class Server:
    """One running server. `url` has no slash at its end; `log()` is all it has written."""

    def __init__(self, name, process, port):
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._process = process

    def __repr__(self):
        return f"<Server {self.name} pid={self.pid} {self.url}>"

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.returncode

    def log(self):
        return self._process.log()

    def kill(self, signum):
        """Send a signal to the main process and do not wait."""
        self._process.kill(signum)

    def stop(self, signum=signal.SIGTERM, patience=3):
        """Ask with `signum`, wait `patience` seconds, kill what is left; `log()` stays readable until `close()`."""
        return self._process.stop(signum, patience)

    def close(self):
        self._process.close()


def serve(
    name, *, settings="tests.settings", env=None, workers=1, threads=64, app=None, extra=(), cwd=ROOT, ready="/ping"
):
    """
    Start the server `name`, wait until `ready` is answered, and return it as a context manager that stops it.

    `env` is added to the environment. `app` is `module:name`, by default the test project's. `workers` counts
    processes where the server has them; `threads` bounds the streams of gthread. The path `/ping` answers with a token
    that only this server knows; any other `ready` path may answer anything below 500.
    """
    need_module(MODULE.get(name, name))
    if workers != 1 and name in ("runserver", "pywsgi", "daphne"):
        raise ValueError(f"{name} has one process only")
    interface = "asgi" if name in ASGI_SERVERS else "wsgi"
    app = app or f"tests.{interface}:application"
    token = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(cwd), str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",  # the log is read while the server runs
        "DJANGO_SETTINGS_MODULE": settings,
        "TEST_WSGI_APPLICATION": app.replace(":", "."),
        "TEST_SERVER_TOKEN": token,
        **(env or {}),
    }
    if name in GEVENT_SERVERS:
        environment.pop("COVERAGE_PROCESS_CONFIG", None)  # as [tool.coverage.run] says
    for _ in range(3):
        port = free_port()
        process = Process(name, command(name, port, app, workers, threads, extra), env=environment, cwd=cwd)
        server = Server(name, process, port)
        try:
            until(
                lambda: server.returncode is not None or _answers(server, ready, token),  # noqa: B023
                PATIENCE,
                f"an answer of {name} to {ready}",
            )
            if server.returncode is None:
                return server
            failure = f"{name} exited with {server.returncode}"
        except BaseException as error:
            log = server.log()
            server.close()
            if not isinstance(error, AssertionError):
                raise
            raise AssertionError(f"{error}\n{log}") from None
        log = server.log()
        server.close()
        if "in use" not in log.lower():
            break
    raise AssertionError(f"{failure}:\n{log}")


def _answers(server, ready, token):
    try:
        status, _, body = request("GET", server.url + ready, timeout=2)
    except OSError:
        return False
    if status >= 500:
        raise AssertionError(f"{server.name} answers {status} to {ready}")
    return ready != "/ping" or body.decode() == token
