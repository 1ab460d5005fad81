"""What a replacement cost: metrics, controls, documents, tables.

The name ``fa.report`` is this package once any part of it is imported, and is the function
``fa.report(model)`` to its users. So the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn_compile.report.document import Report


class _Report(ModuleType):
    def __call__(self, model: Any = None) -> Report:
        from fastattn_compile.report.of_model import report

        return report(model)


sys.modules[__name__].__class__ = _Report
