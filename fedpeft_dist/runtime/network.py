"""The network interface that leads to another machine."""

import socket
import struct
from contextlib import suppress

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address."""


def interface_towards(address: str) -> str | None:
    """The interface by which this machine reaches an IPv4 address or host; None if the system does not tell.

    gloo would use the interface that this machine's own name resolves to: perhaps the loopback, or none.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it looks the route up
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # one without an IPv4 address
                    found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    if socket.inet_ntoa(found[20:24]) == own:
                        return name
    except (ImportError, OSError):
        pass
    return None
