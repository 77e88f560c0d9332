"""Everything the example needs and nothing more: no database, no sessions, no static files.

Three variables of the environment matter: ``REDIS_URL``, ``DEBUG`` and ``ALLOWED_HOSTS``.
"""

import os
from pathlib import Path

from django.core.management.utils import get_random_secret_key

BASE_DIR = Path(__file__).resolve().parent.parent

# The two lines a project adds for django-sse. "memory:" reaches the pages of one process; Redis those of all.
REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": os.environ.get("REDIS_URL", "memory:")}
INSTALLED_APPS = ["django_sse"]

DEBUG = os.environ.get("DEBUG", "1") not in ("0", "false", "")
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "localhost 127.0.0.1 [::1]").split()
SECRET_KEY = get_random_secret_key()  # nothing here is signed, so a new key at every start will do

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
