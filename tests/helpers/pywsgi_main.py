"""
Serve a WSGI application with gevent's own server: `python -m tests.helpers.pywsgi_main PORT MODULE:NAME`.

It is stopped as docs/stopping.rst has it.
"""

from gevent import monkey

monkey.patch_all()  # before anything that takes a lock, a thread or a socket at import

import importlib  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402
from gevent import pywsgi  # noqa: E402


def main():
    port, target = sys.argv[1:]
    module, _, name = target.partition(":")
    application = getattr(importlib.import_module(module), name)
    server = pywsgi.WSGIServer(("127.0.0.1", int(port)), application)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *args: gevent.spawn(server.stop, 1))  # seconds that open requests are given
    server.serve_forever()


if __name__ == "__main__":
    main()
