"""From figures to text: a table in reStructuredText with the medians and their spread, and what it was measured on."""

import datetime
import json
import os
import platform
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .plot import Point, plot
from .tables import TABLES, Column

WIDTH = 118  # columns of prose
FOREIGN = 0.03  # share of the server's core that others may have without a word about it

# A result is what --json keeps: {"table", "command", "date", "machine", "limit", "rows", "missing"}; a row of it has
# "key", "name", "variant", "versions", and "runs": the figures of each run, or {"failed": why}.
Result = dict[str, Any]
Row = dict[str, Any]


def machine() -> dict[str, str]:
    about = platform.uname()
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else about.machine}"
    return {"processor": processor, "memory": f"{memory:.0f} GiB", "kernel": f"{about.system} {about.release}"}


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


# Cells ----------------------------------------------------------------------------------------------------------------


def rate(value: float) -> str:
    for limit, divisor, letter in ((10e6, 1e6, "M"), (1e6, 1e6, "M"), (10e3, 1e3, "k")):
        if value >= limit:
            return f"{value / divisor:.{int(value < 10 * divisor)}f}{letter}"
    return f"{value:.0f}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


WRITERS = {"rate": rate, "number": number, "ratio": ratio}


def values(column: Column, row: Row, rows: Sequence[Row]) -> list[float]:
    """The figure of every run that has it; a ratio compares two rows in the same run."""
    if not column.against:
        return [figures[column.figure] for figures in row["runs"] if column.figure in figures]
    others = [each for each in rows if each["key"] == column.against and each["variant"] == row["variant"]]
    pairs = zip(row["runs"], others[0]["runs"], strict=False) if others else ()
    return [ours[column.figure] / theirs[column.figure] for ours, theirs in pairs if both(column.figure, ours, theirs)]


def both(figure: str, ours: dict[str, float], theirs: dict[str, float]) -> bool:
    return figure in ours and bool(theirs.get(figure))


def cell(column: Column, row: Row, rows: Sequence[Row]) -> str:
    if column.unit == "faults":
        return faults(row["runs"])
    write, found = WRITERS[column.unit], values(column, row, rows)
    if not found:
        return "–"
    low, median, high = (write(value) for value in (min(found), statistics.median(found), max(found)))
    return median if low == high else f"{median} ({low}–{high})"


def faults(runs: Iterable[dict[str, float]]) -> str:
    """Events of all runs that were lost, came twice, came in a wrong order; and what else went wrong, if it did."""
    total = {name: sum(figures.get(name, 0) for figures in runs) for name in FAULTS}
    rest = [f"{name} {total[name]:,}" for name in ("unknown", "broken", "closed") if total[name]]
    return ", ".join([" / ".join(f"{total[name]:,}" for name in FAULTS[:3]), *rest])


FAULTS = ("lost", "duplicated", "disordered", "unknown", "broken", "closed")


# The table ------------------------------------------------------------------------------------------------------------


