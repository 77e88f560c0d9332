"""What leaves the house: the sdist and the wheel hold what they should, and the wheel works where nothing else is."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from django_sse import __version__

ROOT = Path(__file__).resolve().parent.parent
STEM = f"django_sse-{__version__}"

# What a fresh clone does not have, and what is large.
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".tox", ".*_cache", "__pycache__", "*.egg-info", "build", "dist")

SENDS_AN_EVENT = """
from django.conf import settings
settings.configure(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "memory:"}, INSTALLED_APPS=["django_sse"])
import django
django.setup()
from django_sse.brokers import redis
from django_sse.redisqueue import RedisQueueView, send_event
assert RedisQueueView.as_view()
assert "PUBLISH" in redis._publish.text and "XREVRANGE" in redis._read.text
print(send_event("greeting", "hello"))
"""


def run(*command, cwd):
    """Run a command to its end and return what it wrote to standard output; it must succeed."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with the sdist of a clean copy of the tree, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "copy", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"{STEM}-py3-none-any.whl"


def files(folder, *patterns):
    """The files below `folder` that a clone has, relative to the root of the project."""
    found = (path for pattern in patterns or ["**/*"] for path in (ROOT / folder).glob(pattern) if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in (".pyc", ".sqlite3")}


def test_nothing_else_is_built(dist, wheel):
    assert {path.name for path in dist.iterdir()} == {f"{STEM}.tar.gz", wheel.name}


def test_the_wheel_holds_the_package_its_licence_and_nothing_else(wheel):
    metadata = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == files("django_sse") | {f"{STEM}.dist-info/{name}" for name in metadata}
    scripts = {"django_sse/brokers/publish.lua", "django_sse/brokers/read.lua"}
    assert {"django_sse/py.typed", "django_sse/brokers/redis.py", *scripts} <= files("django_sse")


def test_the_sdist_holds_all_that_is_needed_to_build_and_test(dist):
    with tarfile.open(dist / f"{STEM}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    single = {"dev", "setup.py", "pyproject.toml", "tox.ini", "MANIFEST.in", "LICENSE"}
    prose = {"README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst"}
    grafted = ("django_sse", "benchmarks", "tests", "example_project", ".ci", "docs")
    folders = {name for folder in grafted for name in files(folder)}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("django_sse.egg-info/")}
    assert held == single | prose | folders | made


def test_the_metadata_promise_what_is_tested(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{STEM}.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("django-sse", __version__)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload() == (ROOT / "README.rst").read_text("utf-8")
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert sorted(needed) == ["Django>=5.2", "redis>=5", "sse>=1.2"]
    assert set(metadata.get_all("Provides-Extra")) == {
        *("gevent", "uvicorn", "hiredis", "benchmarks", "test", "lint"),
    }


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    place = run(python, "-c", "import django_sse; print(django_sse.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(tmp_path / "env")
    assert run(python, "-W", "error", "-c", SENDS_AN_EVENT, cwd=tmp_path) == "None\n"
