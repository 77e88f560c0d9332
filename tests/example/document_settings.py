"""The settings of the page that docs/history.rst shows."""

from tests.helpers.documents import ROOT, code_blocks
from tests.settings import *  # noqa: F403

ROOT_URLCONF = "tests.example.document_views"
DJANGO_SSE = {"HISTORY": {}, "RETRY": 100}
(PAGE,) = code_blocks(ROOT / "docs" / "history.rst", "html+django")
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {"loaders": [("django.template.loaders.locmem.Loader", {"news.html": PAGE})]},
    }
]
