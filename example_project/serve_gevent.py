#!/usr/bin/env python
"""The example on gevent: ``python serve_gevent.py 8000``. One greenlet per open page, no threads."""

# Before anything else: what is imported earlier keeps the blocking socket, lock and sleep.
from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import signal  # noqa: E402

import gevent  # noqa: E402
from gevent.pywsgi import WSGIServer  # noqa: E402

from example.wsgi import application  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", nargs="?", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1")
    options = parser.parse_args()

    server = WSGIServer((options.host, options.port), application)
    for signum in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(signum, server.stop)
    print(f"Serving on http://{options.host}:{options.port}/ (Ctrl+C stops)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
