"""Makes and removes network namespaces and the TUN devices in them with iproute2's `ip`; this needs root."""

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
# From <linux/if_tun.h>: IP packets without a header of the driver.
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# A frame of a large tree, one mebibyte, is 700 packets that may come at once.  The hub must lose none of them.
DEVICE_QUEUE = 5000
DEVICE = "wan0"
# Bytes per packet, as on home lines.
MTU = 1500
_numbers = itertools.count()


@functools.cache
def ip_program() -> str | None:
    """Return the path of `ip`, or None.  On Debian it is not on an ordinary user's PATH."""
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def ip(*arguments: str, orders: str = "") -> str:
    """Run `ip` and return its output.  `orders` is its input for `-batch -`.  Raises BadRequest with its message."""
    # A session of its own, so that Ctrl-C cannot end it in the middle of a removal.
    process = subprocess.run(
        [ip_program() or "ip", *arguments],
        input=orders,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if process.returncode:
        raise BadRequest(f"ip {' '.join(arguments)}: {process.stderr.strip() or process.returncode}")
    return process.stdout


@functools.cache
def can_make_namespaces() -> str | None:
    """Return None if a lab can be made here, else the reason why not and what to do."""
    if sys.platform != "linux":
        return f"{sys.platform} has no network namespaces: use a Linux machine or a virtual one"
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
    """Make a namespace with a unique name.  On leaving it is removed, and processes still running in it are killed."""
    name = f"treeswarm-{os.getpid()}-{next(_numbers)}-{host}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        remove_namespace(name)


@contextlib.contextmanager
def new_device(namespace: str, address: str, *, congestion: str | None = None) -> Iterator[int]:
    """Make a TUN device with `address` (CIDR) inside `namespace` and return its file descriptor.

    `congestion` names the TCP congestion control of connections over it.
    """
    import fcntl  # noqa: PLC0415  # not on Windows, where `swarm bench --help` must work as well

    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", b"lab%d", IFF_TUN | IFF_NO_PI)  # the kernel puts a free number for %d
        name = fcntl.ioctl(descriptor, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
        ip("link", "set", name, "netns", namespace, "name", DEVICE)
        orders = [f"address add {address} dev {DEVICE}", f"link set {DEVICE} mtu {MTU} txqueuelen {DEVICE_QUEUE} up"]
        ip("-n", namespace, "-batch", "-", orders="\n".join(orders))
        if congestion:
            # The system's default cannot be set from within a namespace; that of a route can.
            subnet = ipaddress.ip_interface(address).network
            ip("-n", namespace, "route", "change", str(subnet), "dev", DEVICE, "congctl", congestion)
        yield descriptor
    finally:
        os.close(descriptor)


def remove_namespace(name: str) -> None:
    """Kill the processes in a namespace and remove it.  Do nothing if it no longer exists."""
    with contextlib.suppress(BadRequest):
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)


def remove_leftovers() -> None:
    """Remove the namespaces of labs whose process and hub died before they could remove them."""
    for path in NAMESPACES.glob("treeswarm-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            remove_namespace(path.name)
