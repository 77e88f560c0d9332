"""The settings of the pages in a browser that resume."""

from tests.servers.closing_settings import *  # noqa: F403

ROOT_URLCONF = "tests.servers.page_views"
