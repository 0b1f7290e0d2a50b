"""The command line's doors to guarantees, alarms, drift and attacks.

It refuses to do any work itself, and imports torch only inside a verb, so that help does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DOORS: tuple[Callable[..., dict[str, Any]], ...] = ()
