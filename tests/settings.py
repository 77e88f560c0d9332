"""
The Django project in which the tests run, in the test process and in the server processes.

A server process is told what differs by its environment (`tests.helpers.servers.serve(env=...)`):

- `TEST_REDIS_LOCATION`: the `location` of the broker, `memory:` by default;
- `TEST_DJANGO_SSE`: the `DJANGO_SSE` setting as JSON;
- `TEST_DATABASE`: path of the SQLite file, in memory by default;
- `TEST_WSGI_APPLICATION`: dotted path of the application that `runserver` serves.
"""

import json
import os

SECRET_KEY = "only for tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True

INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "django_sse",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]

ROOT_URLCONF = "tests.urls"
WSGI_APPLICATION = os.environ.get("TEST_WSGI_APPLICATION", "tests.wsgi.application")
ASGI_APPLICATION = "tests.asgi.application"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("TEST_DATABASE", ":memory:"),
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# A session then needs no table, so a server can log a user in on an empty database.
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]

# Servers write to their log file what tests then look for: the package's own lines, and the traceback of a 500.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "django_sse": {"handlers": ["stderr"], "level": "INFO"},
        "django.request": {"handlers": ["stderr"], "level": "ERROR"},
    },
}

REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": os.environ.get("TEST_REDIS_LOCATION", "memory:")}
DJANGO_SSE = json.loads(os.environ.get("TEST_DJANGO_SSE", "{}"))
