"""The settings of the tests of resuming: nothing but their own views."""

from tests.servers.closing_settings import *  # noqa: F403

ROOT_URLCONF = "tests.servers.resume_views"
