"""One Ray runtime for all tests that need one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[None]:
    """Eight logical CPUs whatever the machine has: pipelines of several stages must not wait for each other."""
    ray.init(num_cpus=8, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()
