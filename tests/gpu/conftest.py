"""What the tests on a GPU share with the end-to-end tests; without a GPU every one of them is skipped and says so."""

import pytest

from tests.e2e.conftest import checkpoint_of, rows_file, write_config

__all__ = ["checkpoint_of", "rows_file", "write_config"]


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
