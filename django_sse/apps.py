"""The Django application: in ``INSTALLED_APPS``, it brings the system checks and the quiet end of a process."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register

from . import shutdown
from .checks import check_settings


class DjangoSseConfig(AppConfig):
    """The application ``django_sse``: no models, no templates."""

    name = "django_sse"
    verbose_name = "Server-Sent Events"

    def ready(self) -> None:
        """Register the system checks, and have the streams hear of it when the process is to stop."""
        register(check_settings)
        shutdown.install()