def label(row: Row, rows: Sequence[Row]) -> str:
    """The system's name, and what of the variant is not the same in all rows."""
    differing = [key for key in row["variant"] if len({each["variant"][key] for each in rows}) > 1]
    words = [f"{row['variant'][key]:,} {key if row['variant'][key] != 1 else key[:-1]}" for key in differing]
    return ", ".join([row["name"], *(word for word in words if not word.startswith("0 "))])


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A simple table of reStructuredText; the lines of a heading go below each other."""
    heads = [words.split("\n") for words in heading]
    deepest = max(map(len, heads))
    # A row whose first cell is empty continues the one above it.
    top = list(zip(*(head + [""] * (deepest - len(head)) for head in heads), strict=True))
    widths = [max(map(len, column)) for column in zip(*top, *lines, strict=True)]
    rule = "  ".join("=" * width for width in widths)

    def text(line: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

    return "\n".join([rule, *map(text, top), rule, *map(text, lines), rule])


def render(result: Result) -> str:
    """The whole section of a result, without its title."""
    what, rows = TABLES[result["table"]], result["rows"]
    heading = ["system", *(column.heading for column in what.columns)]
    lines = [[label(row, rows), *(cell(column, row, rows) for column in what.columns)] for row in rows]
    parts = [paragraph(what.about)]
    if rows:
        parts += [table(heading, lines), paragraph(conditions(result))]
    parts += [paragraph(f"*{row['name']}*: {failed}.") for row in rows for failed in failures(row)]
    parts += [paragraph(f"*{name}* was not measured: {why}.") for name, why in result["missing"].items()]
    if rows:
        parts.append(versions(rows))
    return "\n\n".join(parts) + "\n"


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False, break_long_words=False)


def failures(row: Row) -> list[str]:
    return [
        f"run {i} failed: {run['failed'].splitlines()[0]}" for i, run in enumerate(row["runs"], 1) if "failed" in run
    ]


def conditions(result: Result) -> str:
    about, limit, runs = result["machine"], result["limit"], max(len(row["runs"]) for row in result["rows"])
    words = f"Median (minimum–maximum) of {runs} runs" if runs > 1 else "One run"
    words += f", {result['date']}, ``{result['command']}``; {about['processor']}, {about['memory']}, {about['kernel']}."
    disturbed = [run["foreign"] > FOREIGN for row in result["rows"] for run in row["runs"] if "foreign" in run]
    if any(disturbed):
        words += (
            f" Disturbed: in {sum(disturbed)} of {len(disturbed)} runs other programs had more than "
            f"{FOREIGN:.0%} of the server's core."
        )
    if limit:
        words += (
            f" The bench itself (``limit.c``): {rate(limit['lockstep_per_s'])} deliveries/s in lock-step, "
            f"{rate(limit['burst_per_s'])} in a burst, {rate(limit['connects_per_s'])} connects/s."
        )
    return words


def versions(rows: Sequence[Row]) -> str:
    """Each program once, with whom it was measured in."""
    known = {f"{program} {version}" for row in rows for program, version in row["versions"].items()}
    return paragraph("Versions: " + ", ".join(sorted(known, key=str.lower)) + ".")


def save(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> Result:
    return json.loads(path.read_text(encoding="utf-8"))


# The page -------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.rst"
BEGIN = ".. The rest is written by `python -m benchmarks page`.\n"
#: What is drawn of the table "scaling": the file beside the page, its title, the figure, and how it is written.
PICTURES = (
    ("benchmarks-deliveries.svg", "Deliveries per second in lock-step", "lockstep_per_s", rate),
    ("benchmarks-memory.svg", "Memory per idle client, KiB (PSS)", "pss_kib", number),
)


def write_page(results: Sequence[Result], page: Path = PAGE) -> None:
    """Write everything below BEGIN anew, and the pictures beside the page."""
    ordered = sorted(results, key=lambda result: list(TABLES).index(result["table"]))
    parts = [
        title(TABLES[result["table"]].title) + render(result) + pictures(result, page.parent) for result in ordered
    ]
    text = page.read_text("utf-8").partition(BEGIN)[0]
    page.write_text(text + BEGIN + "\n" + "\n".join(parts), encoding="utf-8")


def title(words: str) -> str:
    return f"{words}\n{'=' * len(words)}\n\n"


def pictures(result: Result, folder: Path) -> str:
    """Draw them if the result has what they show; return what shows them on the page."""
    shown = ""
    for name, words, figure, write in PICTURES if result["table"] == "scaling" else ():
        (folder / name).write_text(plot(words, "clients", by_clients(result["rows"], figure), write), encoding="utf-8")
        shown += f"\n.. image:: {name}\n   :alt: {words}, by the number of clients\n"
    return shown


def by_clients(rows: Sequence[Row], figure: str) -> dict[str, list[Point]]:
    """For each system with one channel and a core of its own: number of clients, lowest, median and highest figure."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        found = [figures[figure] for figures in row["runs"] if figures.get(figure, 0) > 0]
        if found and row["variant"]["channels"] == 1 and not row["variant"]["cores"]:
            point = (row["variant"]["clients"], min(found), statistics.median(found), max(found))
            lines.setdefault(row["name"], []).append(point)
    return {name: sorted(line) for name, line in lines.items()}
