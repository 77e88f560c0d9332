"""The settings of the closing tests: each line is logged once, also by daphne, which has a handler of its own above."""

from tests.settings import *  # noqa: F403
from tests.settings import LOGGING

LOGGING["loggers"]["django_sse"]["propagate"] = False
