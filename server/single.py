"""A whole server in one process but for its engines: the hub and one front end."""

from collections.abc import Callable

from fastapi import FastAPI

from server.api.app import create_app
from server.hub.hub import Hub, LocalLink
from server.settings import Settings


def create_server(settings: Settings, on_fatal: Callable[[str, str], None]) -> tuple[FastAPI, Hub]:
    """The application, and the hub, which lives as long as the application does.

    Args:
        on_fatal: called with a variant's name and the reason when its checkpoint can't be loaded at all.
    """
    hub = Hub(settings, on_fatal)
    return create_app(settings, LocalLink(hub), hub.running), hub
