"""Registers the ops once for this folder."""

import pytest

from fxlm.compiler import ops


@pytest.fixture(scope="session", autouse=True)
def registered() -> str:
    ops.load()
    return ops.cpu_implementation()
