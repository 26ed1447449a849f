"""What several files of this folder start from."""

import pytest


@pytest.fixture(scope="module")
def generated(filled_cache):
    """Generated flights of the small world, as they are read."""
    from fakes.ice_layers import SMALL_WORLD

    from fulgurite.datamodules.ice_layers import SyntheticFlights, World

    return SyntheticFlights(World(**SMALL_WORLD)).load()
