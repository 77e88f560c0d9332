// better-sse on Node's own HTTP server, fed by ioredis: `node better_sse.cjs PORT`.

const http = require("node:http");
const { createChannel, createSession } = require("better-sse");
const Redis = require("ioredis");

const redis = new Redis(Number(process.env.BENCHMARK_REDIS_PORT), "127.0.0.1");
const channels = new Map();

redis.on("message", (name, data) => channels.get(name).broadcast(data));

function channel(name) {
  if (!channels.has(name)) {
    channels.set(name, createChannel());
    redis.subscribe(name);
  }
  return channels.get(name);
}

const server = http.createServer(async (request, response) => {
  if (request.url === "/ping") {
    response.end(String(process.pid));
  } else {
    channel(request.url.slice("/events/".length)).register(await createSession(request, response));
  }
});

server.listen({ host: "127.0.0.1", port: Number(process.argv[2]), backlog: 4096 });
