import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder of benchmark data, which is no part of the repository."""
    return Path(os.environ.get("REASONREC_DATA", Path(__file__).parents[3] / "shared" / "data"))
