"""Serve the test project with gevent's own server, stopped as docs/stopping.rst has it: `... PORT`."""

from gevent import monkey

monkey.patch_all()  # before anything that takes a lock, a thread or a socket at import

import signal  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from gevent import pywsgi  # noqa: E402

from tests.wsgi import application  # noqa: E402


def main():
    server = pywsgi.WSGIServer(("127.0.0.1", int(sys.argv[1])), application, log=None)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *args: gevent.spawn(server.stop, 1))
    server.serve_forever()


if __name__ == "__main__":
    main()
