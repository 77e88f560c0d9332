"""The benchmarks run, and what they count is what was sent. How fast anything is, is for no test to say."""

import json
import re
import select
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest
from docutils.core import publish_doctree

from benchmarks import build, plot, publish, report
from benchmarks.measure import REDIS_HOW, Bench, Load, divide, redis_program
from benchmarks.systems import SYSTEMS
from benchmarks.tables import TABLES
from tests.helpers.need import need

ROOT = Path(__file__).resolve().parent.parent
OURS = {"handover", "handler", "gthread", "gunicorn-gevent", "pywsgi"}
SECONDS = 600  # for a table; what pip and npm bring is installed with the first one


@pytest.fixture(scope="module")
def linux():
    need(sys.platform == "linux", "the benchmarks read /proc: Linux")
    need(build.compiler(), build.HOW)


# The load client ------------------------------------------------------------------------------------------------------

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"


def event(number, end="\n", quote="", name="event: message", data=None):
    data = publish.payload(number) if data is None else data
    return end.join([f"id: {number}", name, ": a comment", f"data: {quote}{data}{quote}", "", ""])


def events(*numbers, **options):
    return "".join(event(number, **options) for number in numbers)


def in_chunks(text, sizes):
    """The chunked coding of `text`, in chunks of these sizes again and again."""
    rest, chunks = text.encode(), []
    while rest:
        for size in sizes:
            chunks.append(b"%X;of=interest\r\n%s\r\n" % (len(rest[:size]), rest[:size]) if rest[:size] else b"")
            rest = rest[size:]
    return b"".join(chunks)


CLIENTS = 2  # the second one gets frames that the load client knows from the first


@contextmanager
def answering(head, body, cut):
    """A port on which each client is answered with `head`; the `body` follows in pieces of `cut` bytes when told to."""
    told = threading.Event()

    def serve():
        with suppress(ConnectionError), ExitStack() as stack:  # the load client leaves when it has heard enough
            connections = [stack.enter_context(listener.accept()[0]) for _ in range(CLIENTS)]
            for connection in connections:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    request += connection.recv(4096)
                connection.sendall(head.encode() + b"\r\n")
            told.wait(10)
            for connection in connections:
                for at in range(0, len(body), cut):
                    connection.sendall(body[at : at + cut])
            for connection in connections:
                connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], told.set
        finally:
            told.set()
            thread.join(10)


def counted(body, *, sent=30, chunked=True, cut=100_000):
    """What the load client reports, for each client, of `body` when the events 0 to `sent` - 1 are expected."""
    head = HEAD + "Transfer-Encoding: chunked\r\n" * chunked
    with answering(head, body, cut) as (port, go):
        load = Load(port, "/events/bench")
        try:
            assert load.connect(CLIENTS)["connected"] == CLIENTS
            load.expect(0, sent)
            go()
            told = load.end(sent, lost_ms=300)
        finally:
            load.stop()
    names = ("events", "lost", "duplicated", "disordered", "other", "unknown", "broken")
    return {name: told[name] / CLIENTS for name in names if told[name]}


@pytest.mark.server
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("cut", [1, 7, 100_000])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until-close"])
def test_the_load_client_reads_a_stream_however_it_is_cut(linux, end, cut, chunked):
    text = ":\n\nretry: 2000\n\n" + events(*range(30), end=end)
    body = in_chunks(text, [1, 3, 200, 1000]) if chunked else text.encode()
    assert counted(body, chunked=chunked, cut=cut) == {"events": 30}


