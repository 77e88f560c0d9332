"""
A headless Chromium, and the example project as a process of its own that can be killed and started again.

Both live as long as one module: while Playwright runs, this thread counts as one with a running event loop, which
Django and asyncio would refuse elsewhere.
"""

import os
import shutil
import signal
import sys
from contextlib import ExitStack

import pytest

from tests.helpers.client import request as http_request
from tests.helpers.need import need
from tests.helpers.process import Process, free_port
from tests.helpers.servers import ROOT
from tests.helpers.wait import until

try:
    from playwright.sync_api import sync_playwright
except ImportError:  # it brings binaries that not every platform has
    sync_playwright = None

EXAMPLE = ROOT / "example_project"
PATIENCE = 20  # seconds in which a server must answer, on a busy machine too

# The commands of example_project/README.rst; the reloader would be a second process to kill.
COMMANDS = {
    "runserver": ("manage.py", "runserver", "--noreload", "{port}"),
    "uvicorn": ("-m", "uvicorn", "example.asgi:application", "--port", "{port}"),
    "gevent": ("serve_gevent.py", "{port}"),
}

CHROMIUM_NAMES = (
    os.environ.get("DJANGO_SSE_CHROMIUM", ""),
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
CHROMIUM_ARGUMENTS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),  # nothing but the loopback
    *(["--no-sandbox"] if os.geteuid() == 0 else []),  # root has no sandbox
]


class Example:
    """The example on one of its servers. It keeps its port, so that a page finds it again."""

    def __init__(self, server, **env):
        self.server = server
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # Coverage counts threads only: [tool.coverage.run].
        left_out = ["REDIS_URL", "DEBUG", *(["COVERAGE_PROCESS_CONFIG"] if server == "gevent" else [])]
        self._env = {
            **{name: value for name, value in os.environ.items() if name not in left_out},
            "DJANGO_SETTINGS_MODULE": "example.settings",  # and not that of the tests
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.kill()

    @property
    def running(self):
        return self._process is not None and self._process.returncode is None

    def start(self):
        command = [sys.executable, *(word.format(port=self.port) for word in COMMANDS[self.server])]
        self._process = Process(f"example on {self.server}", command, env=self._env, cwd=EXAMPLE)
        try:
            status = until(lambda: not self.running or self._status(), PATIENCE, f"an answer of {self.server}")
            assert status == 200, f"{self.server} exited" if status is True else f"{self.server} answers {status}"
        except BaseException:
            print(self._process.log())
            self.kill()
            raise

    def kill(self):
        """End it without a word to its clients, as a crash does."""
        if self._process is not None:
            self._process.stop(signal.SIGKILL)
            self._process.close()
            self._process = None

    def _status(self):
        try:
            return http_request("GET", self.url + "/", timeout=5)[0]
        except OSError:
            return None


@pytest.fixture(scope="module", params=COMMANDS)
def any_server(request):
    """The example on each of its servers in turn, on the memory broker."""
    with Example(request.param) as example:
        yield example


@pytest.fixture
def example(any_server):
    """The running example, whatever the test before did to it."""
    if not any_server.running:
        any_server.start()
    return any_server


@pytest.fixture
def start_example():
    """Start the example on a server with additional environment variables; it ends with the test."""
    with ExitStack() as stack:
        yield lambda server, **env: stack.enter_context(Example(server, **env))


@pytest.fixture(scope="module")
def browser():
    need(sync_playwright, "playwright: `pip install playwright`")
    executable = next(filter(None, map(shutil.which, filter(None, CHROMIUM_NAMES))), None)
    need(executable, "chromium: on Debian `apt-get install chromium`, elsewhere an installed Chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=CHROMIUM_ARGUMENTS,
            ignore_default_args=["--disable-back-forward-cache"],  # users have it
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open an address in a new tab of one browser window; at the end no script of the pages may have failed."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE * 1000)  # milliseconds
    errors = []

    def open_page(url):
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    context.close()
    assert errors == []
