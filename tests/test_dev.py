"""The rules of the `dev` script: what it says and with which exit code, without making or installing anything."""

import ast
import importlib.machinery
import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "dev"
ALL = "redis-server chromium openssl postgresql build-essential libnginx-mod-nchan npm"


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """The script as a module of this test's own, with a .venv that does not exist."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("dev_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "dev.json")
    monkeypatch.delenv("CI", raising=False)
    for part in module.PARTS:
        monkeypatch.delenv(part.variable or "", raising=False)
    return module


@pytest.fixture
def taken():
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def bare(dev, monkeypatch, tmp_path):
    """A machine without the parts and without the right to install them; whoever installs fails the test."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dev.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(dev, "PARTS", tuple(part._replace(programs=(part.name,)) for part in dev.PARTS))
    monkeypatch.setattr(dev, "REDIS", dev.PARTS[0])
    monkeypatch.setattr(dev, "unpack_redis", lambda: None)
    monkeypatch.setattr(dev, "venv_packages", list)
    monkeypatch.setattr(dev, "apt_install", lambda packages: pytest.fail("not root, yet installing"))
    return dev


def program(folder, name):
    """An executable that only has to be found."""
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_an_old_python_can_read_the_script():
    ast.parse(SCRIPT.read_text("utf-8"), feature_version=(3, 7))


