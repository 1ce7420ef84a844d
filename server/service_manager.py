"""What the server tells the service manager that has started it: systemd, for units of `Type=notify`."""

import logging
import os
import socket

logger = logging.getLogger("lowkey.server")


def notify(state: str) -> None:
    """Tell the service manager `state`, such as "READY=1", if there is one that wants to know: sd_notify(3).

    One that can't be reached is no reason to end: it says itself what it misses.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A name that begins with @ is one in Linux' abstract namespace, which the kernel writes as a NUL.
    address = f"\0{address[1:]}" if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.setblocking(False)
            to.sendto(state.encode(), address)
    except OSError as e:
        logger.debug("the service manager at $NOTIFY_SOCKET was not told %s: %s", state, e)
