"""The router as a service: it beats whenever its own loop has come round."""

from pathlib import Path


def route(address: str, folder: Path, key_file: Path | None) -> None:
    """Route what runs tell until SIGTERM."""
    raise NotImplementedError
