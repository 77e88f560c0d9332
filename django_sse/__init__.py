"""Server-Sent Events for Django.

One event's way, and the module that owns each step::

    send_event -> event -> broker (Redis | memory) -> hub -> stream -> wire -> view -> browser

``event``, ``wire`` and ``hub`` are pure: no Django, no Redis, no threads, no clock. ``brokers`` and ``streams`` drive
them, ``runtime`` holds the only process-wide state, ``views`` and ``redisqueue`` are the public doors.
"""

__version__ = "1.0.0.dev0"
