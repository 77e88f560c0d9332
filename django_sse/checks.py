"""System checks: each mistake that can be seen without a request has an id here, and what could be saved, too."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Error, Info
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.utils.module_loading import import_string

from .asgi import SseApplication
from .conf import configuration

__all__ = ["check_application", "check_settings"]

#: Objects of an ASGI application that are looked through for Django's: routers have a handful.
LOOKED_AT = 1000


def check_settings(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[CheckMessage]:
    """Return what is wrong with ``DJANGO_SSE``."""
    readers: list[Callable[[], Any]] = [
        lambda: configuration.heartbeat,
        lambda: configuration.retry,
        lambda: configuration.mailbox,
        lambda: configuration.threads,
        lambda: configuration.max_age,
        lambda: configuration.stall_timeout,
        lambda: configuration.max_streams,
        lambda: configuration.max_streams_per_user,
        lambda: configuration.shutdown_window,
        lambda: configuration.channel_prefix,
        lambda: configuration.histories,
        lambda: configuration.max_payload,
    ]
    try:
        unknown = configuration.unknown
    except ImproperlyConfigured as error:
        return [Error(str(error), hint="See the settings reference of django-sse.", id="django_sse.E001")]
    messages: list[CheckMessage] = [
        checks.Warning(
            f"DJANGO_SSE has an unknown key {key!r}, which does nothing.",
            hint="Is it misspelt? Keys are upper-case.",
            id="django_sse.W001",
        )
        for key in unknown
    ]
    for read in readers:
        try:
            read()
        except ImproperlyConfigured as error:
            messages.append(Error(str(error), id="django_sse.E001"))
    return messages


@checks.register(deploy=True)
def check_application(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[CheckMessage]:
    """Return what ``SseApplication`` would save, where the ASGI application is known and goes without.

    With ``--deploy`` alone: the application has to be imported, which is not for every command to do.
    """
    name = getattr(settings, "ASGI_APPLICATION", None)
    if not name:
        return []
    try:
        if not _is_plain(import_string(name)):
            return []
    except Exception:  # noqa: BLE001  # whatever is wrong with it, whoever serves it will see the traceback
        return []
    return [
        Info(
            f"The streams of {name} stay in Django's request handler, where each takes about twice the memory that it "
            "takes when it is handed over to django_sse.",
            hint="Replace Django's get_asgi_application:\n"
            "\t\tfrom django_sse.asgi import get_asgi_application\n"
            "\t\tapplication = get_asgi_application()",
            id="django_sse.I001",
        )
    ]


def _is_plain(application: Any) -> bool:
    """Whether ``application`` leads to Django's, and that to no ``SseApplication``. In doubt it does not."""
    plain = False
    seen = {id(application)}
    left = deque([application])
    while left:
        part = left.popleft()
        if isinstance(part, SseApplication):
            return False
        if isinstance(part, ASGIHandler):
            plain = True
            continue
        for inner in _parts(part):
            if id(inner) not in seen and len(seen) < LOOKED_AT:
                seen.add(id(inner))
                left.append(inner)
    return plain


def _parts(part: Any) -> Iterable[Any]:
    """Return what an application, or a part of it, may call: routers and middleware keep it in various ways."""
    if isinstance(part, (str, bytes, type, ModuleType)):
        return ()
    if isinstance(part, Mapping):
        return part.values()
    if isinstance(part, (list, tuple)):
        return part
    if isinstance(part, functools.partial):
        return (part.func, *part.args, *part.keywords.values())
    if isinstance(part, MethodType):
        return (part.__self__, part.__func__)
    if isinstance(part, FunctionType):
        names = inspect.getclosurevars(part)
        return (*names.nonlocals.values(), *names.globals.values(), *vars(part).values())
    return (*getattr(part, "__dict__", {}).values(), inspect.getattr_static(type(part), "__call__", None))
