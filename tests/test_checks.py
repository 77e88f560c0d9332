"""Each mistake in the settings that can be seen without a request is a message with an id, before the server starts."""

from io import StringIO

import pytest
from django.core import checks
from django.core.checks import Error, run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError

from django_sse.checks import check_settings


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
    settings.DJANGO_SSE = {"TYPO": 1, "HEARTBEAT": 0, "RETRY": -1, "MAILBOX": 0, "THREADS": 0}
    messages = check_settings(None)
    assert [message.id for message in messages] == ["django_sse.W001"] + 4 * ["django_sse.E001"]
    assert [message.msg.split()[0] for message in messages[1:]] == [
        'DJANGO_SSE["HEARTBEAT"]',
        'DJANGO_SSE["RETRY"]',
        'DJANGO_SSE["MAILBOX"]',
        'DJANGO_SSE["THREADS"]',
    ]


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
