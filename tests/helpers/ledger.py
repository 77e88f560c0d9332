"""
The account of what publishers have sent and what clients got of it: nothing lost, nothing twice, nothing out of order.

Each publisher counts its events on each channel, 1, 2, 3 ..., and says so in their data: `text()`. A client may miss
events without loss only at a `stream-reset` that names their channel.
"""

import json
from collections import Counter
from dataclasses import dataclass, field

RESET = "stream-reset"


def text(channel, publisher, number, padding=""):
    """The data of one event."""
    return f"{channel} {publisher} {number} {padding}"


def read(data):
    """Return the `(channel, publisher, number)` of an event."""
    channel, publisher, number, _ = data.split(" ", 3)
    return channel, publisher, int(number)


@dataclass
class Account:
    """Counts over all clients and channels."""

    clients: int = 0
    #: Events that a publisher was told are published, times the clients that should have got them.
    due: int = 0
    #: Of those, how many arrived.
    received: int = 0
    duplicated: int = 0
    disordered: int = 0
    lost: int = 0
    #: Events that are missing where a reset says so.
    skipped: int = 0
    #: Events that arrived again after a reset: their publisher got no answer, and the loss made Redis forget them.
    repeated: int = 0
    #: `(channel, reason)` of each reset.
    resets: Counter = field(default_factory=Counter)
    #: Clients whose connection is over.
    gone: int = 0

    def add(self, messages, channel, sent, log, clients=1):
        """Enter what a client got on `channel`, or several that got the same.

        `sent`: how many events each publisher sent. `log`: the `(publisher, number)` of the last events of the
        channel's history, all of them or as many as it keeps.
        """
        segments, reasons = _segments(messages, channel)
        seen, missing_by_reset = set(), set()
        last = dict.fromkeys(sent, 0)
        for index, segment in enumerate(segments):
            resumed = set(sent) if index else set()  # publishers that may be found further on than they were left
            for publisher, number in segment:
                if (publisher, number) in seen:
                    if publisher in resumed and number == last[publisher]:
                        self.repeated += clients
                    else:
                        self.duplicated += clients
                elif number < last[publisher]:
                    self.disordered += clients
                elif publisher in resumed:
                    missing_by_reset.update((publisher, gap) for gap in range(last[publisher] + 1, number))
                seen.add((publisher, number))
                last[publisher] = max(number, last[publisher])
                resumed.discard(publisher)
        due = {(publisher, number) for publisher, count in sent.items() for number in range(1, count + 1)}
        missing = due - seen
        self.due += len(due) * clients
        self.received += len(seen) * clients
        self.skipped += len(missing & missing_by_reset) * clients
        self.lost += len(missing - missing_by_reset) * clients
        self.resets.update({(channel, reason): times * clients for reason, times in Counter(reasons).items()})
        # What came since the last reset is the end of the history, in its order.
        both = min(len(segments[-1]), len(log))
        if both and segments[-1][-both:] != log[-both:]:
            self.disordered += clients


def _segments(messages, channel):
    """Return the events of `channel` between its resets, as lists, and the reasons of those."""
    segments, reasons = [[]], []
    for message in messages:
        if message.event == RESET:
            reset = json.loads(message.data)
            if channel in reset["channels"]:
                reasons.append(reset["reason"])
                segments.append([])
        else:
            name, publisher, number = read(message.data)
            if name == channel:
                segments[-1].append((publisher, number))
    return segments, reasons
