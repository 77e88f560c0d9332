"""Each mistake in the settings that can be seen without a request is a message with an id, before the server starts."""

import functools
from io import StringIO

import pytest
from django.core import checks
from django.core.asgi import get_asgi_application as get_django_application
from django.core.checks import Error, Info, run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from django_sse.asgi import SseApplication
from django_sse.checks import LOOKED_AT, check_application, check_settings
from django_sse.conf import DEFAULTS


def unknown(key):
    return checks.Warning(
        f"DJANGO_SSE has an unknown key {key!r}, which does nothing.",
        hint="Is it misspelt? Keys are upper-case.",
        id="django_sse.W001",
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HEARTBEAT": None},
        {"HEARTBEAT": 0.5, "RETRY": 0, "MAILBOX": {"EVENTS": 1, "BYTES": 1}, "THREADS": 1},
        {"MAILBOX": {}},
        {"MAX_AGE": 3600, "STALL_TIMEOUT": 0.5, "MAX_STREAMS": 1, "MAX_STREAMS_PER_USER": 1},
        {"MAX_AGE": None, "STALL_TIMEOUT": None, "MAX_STREAMS": None, "MAX_STREAMS_PER_USER": None},
        {"SHUTDOWN_WINDOW": 0, "CHANNEL_PREFIX": "shop:"},
        {"HISTORY": None, "MAX_PAYLOAD": None},
        {"HISTORY": {"SIZE": 1, "TTL": 1}, "MAX_PAYLOAD": 1},
        {"HISTORY": {"news": {}, "room-*": {"SIZE": 5}, "*": None}},
    ],
    ids=repr,
)
def test_right_settings_are_passed_over_in_silence(settings, given):
    settings.DJANGO_SSE = given
    assert check_settings(None) == []


def test_no_settings_are_passed_over_in_silence(settings):
    del settings.DJANGO_SSE
    assert check_settings(None) == []


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"HEARTBEAT": 0}, 'DJANGO_SSE["HEARTBEAT"]'),
        ({"RETRY": "2000"}, 'DJANGO_SSE["RETRY"]'),
        ({"MAILBOX": 256}, 'DJANGO_SSE["MAILBOX"]'),
        ({"MAILBOX": {"EVENT": 256}}, 'DJANGO_SSE["MAILBOX"]'),
        ({"MAILBOX": {"EVENTS": 0}}, 'DJANGO_SSE["MAILBOX"]["EVENTS"]'),
        ({"MAILBOX": {"BYTES": None}}, 'DJANGO_SSE["MAILBOX"]["BYTES"]'),
        ({"THREADS": 0}, 'DJANGO_SSE["THREADS"]'),
        ({"MAX_AGE": 0}, 'DJANGO_SSE["MAX_AGE"]'),
        ({"STALL_TIMEOUT": 0}, 'DJANGO_SSE["STALL_TIMEOUT"]'),
        ({"MAX_STREAMS": 0}, 'DJANGO_SSE["MAX_STREAMS"]'),
        ({"MAX_STREAMS_PER_USER": 0}, 'DJANGO_SSE["MAX_STREAMS_PER_USER"]'),
        ({"SHUTDOWN_WINDOW": -1}, 'DJANGO_SSE["SHUTDOWN_WINDOW"]'),
        ({"CHANNEL_PREFIX": None}, 'DJANGO_SSE["CHANNEL_PREFIX"]'),
        ({"HISTORY": 1000}, 'DJANGO_SSE["HISTORY"]'),
        ({"HISTORY": {"SIZE": 0}}, 'DJANGO_SSE["HISTORY"]["SIZE"]'),
        ({"HISTORY": {"TTL": 0.5}}, 'DJANGO_SSE["HISTORY"]["TTL"]'),
        ({"HISTORY": {"news": 5}}, "DJANGO_SSE[\"HISTORY\"]['news']"),
        ({"HISTORY": {"news": {}, "room-*": {"SIZE": 0}}}, 'DJANGO_SSE["HISTORY"][\'room-*\']["SIZE"]'),
        ({"MAX_PAYLOAD": 0}, 'DJANGO_SSE["MAX_PAYLOAD"]'),
    ],
    ids=repr,
)
def test_each_wrong_value_is_an_error_that_names_the_setting(settings, given, setting):
    settings.DJANGO_SSE = given
    [message] = check_settings(None)
    assert isinstance(message, Error)
    assert message.id == "django_sse.E001"
    assert message.msg.startswith(f"{setting} must be ")


