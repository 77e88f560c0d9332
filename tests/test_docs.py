"""What the documents show is true: their Python runs, their tables agree with the code, their links lead somewhere."""

import ast
import json
import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from django.test import RequestFactory, override_settings
from django.urls import path

import django_sse
from django_sse import checks, conf, cursor, history, hub, redisqueue
from django_sse.brokers import base
from django_sse.brokers import redis as redis_broker
from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.wire import encode
from tests.helpers.documents import DOCUMENTS, ROOT, code_blocks
from tests.helpers.need import need
from tests.helpers.servers import SERVERS

HISTORY_PAGE = ROOT / "docs" / "history.rst"
GUIDE = (ROOT / "docs" / "guide.rst").read_text()
HISTORY = HISTORY_PAGE.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_python_of_a_document_runs_from_top_to_bottom(document):
    names = {"path": path}
    with ExitStack() as stack:
        stack.enter_context(override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "memory:"}))
        for block in code_blocks(document):
            exec(compile(ast.parse(block), str(document), "exec"), names)
            if "DJANGO_SSE" in names:  # what follows relies on it
                stack.enter_context(override_settings(DJANGO_SSE=names.pop("DJANGO_SSE")))


@pytest.mark.parametrize("document", DOCUMENTS[:1], ids=lambda document: document.name)
def test_the_ten_line_view_streams(document):
    names = {}
    exec(code_blocks(document)[0], names)
    chunks = names["Clock"].as_view()(RequestFactory().get("/")).streaming_content
    assert next(chunks) == b"retry: 2000\n\n"
    assert re.fullmatch(rb"event: time\ndata: \d\d:\d\d:\d\d\n\n", next(chunks))


def test_the_readme_shows_a_ten_line_view_and_a_three_line_send_event():
    view, queue, *_ = code_blocks(ROOT / "README.rst")
    assert len([line for line in view.splitlines() if line]) <= 10
    assert len([line for line in queue.splitlines() if line]) <= 3


@override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "memory:"})
def test_the_looping_view_of_the_guide_counts_what_comes():
    names = {}
    for block in code_blocks(ROOT / "docs" / "guide.rst"):
        exec(block, names)
    response = names["Counted"].as_view()(RequestFactory().get("/"))
    chunks = response.streaming_content
    assert next(chunks) == b"retry: 2000\n\n"
    names["send_event"]("headline", "one", "news")
    assert next(chunks) == b"event: headline\ndata: one\n\nevent: count\ndata: 1\n\n"
    response.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_to_files_lead_to_files(document):
    for target in re.findall(r"<([^>`]+\.rst)>`_", document.read_text()):
        assert (document.parent / target).is_file(), target


def test_the_table_of_settings_has_every_key_and_its_default():
    rows = dict(re.findall(r"^``([A-Z_]+)``\s+``(.+?)``\s", GUIDE, re.MULTILINE))
    assert {key: ast.literal_eval(value) for key, value in rows.items()} == conf.DEFAULTS


def test_the_table_of_histories_says_what_is_kept():
    rows = dict(re.findall(r"^``(.+?)``(?:, or not set)?  +(\S.+)$", HISTORY.split("``HISTORY``")[1], re.MULTILINE)[:4])
    kept = {}
    for given in rows:
        with override_settings(DJANGO_SSE={"HISTORY": ast.literal_eval(given)}):
            names = ("news", "room-blue", "other")
            kept[rows[given]] = [found and found[1:] for found in map(conf.configuration.history, names)]
    assert kept == {
        "nothing; ids and format are those of 0.4.1": [None] * 3,
        "1000 events and 3600 s, of every channel": [(1000, 3600)] * 3,
        "50 events and 3600 s, of every channel": [(50, 3600)] * 3,
        "50 of ``news``, 1000 of each room, nothing of others": [(50, 3600), (1000, 3600), None],
    }


