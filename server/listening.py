"""The sockets that a server listens on."""

import errno
import socket

from server.settings import ConfigurationError

BACKLOG = 2048
"""Connections that may wait to be accepted; uvicorn's own number."""


def listen(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Sockets bound to each address of the host, before models are loaded for nothing.

    Args:
        shared: whether others may bind to the same addresses that do likewise (SO_REUSEPORT).

    Raises:
        ConfigurationError: there is no such address here, or its port is taken.
    """
    bound: list[socket.socket] = []
    problem: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            if bound and not port:  # one free port for all of them
                address = (address[0], bound[0].getsockname()[1], *address[2:])
            try:
                one = socket.socket(family, kind, protocol)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
                bound.append(one)
            except OSError as e:
                if e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                problem = e  # localhost, say, where there is no IPv6
        if not bound and problem is not None:
            raise problem
    except OSError as e:
        for one in bound:
            one.close()
        if e.errno == errno.EADDRINUSE:
            other = port + 10 if port < 65000 else 8010
            raise ConfigurationError(
                f"port {port} of {host} is taken; choose another with --port {other}, or with LOWKEY_PORT={other} "
                f"before the command (LOWKEY_PORT={other} make demo)"
            ) from e
        raise ConfigurationError(f"can't listen on {host}, port {port}: {e.strerror}") from e
    return bound


def listen_together(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """What each of `count` processes listens on: sockets of its own, all bound to the same addresses. The system gives
    each connection to one of them. Of several processes, the sockets listen already: nobody is refused whose process is
    yet to come, and nobody else can have the port.

    Raises:
        ConfigurationError: as `listen` does.
    """
    if count == 1:
        return [listen(host, port)]
    # A socket that shares nothing finds out whether anybody is there: another server that shares would not mind us.
    for one in listen(host, port):
        one.close()
    first = listen(host, port, shared=True)
    same = first[0].getsockname()[1]
    groups = [first, *(listen(host, same, shared=True) for _ in range(count - 1))]
    for one in (one for group in groups for one in group):
        one.listen(BACKLOG)
    return groups


def url_of(host: str, port: int) -> str:
    """What a browser on this machine opens to get to a server that listens there."""
    here = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"
