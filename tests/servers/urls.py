"""The streams on which every server is tried."""

from django.urls import include, path

from tests.servers import views

urlpatterns = [
    path("sync/<key>", views.SyncTicks.as_view()),
    path("async/<key>", views.AsyncTicks.as_view()),
    path("iterable/<key>", views.IterableTicks.as_view()),
    path("list/<key>", views.ListOfTicks.as_view()),
    path("queue/<channel>", views.QueueView.as_view()),
    path("async-queue/<channel>", views.AsyncQueueView.as_view()),
    path("gate/<key>", views.gate),
    path("story/<key>", views.story),
    path("send/<channel>", views.send),
    path("census/", include("tests.servers.census_views")),
    path("closing/", include("tests.servers.closing_views")),
    path("safe/", include("tests.servers.safe_views")),
    path("stopping/", include("tests.servers.stopping_views")),
]
