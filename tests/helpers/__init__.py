"""What the tests share. Nothing is imported here: server processes run modules of this folder before gevent patches."""
