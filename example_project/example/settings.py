"""Everything the example needs and nothing more: no database, no sessions, no static files.

Four variables of the environment matter: ``REDIS_URL``, ``DEBUG``, ``ALLOWED_HOSTS`` and ``SECRET_KEY``.
"""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

# The two lines a project adds for django-sse. "memory:" reaches the pages of one process; Redis those of all.
REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": os.environ.get("REDIS_URL", "memory:")}
INSTALLED_APPS = ["django_sse"]

# Pages that were away get what they have missed: as many notes as a page shows, for an hour after the last.
DJANGO_SSE = {"HISTORY": {"SIZE": 200, "TTL": 3600}}

DEBUG = os.environ.get("DEBUG", "1") not in ("0", "false", "")
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "localhost 127.0.0.1 [::1]").split()
# It signs the ids of events, which a page brings back to any process, and tomorrow's. Nothing else here depends on it.
SECRET_KEY = os.environ.get("SECRET_KEY", "anybody may know this one")

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "example.urls"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": [BASE_DIR / "templates"]}]
WSGI_APPLICATION = "example.wsgi.application"
ASGI_APPLICATION = "example.asgi.application"
USE_TZ = True
TIME_ZONE = "UTC"
