"""Three live pages: a clock, a board that everybody shares, and a room for every address.

Nothing is stored: a note goes to the pages that are open while it is sent, and to those that come back from a break.
"""

import time

from django import forms
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.text import slugify
from django.views.decorators.http import require_POST

from django_sse.exceptions import BrokerUnavailable
from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.views import BaseSseView

# --- The clock: a generator that fills self.sse; every yield sends what is in it.


class ClockEvents(BaseSseView):
    def iterator(self):
        while True:
            self.sse.add_message("time", timezone.now().isoformat())
            yield
            time.sleep(1 - time.time() % 1)  # seconds, until the next full one


# --- The board: one channel for everybody.


class BoardEvents(RedisQueueView):
    redis_channel = "board"


@require_POST
def send_to_board(request):
    return send_note(request, channel="board")


# --- The rooms: the address names the channel. The prefix keeps a room called "board" off the board.


class RoomEvents(RedisQueueView):
    def get_redis_channel(self):
        return f"room:{self.kwargs['slug']}"


@require_POST
def send_to_room(request, slug):
    return send_note(request, channel=f"room:{slug}")


class RoomForm(forms.Form):
    name = forms.CharField(max_length=50)

    def clean_name(self):
        slug = slugify(self.cleaned_data["name"])
        if not slug:
            raise forms.ValidationError("Please use some letters from a to z, or digits.")
        return slug


def find_room(request):
    """Turn the name of a room into its address."""
    form = RoomForm(request.GET or None)
    if form.is_valid():
        return redirect("room", slug=form.cleaned_data["name"])
    return render(request, "rooms.html", {"form": form})


# --- What board and rooms share: check the note, send it, answer with nothing or with the reason.


class NoteForm(forms.Form):
    text = forms.CharField(max_length=500, strip=False)

    def clean_text(self):
        text = self.cleaned_data["text"]
        if not text.strip():
            raise forms.ValidationError("Please write something first.")
        return text


def send_note(request, channel):
    form = NoteForm(request.POST)
    if not form.is_valid():
        return sorry(400, form.errors["text"][0])
    try:
        send_event("note", form.cleaned_data["text"], channel=channel)
    except BrokerUnavailable:
        return sorry(503, "Nobody can be reached just now.")
    return HttpResponse(status=204)


def sorry(status, reason):
    return HttpResponse(reason, status=status, content_type="text/plain; charset=utf-8")
