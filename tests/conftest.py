"""What every test stands on: few threads, no network, a private cache, repeatable examples.

The environment is set when this file is imported, before any test imports torch, and is inherited
by the processes that tests start. Fixtures of one room live in that room's own ``conftest.py``.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent

# Compiled C++ is content-keyed and costs half a minute: kept between runs and shared by the workers
# of one, apart from the user's.
KEPT_CACHE = REPO / "build" / "test-cache"
# Artifacts, hub downloads and the rest are this process's alone: none is found ready by chance.
RUN_CACHE = Path(tempfile.mkdtemp(prefix="fxlm-tests-"))


def _set_environment() -> None:
    """Point caches at private folders, switch hubs off, and keep thread pools small."""
    (RUN_CACHE / "fxlm").mkdir()
    for name in ("ops", "headers"):
        (KEPT_CACHE / name).mkdir(parents=True, exist_ok=True)
        (RUN_CACHE / "fxlm" / name).symlink_to(KEPT_CACHE / name)
    os.environ.update(
        XDG_CACHE_HOME=str(RUN_CACHE),
        HF_HOME=str(RUN_CACHE / "huggingface"),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TORCHINDUCTOR_CACHE_DIR=str(KEPT_CACHE / "inductor"),
    )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_set_environment()

# A draw of examples depends on the machine's mood only where nobody waits for the answer.
settings.register_profile(
    "fxlm",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fxlm")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove this run's cache."""
    shutil.rmtree(RUN_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the checkout."""
    return REPO
