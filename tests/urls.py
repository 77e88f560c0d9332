"""The URLs of the test project: `/ping`, and under its own name every `tests/<name>/urls.py` there is."""

import os
from pathlib import Path

from django.http import HttpResponse
from django.urls import include, path


def ping(request):
    """Answer with the token of this server, so that nobody mistakes another server on the same port for it."""
    return HttpResponse(os.environ.get("TEST_SERVER_TOKEN", ""), content_type="text/plain")


urlpatterns = [
    path("ping", ping),
    *(
        path(f"{module.parent.name}/", include(f"tests.{module.parent.name}.urls"))
        for module in sorted(Path(__file__).parent.glob("*/urls.py"))
    ),
]
