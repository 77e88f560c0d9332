"""The settings of the census: sessions are in the database, and that is the one named by the environment."""

import json
import os

from tests.settings import *  # noqa: F403

DATABASES = json.loads(os.environ["TEST_DATABASES"])
SESSION_ENGINE = "django.contrib.sessions.backends.db"
