"""The test project as an ASGI application: `application` hands its streams over, `plain` keeps them in the handler."""

import os

from django.core.asgi import get_asgi_application

from django_sse.asgi import SseApplication

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

plain = get_asgi_application()
application = SseApplication(plain)
