"""The example's views in this process: what they accept, and what they answer otherwise."""

import os
import subprocess
import sys

import pytest
from django.test import Client, override_settings

from tests.example.conftest import EXAMPLE
from tests.helpers.process import free_port
from tests.helpers.servers import ROOT


@pytest.fixture(autouse=True)
def _example(monkeypatch):
    """The example's addresses and templates in the test project."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    templates = {"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": [EXAMPLE / "templates"]}
    with override_settings(
        ROOT_URLCONF="example.urls",
        TEMPLATES=[templates],
        REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "memory:"},
        DJANGO_SSE={"HISTORY": {}},
    ):
        yield


@pytest.mark.parametrize("path", ["/", "/clock/", "/board/", "/room/", "/room/garden/"])
def test_every_page_is_whole_by_itself(path, client):
    response = client.get(path)
    assert response.status_code == 200
    page = response.content.decode()
    assert page.startswith("<!doctype html>")
    for outside in ("src=", "@import", 'rel="stylesheet"', "https://"):
        assert outside not in page


@pytest.mark.parametrize("path", ["/board/send/", "/room/garden/send/"])
def test_a_note_is_sent_with_the_token_of_the_page_only(path):
    client = Client(enforce_csrf_checks=True)
    assert client.post(path, {"text": "hello"}).status_code == 403
    client.get(path.removesuffix("send/"))
    token = client.cookies["csrftoken"].value
    assert client.post(path, {"text": "hello", "csrfmiddlewaretoken": token}).status_code == 204
    assert client.get(path).status_code == 405


@pytest.mark.parametrize("text", ["x", "x" * 500, "👩" * 500, "  x", "\nx"])
def test_a_note_may_have_500_characters(text, client):
    response = client.post("/board/send/", {"text": text})
    assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("text", [None, "", "   ", "\r\n", "x" * 501, "nul\0"])
def test_any_other_note_is_refused_with_a_sentence(text, client):
    response = client.post("/board/send/", {} if text is None else {"text": text})
    assert response.status_code == 400
    assert response["Content-Type"] == "text/plain; charset=utf-8"
    assert response.content.endswith((b".", b")."))


def test_a_broker_that_is_away_is_said_and_not_a_server_error(client):
    location = f"127.0.0.1:{free_port()}"  # nobody listens there
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": location}):
        response = client.post("/board/send/", {"text": "hello"})
        page = client.get("/board/")
    assert response.status_code == 503
    assert response.content == b"Nobody can be reached just now."
    assert (page.status_code, b'"unknown"' in page.content) == (200, True)  # it says by itself how it is


@pytest.mark.parametrize(
    ("name", "address"),
    [("garden", "/room/garden/"), (" Garden Shed! ", "/room/garden-shed/"), ("Été 7", "/room/ete-7/")],
)
def test_a_name_becomes_the_address_of_its_room(name, address, client):
    response = client.get("/room/", {"name": name})
    assert (response.status_code, response["Location"]) == (302, address)


@pytest.mark.parametrize("name", ["", "!!", "部屋", "x" * 51, "<script>"])
def test_a_name_that_is_none_is_refused_or_made_harmless(name, client):
    response = client.get("/room/", {"name": name}, follow=True)
    assert response.status_code == 200
    assert b"<script>&" not in response.content
    if name == "<script>":
        assert response.redirect_chain == [("/room/script/", 302)]
    else:
        assert b'aria-invalid="true"' in response.content


def test_every_stream_starts_at_once(client):
    for path in ("/clock/events/", "/board/events/", "/room/garden/events/"):
        response = client.get(path)
        assert response["Content-Type"] == "text/event-stream"
        assert next(iter(response.streaming_content)).startswith(b"retry: 2000\n\n")
        response.close()


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({}, "memory: True"),
        ({"REDIS_URL": "redis://localhost:1/0", "DEBUG": "0"}, "redis://localhost:1/0 False"),
    ],
)
def test_the_environment_chooses_broker_and_debugging(env, line):
    """And manage.py has nothing to complain about, without a database and without a migration."""
    env = {
        **{name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "DEBUG")},
        "DJANGO_SETTINGS_MODULE": "example.settings",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    show = (
        "from django.conf import settings;"
        "print(settings.REDIS_SSEQUEUE_CONNECTION_SETTINGS['location'], settings.DEBUG)"
    )
    for command, output in (["check", "--fail-level", "DEBUG"], "no issues"), (["shell", "--command", show], line):
        done = subprocess.run(
            [sys.executable, "-W", "error", "manage.py", *command],
            cwd=EXAMPLE, env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert output in done.stdout
