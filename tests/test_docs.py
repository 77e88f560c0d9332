"""What the documents show is true: their Python runs, their tables agree with the code, their links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest
from django.test import RequestFactory, override_settings
from django.urls import path

import django_sse
from django_sse import checks, conf
from tests.helpers.servers import SERVERS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]
GUIDE = (ROOT / "docs" / "guide.rst").read_text()


def code_blocks(document):
    """Return the Python of ``document``, block by block."""
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", document.read_text(), re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_python_of_a_document_runs_from_top_to_bottom(document):
    names = {"path": path}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "memory:"}):
        for block in code_blocks(document):
            exec(compile(ast.parse(block), str(document), "exec"), names)


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