@pytest.mark.server
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (events(*range(0, 30, 2)), {"events": 15, "lost": 15}),
        (events(0, 1, 1, *range(2, 30)), {"events": 30, "duplicated": 1}),
        (events(0, 2, 1, *range(3, 30)), {"events": 30, "disordered": 1}),
        (events(0, 2, 1, 1, *range(3, 30)), {"events": 30, "disordered": 1, "duplicated": 1}),
        (events(*range(30), quote='"'), {"events": 30}),
        (events(*range(29)) + event(29, name="event: other"), {"events": 29, "lost": 1, "other": 1}),
        (events(*range(29)) + event(29, data="1 29 xxx"), {"events": 29, "lost": 1, "other": 1}),
        (events(*range(29)) + event(29)[:-1], {"events": 29, "lost": 1}),
        (events(*range(30), name="evnt: message"), {"events": 30, "unknown": 30}),
        (events(*range(29)) + "data: more\n" + event(29), {"events": 29, "lost": 1, "other": 1}),
    ],
    ids=["lost", "twice", "order", "both", "quoted", "name", "data", "unfinished", "field", "lines"],
)
def test_the_load_client_counts_what_must_not_happen(linux, text, found):
    assert counted(in_chunks(text, [64, 5000])) == found


@pytest.mark.server
def test_the_load_client_refuses_what_is_not_the_chunked_coding(linux):
    assert counted(b"5\r\ndata:\rx") == {"lost": 30, "broken": 1}


# The publisher --------------------------------------------------------------------------------------------------------


def test_a_payload_has_its_size_whatever_its_number():
    assert {len(publish.payload(number)) for number in (0, 7, 10**6)} == {publish.PAYLOAD}


def test_answers_are_counted_when_they_are_whole():
    assert publish.RedisOutlet.answers(b":1\r\n:20\r\n:") == (2, b":")
    answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\nok"
    assert publish.HttpOutlet.answers(answer + answer[:-1]) == (1, answer[:-1])


@pytest.mark.parametrize(
    ("outlet", "text"), [(publish.RedisOutlet, b"-ERR\r\n"), (publish.HttpOutlet, b"HTTP/1.1 500 No\r\n\r\n")]
)
def test_an_error_is_no_answer(outlet, text):
    with pytest.raises(ConnectionError):
        outlet.answers(text)


# The bench ------------------------------------------------------------------------------------------------------------

BUSY = """
import sys, time
end = time.process_time() + 1
while time.process_time() < end:
    pass
print("idle", flush=True)
sys.stdin.read()
"""


def test_the_bench_waits_until_a_system_does_nothing_any_more(linux):
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        bench = Bench(SYSTEMS["limit"], divide())
        bench.pids = [busy.pid]
        bench._settle()
        assert select.select([busy.stdout], [], [], 0)[0], "it is still at work"


# The tables -----------------------------------------------------------------------------------------------------------

#: Every system once; 0.4.1 only where somebody has a Python 2.7, which no machine of today has to have.
SMOKE = {
    "fanout": "handover,handler,nchan-redis,nchan,better-sse,starlette,plain,eventstream",
    "memory": "handover,nchan-redis",
    "connect": "bare,handover",
    "scaling": "handover",
    "wsgi": "gthread,gunicorn-gevent,pywsgi",
}


@pytest.mark.server
@pytest.mark.heavy
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_measured_and_ours_loses_nothing(linux, tmp_path, table):
    need(redis_program(), REDIS_HOW)
    command = [sys.executable, "-m", "benchmarks", table, "--systems", SMOKE[table], "--runs", "1", "--seconds", "0.2"]
    command += ["--clients", "20", "--burst", "50", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = report.load(tmp_path / "figures.json")
    for row in result["rows"]:
        (figures,) = row["runs"]
        for column in TABLES[table].columns:
            assert column.figure in figures, (row["name"], column)
        if row["key"] in OURS:
            assert report.faults([figures]) == "0 / 0 / 0", row["name"]
    assert {row["key"] for row in result["rows"]} or result["missing"]
    publish_doctree(report.render(result), settings_overrides={"halt_level": 2})
    need(not result["missing"], "; ".join(result["missing"].values()))


# What is written ------------------------------------------------------------------------------------------------------


def result(table, *rows):
    return {
        "table": table,
        "command": "python -m benchmarks",
        "date": "2026-01-01",
        "machine": {"processor": "2 cores", "memory": "4 GiB", "kernel": "Linux"},
        "limit": {},
        "rows": list(rows),
        "missing": {"Something else": "a part: get it"},
    }


def row(key, *runs, **variant):
    return {"key": key, "name": key.title(), "variant": variant, "versions": {"Python": "3"}, "runs": list(runs)}


def cells(text):
    """The words of each line of the table in `text`."""
    lines = text.splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("===")]
    return [re.split(r"  +", line) for line in lines[rules[1] + 1 : rules[2]]]


