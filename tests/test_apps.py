"""The application brings the system checks and the quiet end of a process, and nothing else."""

from django.apps import apps
from django.core.checks.registry import registry

from django_sse import shutdown
from django_sse.apps import DjangoSseConfig
from django_sse.checks import check_application, check_settings


def test_the_application_is_found_by_the_name_of_the_package():
    config = apps.get_app_config("django_sse")
    assert type(config) is DjangoSseConfig
    assert config.name == "django_sse"
    assert config.verbose_name == "Server-Sent Events"


def test_the_application_has_no_models():
    assert list(apps.get_app_config("django_sse").get_models()) == []


def test_the_application_registers_the_system_checks_when_it_is_ready():
    config = apps.get_app_config("django_sse")
    assert check_settings in registry.get_checks()
    registry.registered_checks.remove(check_settings)
    try:
        assert check_settings not in registry.get_checks()
    finally:
        config.ready()
    assert check_settings in registry.get_checks()


def test_the_checks_are_registered_once_however_often_the_application_is_ready():
    apps.get_app_config("django_sse").ready()
    assert registry.get_checks().count(check_settings) == 1


def test_what_has_to_import_the_project_is_checked_for_a_deployment_alone():
    assert check_application not in registry.get_checks()
    assert check_application in registry.get_checks(include_deployment_checks=True)


def test_the_streams_hear_of_the_end_of_the_process_once_the_application_is_ready(monkeypatch):
    installed = []
    monkeypatch.setattr(shutdown, "install", lambda: installed.append(1))
    apps.get_app_config("django_sse").ready()
    assert installed == [1]
