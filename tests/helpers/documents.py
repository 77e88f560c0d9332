"""The documents of the project, and the code that they show."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]


def code_blocks(document, language="python"):
    """Return the code of ``document`` in a language, block by block."""
    pattern = rf"^\.\. code-block:: {re.escape(language)}\n\n((?:    .*\n|\n)+)"
    blocks = re.findall(pattern, document.read_text(), re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks]
