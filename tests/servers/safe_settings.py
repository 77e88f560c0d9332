"""The settings of promise S: limits are small, and users, middleware and DEBUG are what the environment says.

- `TEST_DEBUG`: any text turns `DEBUG` on;
- `TEST_MIDDLEWARE`: dotted paths as a JSON list, instead of those of `tests.settings`.
"""

import json
import os

from tests.settings import *  # noqa: F403
from tests.settings import MIDDLEWARE as USUAL

DEBUG = bool(os.environ.get("TEST_DEBUG"))
MIDDLEWARE = [
    *json.loads(os.environ.get("TEST_MIDDLEWARE", json.dumps(USUAL))),
    "tests.servers.safe_views.log_in_who_says_so",
]
