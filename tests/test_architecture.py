"""The table in docs/architecture.rst is the architecture: the code imports what it says, no more and no less."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "django_sse"
#: What the table's last column is about. Everything else outside is plain data handling.
OUTSIDE = {
    *("asgiref", "django", "redis", "sse"),
    *("asyncio", "atexit", "concurrent", "contextvars", "gevent", "multiprocessing", "os", "queue", "sched", "select"),
    *("selectors", "signal", "socket", "ssl", "subprocess", "threading", "time"),
}
PURE = ("event", "wire", "history", "cursor", "track", "audience", "hub")
MODULES = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {path: name.removesuffix(".__init__") if "." in name else name for path, name in MODULES.items()}
FOLDERS = {MODULES[path] for path in MODULES if path.name == "__init__.py"}
TREES = {MODULES[path]: ast.parse(path.read_text()) for path in MODULES}


def table():
    """Return the rows of the table: module -> (ours, outside)."""
    text = (ROOT / "docs" / "architecture.rst").read_text().split(".. table:: imports")[1]
    lines = [line[3:] for line in text.splitlines() if line.startswith("   ")]
    rules = [number for number, line in enumerate(lines) if line.startswith("===")]
    columns = [len(rule) for rule in lines[rules[0]].split()]
    starts = [0, columns[0] + 2, columns[0] + columns[1] + 4]
    rows, last = {}, None
    for line in lines[rules[1] + 1 : rules[2]]:
        cells = [line[start : start + width].strip() for start, width in zip(starts, columns, strict=True)]
        last = cells[0] or last
        row = rows.setdefault(last, ("", ""))
        rows[last] = tuple(f"{known}, {cell}" for known, cell in zip(row, cells[1:], strict=True))
    return {
        module: tuple({item.strip() for item in cell.split(",")} - {""} for cell in cells)
        for module, cells in rows.items()
    }


def imports(module):
    """Return what ``module`` imports: (ours, outside)."""
    package = module.rpartition(".")[0]
    ours, outside = set(), set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ("django_sse", package) if node.level else ()
            base = ".".join(part for part in (*here, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "django_sse" else [base]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "django_sse":
                ours.add(rest)
            elif top in OUTSIDE:
                outside.add(top)
    return ours, outside


def test_the_table_has_a_row_for_every_module_and_no_other():
    assert sorted(table()) == sorted(TREES)


@pytest.mark.parametrize("module", TREES)
def test_a_module_imports_exactly_what_its_row_says(module):
    assert imports(module) == table()[module]


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_no_framework_and_nothing_that_waits(module):
    ours, outside = imports(module)
    assert outside <= {"sse"}
    assert ours <= {*PURE, "exceptions"}


def test_imports_make_no_cycle():
    left = {module: imports(module)[0] for module in TREES}
    while left:
        bottom = [module for module, ours in left.items() if not ours & set(left)]
        assert bottom, f"these import each other: {sorted(left)}"
        for module in bottom:
            del left[module]


@pytest.mark.parametrize("module", TREES)
def test_nothing_is_imported_inside_a_function(module):
    functions = (node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    inside = (node for function in functions for node in ast.walk(function))
    assert [node.lineno for node in inside if isinstance(node, (ast.Import, ast.ImportFrom))] == []


@pytest.mark.parametrize("module", TREES)
def test_every_module_opens_with_its_rule(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("module", sorted(set(TREES) - FOLDERS - {"brokers.base"}))
def test_every_module_has_a_test_module_of_its_name(module):
    folder, _, name = module.rpartition(".")
    assert (ROOT / "tests" / folder.replace(".", "/") / f"test_{name}.py").is_file()


def test_the_contract_of_brokers_is_tested_on_all_of_them():
    assert (ROOT / "tests" / "brokers" / "test_contract.py").is_file()
