"""timm where torchvision cannot be had.

timm imports torchvision for data sets, augmentations and a class to test instances of; its models
compute nothing with it. PyPI's torchvision does not load beside a CPU build of torch, so a machine
without a working one gets empty modules under its name while timm is imported, and none after.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from functools import cache
from types import ModuleType
from typing import Any

import pytest


class _EmptyClass(type):
    """The class of classes that do nothing, with members, as an enum has them, by their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _EmptyTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of torchvision, with nothing but empty classes in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = []  # type: ignore[attr-defined]

        def missing(attribute: str) -> type:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            made = _EmptyClass(attribute, (), {})
            setattr(module, attribute, made)
            return made

        module.__getattr__ = missing  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def import_timm() -> ModuleType:
    """Return timm; skip the test where it is not installed."""
    pytest.importorskip("yaml", reason="timm needs PyYAML")
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name == "timm":
            pytest.skip("timm is not installed: pip install --no-deps timm")
        if error.name != "torchvision":
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]
    finder = _EmptyTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
