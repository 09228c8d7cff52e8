"""The driver: one process, one loop, that brings a plan's stages to leases and owns every retry.

It holds no tensors. What is done is in the store; the journal only tells the story.
"""

from orchestrator.driver.loop import Driver, Listener, Outcome, Running

__all__ = ["Driver", "Listener", "Outcome", "Running"]
