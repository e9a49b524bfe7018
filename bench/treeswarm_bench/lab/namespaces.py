"""Network namespaces and the TUN devices in them: what needs root, made and removed through iproute2's `ip`."""

import contextlib
import functools
import ipaddress
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from treeswarm.errors import BadRequest

NAMESPACES = Path("/run/netns")
TUN = Path("/dev/net/tun")
# <linux/if_tun.h>: IP packets without a header of the driver's.
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# A mebibyte, a large tree's frame, is 700 packets that may come at once: none should be lost before the wire has it.
DEVICE_QUEUE = 5000
DEVICE = "wan0"
# What home lines carry in one packet.
MTU = 1500
_numbers = itertools.count()


@functools.cache
def ip_program() -> str | None:
    """Where `ip` is; on Debian not on an ordinary user's PATH."""
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def ip(*arguments: str, orders: str = "") -> str:
    """What `ip` prints.  `orders` is for `-batch -`.  Raises BadRequest with what it complains of."""
    # A session of its own, so that Ctrl-C cannot end it in the middle of a removal.
    done = subprocess.run(
        [ip_program() or "ip", *arguments],
        input=orders,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        raise BadRequest(f"ip {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@functools.cache
def can_make_namespaces() -> str | None:
    """None if a lab can be made here, else why not and what to do."""
    if sys.platform != "linux":
        return "network namespaces are Linux's own: use a Linux machine or a virtual one"
    if ip_program() is None:
        return "the program ip is missing: apt-get install iproute2"
    if not TUN.exists():
        return f"there is no {TUN}: modprobe tun, or give the container --device {TUN}"
    try:
        with new_namespace("try") as name, new_device(name, "10.78.0.1/24"):
            return None
    except (BadRequest, OSError) as error:
        return f"{error}: run it as root (in a container also with --cap-add NET_ADMIN,SYS_ADMIN)"


@contextlib.contextmanager
def new_namespace(host: str) -> Iterator[str]:
    """A namespace with a name of its own, removed on leaving together with what still runs in it."""
    name = f"treeswarm-{os.getpid()}-{next(_numbers)}-{host}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        remove_namespace(name)


@contextlib.contextmanager
def new_device(namespace: str, address: str, *, congestion: str | None = None) -> Iterator[int]:
    """The descriptor of a TUN device inside `namespace` with `address` (CIDR).  `congestion` names the TCP congestion
    control of connections over it."""
    import fcntl  # noqa: PLC0415  # not on Windows, where `swarm bench --help` must work as well

    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        asked = struct.pack("16sH22x", b"lab%d", IFF_TUN | IFF_NO_PI)  # the kernel puts a free number for %d
        given = fcntl.ioctl(descriptor, TUNSETIFF, asked)[:16].rstrip(b"\0").decode()
        ip("link", "set", given, "netns", namespace, "name", DEVICE)
        orders = [f"address add {address} dev {DEVICE}", f"link set {DEVICE} mtu {MTU} txqueuelen {DEVICE_QUEUE} up"]
        ip("-n", namespace, "-batch", "-", orders="\n".join(orders))
        if congestion:
            # The system's own default cannot be set from within a namespace; a route's can.
            subnet = ipaddress.ip_interface(address).network
            ip("-n", namespace, "route", "change", str(subnet), "dev", DEVICE, "congctl", congestion)
        yield descriptor
    finally:
        os.close(descriptor)


def remove_namespace(name: str) -> None:
    """End by force what runs in it, and take its name away.  One that is gone already is left alone."""
    with contextlib.suppress(BadRequest):
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)


def remove_leftovers() -> None:
    """Remove the namespaces of labs whose process and hub died before they could."""
    for path in NAMESPACES.glob("treeswarm-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            remove_namespace(path.name)
