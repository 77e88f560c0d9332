"""
The WSGI application of a project that is busy while it is loaded: it publishes, and answers a request to warm up.

Under `gunicorn --preload` all that happens in the master, so the hub, the connections and the threads that the package
has by then are there when the workers are forked, as copies that work in none of them.
"""

from wsgiref.util import setup_testing_defaults

from django_sse.redisqueue import send_event
from tests.wsgi import application

__all__ = ["application"]


def warm_up():
    """Take the first bytes of a stream, and leave."""
    environ = {"PATH_INFO": "/servers/queue/preloaded"}
    setup_testing_defaults(environ)
    response = application(environ, lambda status, headers: None)
    next(iter(response))
    response.close()


warm_up()
send_event("loaded", "in the master", "preloaded")
