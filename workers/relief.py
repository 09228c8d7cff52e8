"""What a stage does with less memory at once after it ran out of it: the rungs of the OOM ladder.

The driver climbs the ladder; here is what a rung means. The effective batch never changes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relief:
    """How a try at a stage differs from what its parameters say."""

    halvings: int = 0
    """How often the batch that is in memory at once is halved; gradients add up to the same step."""
    activation_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass in place of keeping them."""

    def size(self, whole: int) -> int:
        """What is left of a batch of `whole` utterances."""
        return max(1, -(-whole // 2**self.halvings))


NO_RELIEF = Relief()
