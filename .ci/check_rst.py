"""Check every page of prose: what docutils complains about, and links to files that are not there.

Rule: a page must read well wherever it is shown, so it is plain docutils without the directives of one tool.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.core import publish_doctree
from docutils.utils import Reporter, SystemMessage

ROOT = Path(__file__).resolve().parent.parent


def complaints(page: Path) -> Iterator[str]:
    settings = {"report_level": Reporter.WARNING_LEVEL, "halt_level": Reporter.WARNING_LEVEL, "warning_stream": False}
    try:
        tree = publish_doctree(page.read_text("utf-8"), source_path=str(page), settings_overrides=settings)
    except SystemMessage as error:
        yield str(error)
        return
    for link in tree.findall(nodes.reference):
        target = link.get("refuri", "").partition("#")[0]
        if target and ":" not in target and not (page.parent / target).exists():
            yield f"{page}: there is no {target}"


def main() -> int:
    pages = sorted([*ROOT.glob("*.rst"), *ROOT.glob("docs/**/*.rst"), *ROOT.glob("example_project/*.rst")])
    faults = [fault for page in pages for fault in complaints(page)]
    print(*faults, f"{len(pages)} pages read, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