def test_a_cell_is_the_median_with_its_spread_and_a_ratio_is_of_one_run():
    common = {"connect_cpu_us": 15, "leave_cpu_us": 5, "connects_per_s": 1500}
    ours = row("handover", *({**common, "visit_cpu_us": value} for value in (20, 30, 80)), clients=5)
    bare = row("bare", *({**common, "visit_cpu_us": value} for value in (10, 30, 20)), clients=5)
    handover, without = cells(report.render(result("connect", ours, bare)))
    assert handover == ["Handover", "15", "5", "30 (20–80)", "2.00 (1.00–4.00)", "1500"]
    assert without == ["Bare", "15", "5", "20 (10–30)", "1.00", "1500"]


def test_what_failed_and_what_is_missing_is_said():
    text = report.render(result("connect", row("bare", {"failed": "no answer\nand so on"}, clients=5)))
    assert cells(text) == [["Bare", "–", "–", "–", "–", "–"]]
    assert "*Bare*: run 1 failed: no answer." in text
    assert "*Something else* was not measured: a part: get it." in text


def test_the_page_is_written_below_its_mark_with_pictures(tmp_path):
    page = tmp_path / "benchmarks.rst"
    page.write_text(f"By hand.\n\n{report.BEGIN}Of yesterday.\n")
    figures = {"lockstep_per_s": 2e5, "lockstep_cpu_us": 5, "pss_kib": 11.5, "elsewhere_cpu_us": 0, "lost": 0}
    rows = [row("handover", figures, figures, clients=n, channels=1, workers=1, cores=0) for n in (100, 1000)]
    report.write_page([result("scaling", *rows)], page)
    text = page.read_text()
    assert text.startswith(f"By hand.\n\n{report.BEGIN}\nScaling\n=======\n")
    assert "yesterday" not in text
    publish_doctree(text, settings_overrides={"halt_level": 2})
    for name in re.findall(r"image:: (\S+)", text):
        picture = ElementTree.parse(tmp_path / name).getroot()
        assert len(picture.findall("{*}polyline")) == 1
        assert len(picture.findall("{*}circle")) == 2


@pytest.mark.parametrize(
    ("values", "numbers"),
    [((63, 76), ["50", "100"]), ((100, 100), ["100", "200"]), ((4, 30), ["2", "5", "10", "20", "50"])],
)
def test_the_height_of_a_picture_begins_and_ends_with_a_number(values, numbers):
    picture = plot.plot("title", "clients", {"line": [(1, y, y, y) for y in values]}, "{:.0f}".format)
    words = [text.text for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert [word for word in words if word.isdigit() and word != "1"] == numbers


def test_the_project_has_its_page_with_the_mark():
    assert report.BEGIN in report.PAGE.read_text("utf-8")


def test_every_column_can_be_written_and_every_system_of_a_table_is_known():
    for table in TABLES.values():
        assert {column.unit for column in table.columns} <= {*report.WRITERS, "faults"}
        assert set(table.systems.split(",")) <= set(SYSTEMS)


def test_figures_are_kept_as_they_were(tmp_path):
    kept = result("connect", row("bare", {"connect_cpu_us": 1.5}, clients=5))
    report.save(kept, tmp_path / "kept.json")
    assert report.load(tmp_path / "kept.json") == json.loads(json.dumps(kept))
