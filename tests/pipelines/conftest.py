"""What tests of pipelines share."""

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry


@pytest.fixture
def backend_of_diffusers():
    """A test may choose one: diffusers leaves the choice behind for the whole process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