@pytest.mark.parametrize("given", [None, [], "HEARTBEAT", 15], ids=repr)
def test_what_is_no_dict_is_one_error(settings, given):
    settings.DJANGO_SSE = given
    assert check_settings(None) == [
        Error(
            f"DJANGO_SSE must be a dict, not {given!r}.",
            hint="See the settings reference of django-sse.",
            id="django_sse.E001",
        )
    ]


def test_each_unknown_key_is_a_warning(settings):
    settings.DJANGO_SSE = {"retry": 5, "HEART_BEAT": 5, "RETRY": 5}
    assert check_settings(None) == [unknown("HEART_BEAT"), unknown("retry")]


def test_all_mistakes_are_told_at_once(settings):
    settings.DJANGO_SSE = {"TYPO": 1, **dict.fromkeys(DEFAULTS, -1)}
    messages = check_settings(None)
    assert [message.id for message in messages] == ["django_sse.W001"] + len(DEFAULTS) * ["django_sse.E001"]
    assert [message.msg.split()[0] for message in messages[1:]] == [f'DJANGO_SSE["{key}"]' for key in DEFAULTS]


def test_the_checks_of_the_project_run_this_one(settings):
    settings.DJANGO_SSE = {"TYPO": 1, "THREADS": 0}
    assert [message.id for message in run_checks() if message.id.startswith("django_sse.")] == [
        "django_sse.W001",
        "django_sse.E001",
    ]


def test_the_check_command_fails_for_a_wrong_value(settings):
    settings.DJANGO_SSE = {"THREADS": 0}
    with pytest.raises(SystemCheckError) as caught:
        call_command("check")
    assert 'django_sse.E001) DJANGO_SSE["THREADS"] must be a whole number of 1 or more, not 0.' in str(caught.value)


def test_the_check_command_warns_of_an_unknown_key_and_goes_on(settings):
    settings.DJANGO_SSE = {"thread": 8}
    said = StringIO()
    call_command("check", stderr=said)
    assert "(django_sse.W001) DJANGO_SSE has an unknown key 'thread', which does nothing." in said.getvalue()
    assert "HINT: Is it misspelt? Keys are upper-case." in said.getvalue()


def test_the_check_command_has_nothing_to_say_about_these_tests():
    said = StringIO()
    call_command("check", stdout=said, stderr=said)
    assert said.getvalue() == "System check identified no issues (0 silenced).\n"


def test_a_warning_can_be_silenced_by_its_id(settings):
    settings.DJANGO_SSE = {"thread": 8}
    settings.SILENCED_SYSTEM_CHECKS = ["django_sse.W001"]
    said = StringIO()
    call_command("check", stdout=said, stderr=said)
    assert said.getvalue() == "System check identified no issues (1 silenced).\n"


# --- the ASGI application ---

plain = get_django_application()
wrapped = SseApplication(plain)


class Middleware:
    """An ASGI middleware as most of them are written."""

    def __init__(self, inner):
        self.inner = inner

    async def __call__(self, scope, receive, send):
        await self.inner(scope, receive, send)


class Router:
    """A router in the manner of Channels: by the connection's type, then by its path."""

    def __init__(self, mapping):
        self.application_mapping = mapping

    async def __call__(self, scope, receive, send):
        await self.application_mapping[scope["type"]](scope, receive, send)


class Slotted:
    """An application that keeps nothing in a `__dict__`, and calls a name of its module."""

    __slots__ = ()

    async def __call__(self, scope, receive, send):
        await plain(scope, receive, send)


def closing(inner):
    async def application(scope, receive, send):
        await inner(scope, receive, send)

    return application


def decorated(inner):
    @functools.wraps(inner.__call__)
    async def application(scope, receive, send):
        raise NotImplementedError

    return application


async def by_name(scope, receive, send):
    if scope["type"] == "http":
        await plain(scope, receive, send)


