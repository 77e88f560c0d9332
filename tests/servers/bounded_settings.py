"""The settings of the tests under load: nothing but their own views, for others listen to each stream's signals."""

from tests.servers.closing_settings import *  # noqa: F403

ROOT_URLCONF = "tests.servers.bounded_views"
