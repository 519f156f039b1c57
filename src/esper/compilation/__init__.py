"""Hosts and seeds that run compiled, and who compiles them when (design name: Tezzeret)."""

from esper.compilation.artefact_store import ArtefactError, ArtefactStore
from esper.compilation.captured_step import CapturedStep
from esper.compilation.compile_service import CompileService
from esper.compilation.compiled_host import CompiledHost, CompileError
from esper.compilation.compiled_slot import MiscompiledError

__all__ = [
    "ArtefactError",
    "ArtefactStore",
    "CapturedStep",
    "CompileError",
    "CompileService",
    "CompiledHost",
    "MiscompiledError",
]
