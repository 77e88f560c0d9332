"""The settings of the tests that resume: nothing but their own views, which hundreds of clients ask for at a time."""

from tests.servers.closing_settings import *  # noqa: F403

ROOT_URLCONF = "tests.servers.reconnect_views"
