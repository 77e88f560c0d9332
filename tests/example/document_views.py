"""The views that docs/history.rst shows, as they stand there, with a hash in Redis for a database."""

import os

from django.http import HttpResponse
from django.urls import path

from django_sse.redisqueue import _connect
from tests.helpers.documents import ROOT, code_blocks

TABLE = "headlines"  # the hash: text by key


class Headline:
    """As much of a model as the page asks for."""

    class objects:  # noqa: N801
        @staticmethod
        def values(*fields):
            rows = sorted((int(pk), text.decode()) for pk, text in _connect().hgetall(TABLE).items())
            return [dict(zip(fields, row, strict=True)) for row in rows]


for block in code_blocks(ROOT / "docs" / "history.rst"):
    if "RedisQueueView" in block:
        exec(block)  # `urlpatterns`, and the view `News`

urlpatterns += [  # noqa: F821
    path("ping", lambda request: HttpResponse(os.environ["TEST_SERVER_TOKEN"])),
    path("state-through-the-stream/", News.as_view()),  # noqa: F821
]
