"""The test project as ASGI applications: as Django gives it, and with the hand-over of its streams."""

from django.core.asgi import get_asgi_application

import django_sse.asgi

plain = get_asgi_application()
wrapped = django_sse.asgi.get_asgi_application()
