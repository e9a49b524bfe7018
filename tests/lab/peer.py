"""Runs on a lab's host.  `serve` echoes; the others dial it: `rtt HOST` and `send HOST BYTES` print seconds,
`lines HOST` prints every line of standard input when it has come back."""

import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable

PORT = 5000


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


def dial(host: str) -> socket.socket:
    connection = socket.create_connection((host, PORT))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def serve() -> None:
    with Server(("0.0.0.0", PORT), Echo) as server:
        print("ready", flush=True)
        server.serve_forever()


def rtt(host: str) -> None:
    """The shortest of some echoes of one byte."""
    taken = []
    with dial(host) as connection:
        for _ in range(5):
            start = time.perf_counter()
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            taken.append(time.perf_counter() - start)
    print(min(taken))


def send(host: str, size: str) -> None:
    """Until the last byte has come back, all of them right."""
    sent, back = bytes(i * i % 251 for i in range(int(size))), bytearray()
    with dial(host) as connection:
        start = time.perf_counter()
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        while len(back) < len(sent):
            back += connection.recv(1 << 16)
    assert back == sent
    print(time.perf_counter() - start)


def lines(host: str) -> None:
    with dial(host) as connection, connection.makefile("rw") as stream:
        for line in sys.stdin:
            stream.write(line)
            stream.flush()
            print(stream.readline(), end="", flush=True)


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {"serve": serve, "rtt": rtt, "send": send, "lines": lines}
    programs[sys.argv[1]](*sys.argv[2:])
