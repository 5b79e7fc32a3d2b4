"""The suite of promises that every backend keeps; a plug-in's author runs it, too.

    # conftest.py                                        # test_promises.py
    @pytest.fixture                                      from launcher.testing.conformance import *
    def world(tmp_path):
        yield MyWorld(tmp_path)

A World is the platform, real or a double at the wire, and one hand that moves a job along. Needs pytest.
"""

from launcher.testing.world import ContainerFacts, World

__all__ = ["ContainerFacts", "World"]
