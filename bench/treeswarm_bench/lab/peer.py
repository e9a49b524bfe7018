"""A program for a lab's hosts that needs nothing but Python; run it by its path.

`serve` echoes on one port and discards on the next.  The other commands dial it, and print times in seconds:

    rtt HOST COUNT     the round trips of single bytes
    echo HOST BYTES    the time that so many bytes take there and back
    push HOST BYTES    the time that so many bytes take there
    lines HOST         no times: every line of standard input when it has come back
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


class EchoHandler(socketserver.BaseRequestHandler):
    """Sends every byte back."""

    def handle(self) -> None:
        while data := self.request.recv(PIECE):
            self.request.sendall(data)


class SinkHandler(socketserver.BaseRequestHandler):
    """Discards all bytes and confirms the last one."""

    def handle(self) -> None:
        while self.request.recv(PIECE):
            pass
        self.request.sendall(b".")


class PeerServer(socketserver.ThreadingTCPServer):
    """Serves every connection in a thread of its own."""

    daemon_threads = True


def dial(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def serve() -> None:
    with PeerServer(("0.0.0.0", ECHO), EchoHandler) as echo_server, PeerServer(("0.0.0.0", SINK), SinkHandler) as sink:
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        print("ready", flush=True)
        echo_server.serve_forever()


def rtt(host: str, count: str) -> None:
    round_trips = []
    with dial(host, ECHO) as connection:
        for _ in range(int(count)):
            start = time.perf_counter()
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            round_trips.append(time.perf_counter() - start)
    print(json.dumps(round_trips))


def echo(host: str, size: str) -> None:
    sent, returned = bytes(i * i % 251 for i in range(int(size))), bytearray()
    with dial(host, ECHO) as connection:
        start = time.perf_counter()
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        while len(returned) < len(sent):
            returned += connection.recv(PIECE)
    assert returned == sent, "TCP changed what it carried"
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
