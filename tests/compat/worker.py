"""A worker process as a task queue starts it: a new interpreter that knows Django's settings and waits for tasks."""

import django

from django_sse.redisqueue import send_event


def work(tasks):
    """Send each task, `(event, data, channel)`, until None comes."""
    django.setup()
    for event, data, channel in iter(tasks.get, None):
        send_event(event, data, channel)
        tasks.task_done()
