"""What single model types need to be made tiny, as data (see `fxlm.models.tiny`)."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
