"""A program for a lab's hosts that needs nothing but Python; run it by its path.

`serve` echoes on one port and swallows on the next; the others dial it: `rtt HOST COUNT` prints the round trips of
single bytes, `echo HOST BYTES` and `push HOST BYTES` the time that many take there and back, or there; all in seconds.
`lines HOST` prints every line of standard input when it has come back.
"""

import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable

ECHO, SINK = 5000, 5001
PIECE = 1 << 16


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(PIECE):
            self.request.sendall(data)


class Sink(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(PIECE):
            pass
        self.request.sendall(b".")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


def dial(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def serve() -> None:
    with Server(("0.0.0.0", ECHO), Echo) as echoing, Server(("0.0.0.0", SINK), Sink) as sink:
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        print("ready", flush=True)
        echoing.serve_forever()


def rtt(host: str, count: str) -> None:
    taken = []
    with dial(host, ECHO) as connection:
        for _ in range(int(count)):
            start = time.perf_counter()
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            taken.append(time.perf_counter() - start)
    print(json.dumps(taken))


def echo(host: str, size: str) -> None:
    sent, back = bytes(i * i % 251 for i in range(int(size))), bytearray()
    with dial(host, ECHO) as connection:
        start = time.perf_counter()
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        while len(back) < len(sent):
            back += connection.recv(PIECE)
    assert back == sent, "TCP changed what it carried"
    print(time.perf_counter() - start)


def push(host: str, size: str) -> None:
    with dial(host, SINK) as connection:
        start = time.perf_counter()
        connection.sendall(bytes(int(size)))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    print(time.perf_counter() - start)


def lines(host: str) -> None:
    with dial(host, ECHO) as connection, connection.makefile("rw") as stream:
        for line in sys.stdin:
            stream.write(line)
            stream.flush()
            print(stream.readline(), end="", flush=True)


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {
        "serve": serve,
        "rtt": rtt,
        "echo": echo,
        "push": push,
        "lines": lines,
    }
    programs[sys.argv[1]](*sys.argv[2:])
