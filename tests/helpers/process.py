"""A child process in a group of its own, on a port that was free, with its output in a file that goes with it."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile

RUNNING = []  # the processes of this test process that have not been stopped: what a failed test shows the log of

# Below the range from which Linux takes the ports of outgoing connections (32768 and up): no connection of a test can
# take the port between our look and the server's bind, and a client that knocks on the port of a stopped Redis cannot
# be connected with itself, which TCP allows.
PORTS = range(20000, 32000)


def free_port():
    """Return a port of the loopback interface on which nobody listens just now."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Process:
    """A command that runs until `stop()`, which leaves nothing of it behind, its own children included."""

    def __init__(self, name, command, *, env=None, cwd=None):
        self.name = name
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        try:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except BaseException:
            self._output.close()
            raise
        RUNNING.append(self)

    @property
    def pid(self):
        return self._popen.pid

    @property
    def returncode(self):
        """None while the process runs, then what it returned."""
        return self._popen.poll()

    def log(self):
        """Everything written so far to standard output and standard error."""
        size = os.fstat(self._output.fileno()).st_size
        # pread leaves the file's position alone, which the process shares.
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def kill(self, signum):
        """Send a signal to the process itself, as a supervisor does."""
        self._popen.send_signal(signum)

    def stop(self, signum=signal.SIGTERM, patience=3):
        """Send `signum`, wait `patience` seconds, then kill what is left of the group; return the exit status."""
        try:
            self.kill(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(patience)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
            if self in RUNNING:
                RUNNING.remove(self)
        return self._popen.returncode

    def close(self):
        """Stop if need be and give the log file back."""
        if self in RUNNING:
            self.stop()
        self._output.close()
