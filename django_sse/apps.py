"""The Django application: in ``INSTALLED_APPS``, it brings the system checks. Nothing else needs it there."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register

from .checks import check_settings


class DjangoSseConfig(AppConfig):
    """The application ``django_sse``: no models, no templates."""

    name = "django_sse"
    verbose_name = "Server-Sent Events"

    def ready(self) -> None:
        """Register the system checks."""
        register(check_settings)
