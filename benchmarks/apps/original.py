"""django-sse 0.4.1 of 2013 on gevent, for Python 2.7: `python2.7 original.py PORT`."""

import os
import site

site.addsitedir(os.environ["PYTHONPATH"])  # its .pth files make the namespace packages of Python 2

from gevent import monkey

monkey.patch_all()  # before anything that takes a lock, a thread or a socket at import

import itertools  # noqa: E402
import sys  # noqa: E402

from django.conf import settings  # noqa: E402

settings.configure(  # before django_sse, which reads it when it is imported
    ALLOWED_HOSTS=["*"],
    MIDDLEWARE_CLASSES=[],
    REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "127.0.0.1:" + os.environ["BENCHMARK_REDIS_PORT"]},
    ROOT_URLCONF=__name__,
    SECRET_KEY="benchmark",
)

from django.conf.urls import url  # noqa: E402
from django.core.handlers.wsgi import WSGIHandler  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from gevent.pywsgi import WSGIServer  # noqa: E402

from django_sse.redisqueue import RedisQueueView  # noqa: E402


class Events(RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["channel"]

    def _iterator(self):
        # gevent sends the headers with the first chunk, and 0.4.1 has none before its first event.
        return itertools.chain([":\n\n"], RedisQueueView._iterator(self))


def ping(request):
    return HttpResponse(str(os.getpid()))


urlpatterns = [url(r"^events/(?P<channel>.+)$", Events.as_view()), url(r"^ping$", ping)]

if __name__ == "__main__":
    WSGIServer(("127.0.0.1", int(sys.argv[1])), WSGIHandler(), backlog=4096, log=None).serve_forever()