def test_the_script_imports_nothing_but_the_standard_library():
    statements = list(ast.walk(ast.parse(SCRIPT.read_text("utf-8"))))
    names = {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in statements if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_the_script_is_executable_and_names_its_interpreter_generically():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text("utf-8").startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize("command", ["example", "test"])
def test_a_python_that_is_too_old_is_named_in_one_line(dev, monkeypatch, capsys, command):
    monkeypatch.setattr(dev, "OLDEST_PYTHON", (99, 1))
    assert dev.main([command]) == 1
    this = f"{sys.executable} is {sys.version_info.major}.{sys.version_info.minor}"
    assert capsys.readouterr().err == (
        f"dev: Python 99.1 or newer is needed and {this}; name a newer one: python3.12 dev ...\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["deploy"], 2), (["-h"], 0), (["--help"], 0), (["test", "--help"], 0)]
)
def test_without_a_command_it_explains_itself(dev, capsys, arguments, code):
    assert dev.main(arguments) == code
    assert "./dev example" in capsys.readouterr().out


def test_the_example_takes_the_first_free_port(dev, monkeypatch, taken):
    monkeypatch.setattr(dev, "PORTS", [taken, 0])  # 0: any that is free
    assert dev.choose_port(None) == 0


def test_the_port_asked_for_is_the_one_taken(dev):
    assert dev.choose_port(0) == 0


def test_a_port_asked_for_that_is_taken_is_named_and_nothing_is_installed(dev, monkeypatch, capsys, taken):
    monkeypatch.setattr(dev, "install_system", lambda *parts: pytest.fail("installs before it looks"))
    assert dev.main(["example", "--port", str(taken)]) == 2
    assert capsys.readouterr().err == (
        f"dev: port {taken} is taken; give another --port, or none to get the next free one\n"
    )


def test_no_free_port_at_all_is_said(dev, monkeypatch, taken):
    monkeypatch.setattr(dev, "PORTS", [taken])
    with pytest.raises(dev.Stop, match=f"the ports {taken} to {taken} are all taken") as caught:
        dev.choose_port(None)
    assert caught.value.code == 2


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_what_is_no_port_is_refused(dev, capsys, port):
    with pytest.raises(SystemExit) as caught:
        dev.main(["example", f"--port={port}"])
    assert caught.value.code == 2
    assert "invalid port_number value" in capsys.readouterr().err


def test_each_server_starts_from_the_extra_that_brings_it(dev, monkeypatch):
    for name, server in dev.SERVERS.items():
        asked, started = [], []
        monkeypatch.setattr(dev, "install_system", lambda *parts: None)
        monkeypatch.setattr(dev, "environment", lambda *extras, asked=asked: asked.extend(extras))
        monkeypatch.setattr(dev, "choose_port", lambda wanted: 8123)
        monkeypatch.setattr(dev.os, "chdir", lambda folder: None)
        monkeypatch.setattr(dev.os, "execv", lambda path, words, started=started: started.extend(words))
        dev.main(["example", "--server", name])
        assert asked == [server.extra] * bool(server.extra)
        assert any("8123" in word for word in started)


def test_what_is_missing_is_named_with_the_way_to_get_it(bare, capsys):
    bare.programs()
    assert capsys.readouterr().out == (
        f"dev: missing: {ALL}; get it with: apt-get install {ALL} "
        "(elsewhere: brew install redis; any Chrome or Chromium; brew install openssl; brew install postgresql; "
        "any C compiler that is called cc; https://nchan.io/#install; https://nodejs.org/); "
        "the tests that need it are skipped\n"
    )


def test_what_is_missing_in_ci_ends_the_command(bare, monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(bare.Stop, match=f"missing: {ALL}; get it with") as caught:
        bare.programs()
    assert caught.value.code == 1


def test_only_the_part_that_is_missing_is_named(bare, capsys, tmp_path):
    server = program(tmp_path, "redis-server")
    assert bare.programs()["DJANGO_SSE_REDIS_SERVER"] == server
    others = ALL.removeprefix("redis-server ")
    assert f"missing: {others}; get it with: apt-get install {others} (" in capsys.readouterr().out


def test_a_part_may_be_pointed_to(bare, monkeypatch, tmp_path):
    monkeypatch.setenv("DJANGO_SSE_CHROMIUM", program(tmp_path, "my-browser"))
    assert bare.find(bare.CHROMIUM) == str(tmp_path / "my-browser")
    monkeypatch.setenv("DJANGO_SSE_CHROMIUM", "no-such-browser")
    assert bare.find(bare.CHROMIUM) is None


def test_a_part_may_lie_where_path_does_not_lead(bare, tmp_path):
    part = bare.POSTGRESQL._replace(programs=("postgres", f"{tmp_path}/*/bin/postgres"))
    assert bare.find(part) is None
    folder = tmp_path / "15" / "bin"
    folder.mkdir(parents=True)
    assert bare.find(part) is None
    server = program(folder, "postgres")
    assert bare.find(part) == server


def test_one_who_is_not_root_installs_nothing(bare):
    bare.install_system(bare.PARTS)


def test_root_on_debian_installs_what_is_missing_at_once(bare, monkeypatch, tmp_path):
    asked = []
    program(tmp_path, "apt-get")
    monkeypatch.setattr(bare.os, "geteuid", lambda: 0)
    monkeypatch.setattr(bare, "apt_install", asked.append)
    bare.install_system(bare.PARTS)
    assert asked == [ALL.split()]


def test_without_the_venv_package_there_is_one_clear_line(bare, monkeypatch):
    monkeypatch.setattr(bare, "venv_packages", lambda: ["python3.11-venv"])
    with pytest.raises(bare.Stop, match="missing: python3.11-venv; get it with: apt-get install python3.11-venv"):
        bare.install_system()


@pytest.mark.parametrize(
    ("codes", "commands"), [([0], ["install"]), ([100, 0, 0], ["install", "update", "install"])], ids=["there", "stale"]
)
def test_lists_of_packages_are_fetched_only_if_the_first_try_fails(dev, monkeypatch, codes, commands):
    run = []

    def answer(command, **options):
        run.append(command[1])
        return dev.subprocess.CompletedProcess(command, codes[len(run) - 1], b"")

    monkeypatch.setattr(dev.subprocess, "run", answer)
    dev.apt_install(["redis-server"])
    assert run == commands


def test_the_environment_is_kept_until_what_it_depends_on_changes(dev, monkeypatch):
    made = []
    monkeypatch.setattr(dev, "make_venv", lambda: (dev.VENV.mkdir(exist_ok=True), made.append("venv")))
    monkeypatch.setattr(dev, "pip_install", lambda extras: made.append(sorted(extras)))

    dev.environment()
    dev.environment()
    assert made == ["venv", []]
    dev.environment("gevent")
    dev.environment("gevent")
    assert made == ["venv", [], ["gevent"]]
    monkeypatch.setattr(dev, "key", lambda: "another Python, place or setup.py")
    dev.environment("test")
    assert made == ["venv", [], ["gevent"], "venv", ["test"]]


def test_an_environment_that_was_not_finished_is_made_again(dev):
    assert dev.installed() is None
    dev.VENV.mkdir()
    dev.STAMP.write_text("{")
    assert dev.installed() is None


def test_arguments_go_to_pytest_and_the_gate_is_for_the_whole_suite(dev, monkeypatch):
    monkeypatch.setattr(dev, "install_system", lambda parts: None)
    monkeypatch.setattr(dev, "environment", lambda *extras: None)
    monkeypatch.setattr(dev, "programs", dict)
    called = []
    monkeypatch.setattr(dev, "call", lambda *words, env=None: called.append(words[2:]) or 0)

    assert dev.main(["test", "-k", "hub", "--lf"]) == 0
    assert called == [("pytest", "-k", "hub", "--lf")]
    called.clear()
    assert dev.main(["test"]) == 0
    assert [words[1:] for words in called] == [
        ("erase",),
        ("run", "-m", "pytest", "-m", "not (heavy or browser)"),
        ("combine", "--quiet"),
        ("report",),
        ("-m", "heavy or browser"),
    ]


@pytest.mark.parametrize(
    ("pytest_code", "gate_code", "heavy_code", "code"),
    [(0, 0, 0, 0), (0, 2, 0, 2), (1, 0, 0, 1), (5, 2, 0, 5), (0, 0, 1, 1), (0, 2, 1, 2)],
)
def test_the_exit_code_is_that_of_pytest_then_that_of_the_gate_then_that_of_the_heavy_tests(
    dev, monkeypatch, pytest_code, gate_code, heavy_code, code
):
    codes = {"run": pytest_code, "report": gate_code, "-m": heavy_code}
    monkeypatch.setattr(dev, "call", lambda *words, env=None: codes.get(words[3], 0))
    assert dev.whole_suite({}) == code


def test_every_program_runs_in_the_project_whatever_the_folder(dev, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert dev.call(sys.executable, "-c", f"import os, sys; sys.exit(os.getcwd() != {str(SCRIPT.parent)!r})") == 0
