"""Hosts and seeds that run compiled, without a step that waits for it (design name: Tezzeret)."""

from esper.compilation.compiled_host import CompiledHost
from esper.compilation.compiled_slot import MiscompiledError

__all__ = ["CompiledHost", "MiscompiledError"]
