"""
What a browser makes of a text/event-stream, rule by rule from the HTML standard, section 9.2.6.

Bytes may come in pieces of any size. What the standard ignores is ignored here too, so a test that compares
messages sees exactly what a page's EventSource would dispatch.
"""

import codecs
import re
from dataclasses import dataclass

LINE_END = re.compile("\r\n|\n|\r")
DIGITS = re.compile("[0-9]+", re.ASCII)


@dataclass(frozen=True)
class Message:
    """One dispatched event: its type, its data and the last event ID at that moment."""

    event: str
    data: str
    last_event_id: str = ""


class Parser:
    """
    The event stream interpreter.

    Besides the messages it keeps what a page cannot see and a test wants to: `retry` is the last reconnection
    time in milliseconds (`None` before the first), `comments` the text behind each line-opening colon,
    `last_event_id` what the next reconnection would send.
    """

    def __init__(self):
        self.retry = None
        self.comments = []
        self.last_event_id = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True  # until the first character, which may be a byte order mark
        self._after_cr = False  # the last character seen was a CR, which ended its line: an LF now belongs to it
        self._line = ""  # the line that has not ended yet
        self._event = ""
        self._data = ""
        self._id = ""

    def feed(self, data):
        """Take some bytes of the stream and return the messages they complete."""
        text = self._decoder.decode(data)
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if self._after_cr and text:
            self._after_cr = False
            text = text.removeprefix("\n")
        if text.endswith("\r"):
            self._after_cr = True
        *lines, self._line = LINE_END.split(self._line + text)
        messages = []
        for line in lines:
            if line:
                self._take(line)
            elif (message := self._dispatch()) is not None:
                messages.append(message)
        return messages

    def _take(self, line):
        """Process one line that is not empty."""
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not field:
            self.comments.append(value)
        elif field == "event":
            self._event = value
        elif field == "data":
            self._data += value + "\n"
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and DIGITS.fullmatch(value):
            self.retry = int(value)

    def _dispatch(self):
        """Process an empty line: the message it ends, or None where there is no data to dispatch."""
        self.last_event_id = self._id
        event, data = self._event, self._data
        self._event = self._data = ""
        if not data:
            return None
        return Message(event or "message", data.removesuffix("\n"), self.last_event_id)


def parse(data):
    """Return the messages of a whole stream; an event without its empty line is dropped, as the standard says."""
    return Parser().feed(data)
