"""Middleware that streams meet: what Django brings, in the order of its documents, and what projects write."""

import functools

from asgiref.sync import iscoroutinefunction
from django.http import HttpResponseForbidden, StreamingHttpResponse
from django.utils.decorators import sync_and_async_middleware, sync_only_middleware

DJANGOS = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.gzip.GZipMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]


def path_of(middleware):
    """Return what the setting `MIDDLEWARE` knows this middleware as."""
    return f"{middleware.__module__}.{middleware.__name__}"


@sync_only_middleware
def sync_only(get_response):
    def middleware(request):
        response = get_response(request)
        response["X-Seen"] = "by sync-only middleware"
        return response

    return middleware


def after(change):
    """Make `change(response)` middleware, sync and async: what it returns is the response."""

    @functools.wraps(change)
    def factory(get_response):
        if iscoroutinefunction(get_response):

            async def middleware(request):
                return change(await get_response(request))

        else:

            def middleware(request):
                return change(get_response(request))

        return middleware

    return sync_and_async_middleware(factory)


def louder(chunks):
    for chunk in chunks:
        yield chunk.upper()


async def louder_async(chunks):
    async for chunk in chunks:
        yield chunk.upper()


def _louder(response):
    return (louder_async if response.is_async else louder)(response.streaming_content)


@after
def wrapping(response):
    response.streaming_content = _louder(response)
    return response


@after
def wrapping_in_another(response):
    return StreamingHttpResponse(_louder(response), headers=response.headers)


@after
def looking(response):
    """Ask for the content and leave it as it is."""
    assert response.streaming_content is not None
    return response


@after
def forbidding(response):
    return HttpResponseForbidden("Not you.")


@after
def failing(response):
    raise RuntimeError("middleware that fails")
