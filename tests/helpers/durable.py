"""A Redis server that keeps its data, so that it can be lost in the ways in which production loses it."""

from tests.helpers.redis import RedisServer

KEPT = {
    # Whatever it has answered to is on the disk, however it ends.
    "aof": ("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
    # What it had when it was last told to save, and when it ended properly.
    "rdb": ("--appendonly", "no", "--save", "3600 1"),
}


class DurableRedis(RedisServer):
    """`keep`: how it keeps its data, of `KEPT`."""

    def __init__(self, keep):
        super().__init__()
        self._keep = keep

    def _command(self):
        return [*super()._command(), *KEPT[self._keep]]
