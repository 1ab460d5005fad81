"""Packs the native library of ONNX nodes into the wheel where a C++ compiler is at hand.

The wheel is then one for this platform, and holds a library for every level of instructions; without a compiler it is pure,
and the library is built at first use. Neither needs torch or ONNX Runtime here.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_NATIVE = Path("fastattn_compile", "lowering", "onnx", "native")


class NativeLibrary(BuildHookInterface):
    """The hook of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the libraries and names them to the builder.

        Args:
            version: ``"standard"``, or ``"editable"``: then the sources are there, and nothing is built ahead.
            build_data: What the builder is told.
        """
        if version == "editable":
            return
        native = self._native()
        reason = native.compiler_obstacle()
        if reason:
            self.app.display_warning(f"a pure wheel: {reason}")
            return
        self._room = tempfile.TemporaryDirectory()
        for level in native.levels_to_ship():
            try:
                made = native.build(level, Path(self._room.name))
            except RuntimeError as error:  # what cannot be built here may still be built at first use
                self.app.display_warning(f"{level} is left out: {error}")
                continue
            build_data["force_include"][str(made)] = str(_NATIVE / native.SHIPPED.name / made.name)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().translate(str.maketrans('-.', '__'))}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Leaves nothing behind."""
        if hasattr(self, "_room"):
            self._room.cleanup()

    def _native(self) -> ModuleType:
        """``native/build.py`` by itself, without the package around it."""
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / _NATIVE / "build.py")
        if spec is None or spec.loader is None:
            raise RuntimeError(f"{_NATIVE / 'build.py'} is missing")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
