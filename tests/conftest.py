import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Tests are repeatable, and leave the other cores alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