def test_the_reasons_of_a_reset_are_those_of_the_code():
    rows = re.findall(r"^``([a-z]+)``  +\S", HISTORY, re.MULTILINE)
    assert rows == [history.EXPIRED, history.EPOCH, history.UNKNOWN]
    assert encode(history.reset_event(["news"], history.EXPIRED)).decode() in code_blocks(HISTORY_PAGE, "text")[0]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (cursor.MAX_CHANNELS, "at most {} channels"),
        (redisqueue.MAX_EVENT_ID, "1 to {} characters"),
        (redis_broker.PIPELINE_EVENTS, "one round trip for up to {} of them"),
        (base.META_TTL // 24 // 3600, "known for {} days"),
        (base.FETCH_BYTES // 1024**2, "{} MiB were missed"),
        (hub.RECENT_BYTES // 1024**2, "{} MiB"),
        (conf.DEFAULTS["MAX_PAYLOAD"] // 1024**2, "more than {} MiB"),
    ],
)
def test_the_numbers_of_the_history_page_are_those_of_the_code(number, text):
    assert text.format(number) in " ".join(HISTORY.split())


REDIS_CLI = "redis-cli: on Debian `apt-get install redis-tools`, elsewhere it comes with redis-server"
NODE = "node: on Debian `apt-get install npm` brings it, elsewhere https://nodejs.org/"


@pytest.mark.parametrize(
    ("language", "file", "program", "how"),
    [("sh", "publish.sh", "redis-cli", REDIS_CLI), ("js", "publish.mjs", "node", NODE)],
    ids=["shell", "node"],
)
def test_a_publisher_in_another_language_is_short_and_its_events_are_resumed(
    language, file, program, how, redis_server, redis_settings, tmp_path
):
    (source,) = (block for block in code_blocks(HISTORY_PAGE, language) if file in block)
    assert len([line for line in source.splitlines() if line]) <= 20
    need(shutil.which(program), how)
    (tmp_path / file).write_text(source)
    shutil.copy(Path(base.__file__).with_name("publish.lua"), tmp_path)

    def publish(payload):
        done = subprocess.run(
            ["sh" if language == "sh" else program, file, "news", payload],
            cwd=tmp_path, env={**os.environ, "REDIS_URL": redis_server.url}, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    with override_settings(DJANGO_SSE={"HISTORY": {}}):
        view = RedisQueueView.as_view(redis_channel="news")
        listening = view(RequestFactory().get("/"))
        chunks = iter(listening.streaming_content)
        next(chunks)
        publish('["headline", "größer\\nals $HOME"]')
        seen = re.fullmatch("id: (\\S+)\nevent: headline\ndata: größer\ndata: als \\$HOME\n\n", next(chunks).decode())
        listening.close()
        assert seen

        publish('["headline", ["a", "b"]]')
        missed = send_event("headline", "from Python", "news")
        resumed = view(RequestFactory().get("/", headers={"Last-Event-ID": seen[1]}))
        chunks, body = iter(resumed.streaming_content), ""
        while not body.endswith("from Python\n\n"):
            body += next(chunks).decode()
        resumed.close()
        assert re.findall("^data: (.+)$", body, re.MULTILINE) == ["a", "b", "from Python"]
        assert body.endswith(f"id: {missed}\nevent: headline\ndata: from Python\n\n")


def test_what_a_publisher_in_another_language_does_is_what_ours_does(redis_server, redis_settings):
    client = redis_server.client()
    with override_settings(DJANGO_SSE={"HISTORY": {}, "CHANNEL_PREFIX": "shop:"}), client.pubsub() as pubsub:
        pubsub.subscribe("shop:news")
        send_event("name", "data", "news", event_id="mine")
        until_message = (message for message in iter(lambda: pubsub.get_message(timeout=10), None))
        payload = next(message["data"] for message in until_message if message["type"] == "message")
    name, data, position = json.loads(payload)
    assert (name, data, list(position)) == ("name", "data", ["epoch", "offset", "check"])
    keys = [key.decode().replace("shop:news", "<channel>").replace("mine", "<event_id>") for key in client.scan_iter()]
    assert sorted(keys) == sorted(set(re.findall("``(django-sse:[a-z]+:.+?)``", HISTORY)))


def test_every_system_check_is_documented():
    source = Path(checks.__file__).read_text()
    assert set(re.findall(r"django_sse\.[EWI]\d+", source)) == set(re.findall(r"django_sse\.[EWI]\d+", GUIDE))


def test_the_readme_has_every_server_that_is_tested():
    table = (ROOT / "README.rst").read_text().split("Servers\n=======")[1].split("\nMore\n====")[0].lower()
    for server in SERVERS:
        for word in server.split("-"):
            assert word in table, server


def test_the_version_is_the_newest_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.rst").read_text()
    newest = re.search(r"^(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None
    assert django_sse.__version__.startswith(newest.group(1))
