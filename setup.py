"""Metadata and requirements.  Everything a tool wants to be told stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Read, not imported: the package's requirements are not there yet while it is being built.
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "django_sse" / "__init__.py").read_text("utf-8"), re.MULTILINE)[
    1
]

GEVENT = ["gevent>=24.2"]
UVICORN = ["uvicorn[standard]>=0.30"]

# What serves ours in `python -m benchmarks`; its peers are installed apart, by the benchmarks themselves.
BENCHMARKS = [*GEVENT, *UVICORN, "gunicorn>=25.1", "hiredis>=3.0"]

# Every server and browser the test matrix runs; a missing one is a failure in CI.
TEST = [
    *GEVENT,
    *UVICORN,
    "build",
    "coverage[toml]>=7.10",  # measures child processes by itself since then
    "daphne>=4.1",
    "docutils>=0.21",
    "fakeredis>=2.26",
    "granian>=2.0",
    "gunicorn>=25.1",
    "hypercorn>=0.17",
    "hypothesis>=6.100",
    "playwright>=1.45",
    "psycopg[binary]>=3.2",  # counts connections on a real PostgreSQL, where there is one
    "pytest>=8.2",
    "pytest-django>=4.9",
    "pytest-timeout>=2.3",
]
LINT = ["django-stubs[compatible-mypy]>=5.2", "docutils>=0.21", "mypy>=1.15", "ruff>=0.12"]

setup(
    name="django-sse",
    version=VERSION,
    description="Server-Sent Events for Django, alive on every kind of server",
    long_description=(HERE / "README.rst").read_text("utf-8"),
    long_description_content_type="text/x-rst",
    author="The django-sse developers",
    license_expression="BSD-3-Clause",
    license_files=["LICENSE"],
    packages=find_packages(include=["django_sse*"]),
    package_data={"django_sse": ["py.typed", "brokers/*.lua"]},
    python_requires=">=3.10",
    install_requires=["Django>=5.2", "redis>=5", "sse>=1.2"],
    extras_require={
        "gevent": GEVENT,
        "uvicorn": UVICORN,
        "hiredis": ["hiredis>=3.0"],
        "benchmarks": BENCHMARKS,
        "test": TEST,
        "lint": LINT,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Framework :: Django",
        "Framework :: Django :: 5.2",
        "Framework :: Django :: 6.0",
        "Framework :: Django :: 6.1",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Internet :: WWW/HTTP",
        "Typing :: Typed",
    ],
)
