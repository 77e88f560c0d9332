"""nchan: the configuration of an nginx that publishes, streams, or both."""

CONFIGURATION = """
load_module {module};
daemon off;
user {user};
worker_processes {workers};
pid nginx.pid;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path temporary;
    fastcgi_temp_path temporary;
    proxy_temp_path temporary;
    scgi_temp_path temporary;
    uwsgi_temp_path temporary;
    nchan_shared_memory_size 256M;
    {upstream}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /ping {{ return 200 $pid; }}
        location ~ ^/events/(.+)$ {{
            nchan_subscriber eventsource;
            nchan_channel_id $1;
            nchan_subscriber_first_message newest;
            nchan_message_buffer_length {buffer};
            {passed}
        }}
        location ~ ^/publish/(.+)$ {{
            nchan_publisher http;
            nchan_channel_id $1;
            nchan_message_buffer_length {buffer};
            {passed}
        }}
    }}
}}
"""

# Published through Redis and not kept there: the job a PUBLISH does, and faster for nchan than its "distributed" mode.
UPSTREAM = """upstream redis {{
        nchan_redis_server redis://127.0.0.1:{redis_port};
        nchan_redis_storage_mode nostore;
    }}"""
