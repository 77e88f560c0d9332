"""The systems under test: the least that each needs to do the same job, every one in the words of its own manual.

The job: `GET /events/<channel>` is a stream of what is published to `<channel>`; its headers are sent at once.
`GET /ping` answers with the pid of the worker. `BENCHMARK_REDIS_PORT` says where Redis is.
"""