async def wrapped_by_name(scope, receive, send):
    if scope["type"] == "http":
        await wrapped(scope, receive, send)


def around(inner):
    """Return applications that lead to `inner`, by the way in which they do."""
    loop = Middleware(None)
    loop.inner = [loop, inner]
    return {
        "itself": inner,
        "middleware": Middleware(inner),
        "middlewares": Middleware(Middleware(Middleware(inner))),
        "router": Router({"http": inner, "websocket": Router({"x": [("path", None)]})}),
        "router below": Middleware(Router({"http": Middleware(inner)})),
        "closure": closing(Middleware(inner)),
        "partial": functools.partial(print, inner),
        "keyword": functools.partial(print, inner=inner),
        "method": Middleware(inner).__call__,
        "attribute": decorated(Middleware(inner)),
        "cycle": loop,
    }


elsewhere = Middleware("tests.test_checks.plain")
nothing = None
too_far = Middleware([*(object() for _ in range(LOOKED_AT)), plain])
slotted = Slotted()


def check_of(settings, name):
    settings.ASGI_APPLICATION = f"{__name__}.{name}"
    return check_application(None)


@pytest.mark.parametrize("way", around(plain))
def test_an_application_that_leads_to_django_alone_is_told_what_it_could_save(settings, monkeypatch, way):
    monkeypatch.setitem(globals(), "application", around(plain)[way])
    assert check_of(settings, "application") == [
        Info(
            "The streams of tests.test_checks.application stay in Django's request handler, where each takes about "
            "twice the memory that it takes when it is handed over to django_sse.",
            hint="Replace Django's get_asgi_application:\n"
            "\t\tfrom django_sse.asgi import get_asgi_application\n"
            "\t\tapplication = get_asgi_application()",
            id="django_sse.I001",
        )
    ]


@pytest.mark.parametrize("way", around(wrapped))
def test_an_application_that_hands_its_streams_over_somewhere_is_passed_over_in_silence(settings, monkeypatch, way):
    monkeypatch.setitem(globals(), "application", around(wrapped)[way])
    assert check_of(settings, "application") == []


@pytest.mark.parametrize("name", ["by_name", "slotted"])
def test_an_application_may_call_django_by_a_name_of_its_module(settings, name):
    assert [message.id for message in check_of(settings, name)] == ["django_sse.I001"]


def test_an_application_may_call_ours_by_a_name_of_its_module(settings):
    assert check_of(settings, "wrapped_by_name") == []


@pytest.mark.parametrize("name", ["elsewhere", "nothing", "too_far"])
def test_of_an_application_that_cannot_be_looked_through_nothing_is_said(settings, name):
    assert check_of(settings, name) == []


@pytest.mark.parametrize("name", [None, "", 5, "nowhere", "tests.nowhere.application", "tests.test_checks.missing"])
def test_an_application_that_cannot_be_imported_is_not_this_checks_business(settings, name):
    settings.ASGI_APPLICATION = name
    assert check_application(None) == []


def test_a_project_without_an_asgi_application_is_passed_over_in_silence(settings):
    del settings.ASGI_APPLICATION
    assert check_application(None) == []


def test_an_application_that_fails_when_it_is_imported_does_not_break_the_check(settings, tmp_path, monkeypatch):
    (tmp_path / "fails_to_import.py").write_text("application = 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    settings.ASGI_APPLICATION = "fails_to_import.application"
    assert check_application(None) == []


def test_the_application_is_imported_for_a_deployment_alone(settings):
    settings.ASGI_APPLICATION = f"{__name__}.plain"
    assert "django_sse.I001" not in [message.id for message in run_checks()]
    assert "django_sse.I001" in [message.id for message in run_checks(include_deployment_checks=True)]


def test_what_could_be_saved_fails_no_deployment(settings):
    settings.ASGI_APPLICATION = f"{__name__}.plain"
    said = StringIO()
    call_command("check", deploy=True, stdout=said, stderr=said)
    assert "(django_sse.I001) The streams of tests.test_checks.plain stay in" in said.getvalue()
    assert "from django_sse.asgi import get_asgi_application\n" in said.getvalue()
