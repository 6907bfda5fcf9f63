"""What a command shall do, as far as its memory depends on it, and what it then needs, phase by phase."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from difffract_jax.estimate.weights import Transcoders


class Work(NamedTuple):
    """What a command shall do.

    Attributes:
        command: its name, one of `COMMANDS`.
        shapes: part -> shape, from `loading.pipeline_shapes`.
        dtype: of the model's weights.
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        tcs: transcoders; None for a command without.
        recorded: first block that is recorded and the one behind the last.
        steps: denoising steps that are recorded; of `harvest` and `evaluate`, of the run.
        targets: pulled back together at most.
        explained: targets whose attention scores become nodes; 0 where attention is frozen.
        pooled: whether the pooled path becomes nodes, which takes the live model backwards.
        batch: images, or prompts, computed together.
        branches: evaluations of a step that the sampler computes together for each.
        streamed: whether weights pass through memory block by block.
        host: whether a processor computes. XLA then widens all bfloat16 weights of a loop to float32 at once.
        tokens: of a prompt that a site reports at a step, for rows; None for all.
        room: bytes that the command may use, a share of which decoder rows fill at most; None where nobody knows.
        scanned: evaluations of a run, of which a scan keeps statistics each.
    """

    command: str
    shapes: Mapping[str, Any]
    dtype: Any
    grid: tuple[int, int] = (0, 0)
    text_tokens: int = 0
    tcs: Transcoders | None = None
    recorded: tuple[int, int] = (0, 0)
    steps: int = 1
    targets: int = 50
    explained: int = 0
    pooled: bool = False
    batch: int = 1
    branches: int = 1
    streamed: bool = False
    host: bool = False
    tokens: int | None = None
    room: int | None = None
    scanned: int = 1

    @property
    def seq(self) -> int:
        """Tokens of the joint sequence."""
        return self.text_tokens + prod(self.grid)


class Phase(NamedTuple):
    """A part of a command's work.

    Attributes:
        name: what is done.
        held: what lies in memory throughout, in bytes by name.
        passing: bytes needed in between.
    """

    name: str
    held: Mapping[str, int]
    passing: int

    @property
    def needed(self) -> int:
        """All of it."""
        return sum(self.held.values()) + self.passing


class Estimate(NamedTuple):
    """What a command needs.

    Attributes:
        command: its name.
        phases: in their order.
    """

    command: str
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def needed(self) -> int:
        """Bytes that the command needs at one time."""
        return self.largest.needed

    @property
    def held(self) -> int:
        """The most that lies in memory whatever is needed in between: with less the command cannot run."""
        return max(sum(phase.held.values()) for phase in self.phases)
