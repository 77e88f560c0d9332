"""Each live page is an address, and beneath it ``events/`` (its stream) and ``send/`` (its form)."""

from django.urls import path
from django.views.generic import TemplateView

from example import views

urlpatterns = [
    path("", TemplateView.as_view(template_name="home.html"), name="home"),
    path("clock/", TemplateView.as_view(template_name="clock.html"), name="clock"),
    path("clock/events/", views.ClockEvents.as_view()),
    path("board/", TemplateView.as_view(template_name="board.html"), name="board"),
    path("board/events/", views.BoardEvents.as_view()),
    path("board/send/", views.send_to_board),
    path("room/", views.find_room, name="rooms"),
    path("room/<slug:slug>/", TemplateView.as_view(template_name="room.html"), name="room"),
    path("room/<slug:slug>/events/", views.RoomEvents.as_view()),
    path("room/<slug:slug>/send/", views.send_to_room),
]
