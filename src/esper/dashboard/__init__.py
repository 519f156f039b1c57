"""The dashboard: a local web page that follows runs as they go on and compares them."""

from esper.dashboard.access import TokenError, find_token
from esper.dashboard.commands import (
    Command,
    CommandChannel,
    CommandRefusedError,
    OfferedAction,
)
from esper.dashboard.serving import Address, AddressError, DashboardServer, allow_many_files

__all__ = [
    "Address",
    "AddressError",
    "Command",
    "CommandChannel",
    "CommandRefusedError",
    "DashboardServer",
    "OfferedAction",
    "TokenError",
    "allow_many_files",
    "find_token",
]
