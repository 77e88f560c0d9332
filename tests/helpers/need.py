"""A part that is missing on a laptop skips its tests and says how to get it; in CI it fails them."""

import importlib.util
import os

import pytest


def need(condition, how):
    """Go on if `condition` holds; otherwise fail (CI) or skip (elsewhere) with `how` to get what is missing."""
    if condition:
        return
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(f"missing in CI: {how}", pytrace=False)
    pytest.skip(how)


def need_module(name):
    need(importlib.util.find_spec(name), f"{name}: `pip install {name}`")
