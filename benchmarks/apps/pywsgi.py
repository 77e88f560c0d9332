"""django-sse on gevent's own server: `python -m benchmarks.apps.pywsgi PORT`."""

from gevent import monkey

monkey.patch_all()  # before anything that takes a lock, a thread or a socket at import

import sys  # noqa: E402

from gevent.pywsgi import WSGIServer  # noqa: E402

from .ours import wsgi  # noqa: E402

if __name__ == "__main__":
    WSGIServer(("127.0.0.1", int(sys.argv[1])), wsgi(), backlog=4096, log=None).serve_forever()
