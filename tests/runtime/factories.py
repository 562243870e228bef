"""Factories that service tests name: engines that fail. Imports nothing heavy at the top."""

import os
import sys
from typing import Any


def make_faulty() -> Any:
    """An engine whose third step fails."""
    from tests.runtime.fake import make_engine

    return make_engine(fault={3: RuntimeError("cable cut")})


def make_noise() -> Any:
    """Two lines, then the end; standard output goes where standard error goes."""
    print("nearly", flush=True)
    print("there", file=sys.stderr, flush=True)
    os._exit(7)
