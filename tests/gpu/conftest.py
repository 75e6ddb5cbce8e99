"""Tests of what only a GPU shows. ``--device cpu`` tries them without one."""

import pytest


@pytest.fixture
def device(pytestconfig):
    """ "cuda", or with ``--device cpu`` "cpu"."""
    return pytestconfig.option.device


@pytest.fixture
def cpu(device):
    """The options of fairseq-train and fairseq-generate for the device."""
    return {"cpu": device == "cpu"}
