"""What studies that read a run place by place need of it: one evaluation a step, and FLUX.1's groups of sites.

A place of a study (`choices.FeaturePlaces`) is a feature at a step. With guidance by two branches a step is two
evaluations, and a feature at a step is two things, which nothing here may add up or take for one another. Such runs are
refused; `flow`, which only sums edges, takes them.
"""

from difffract_jax.address import GROUPS, Layout
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.runs import Run


def refuse_branches(branches: int) -> None:
    """Refuses what has two evaluations a step.

    Args:
        branches: evaluations of a step.

    Raises:
        UserError: if there are several.
    """
    if branches > 1:
        raise UserError(
            f"This study reads one evaluation of the model at each step, but here are {branches}, with the prompt and "
            "with a negative prompt; give a pipeline whose default guidance scale is 1."
        )


def refuse_other_groups(layout: Layout) -> None:
    """Refuses a model whose groups of sites are not those of FLUX.1, which some studies read by their number.

    Args:
        layout: of the model.

    Raises:
        UserError: if they are others.
    """
    if layout.groups != GROUPS:
        labels = ", ".join(group.label for group in layout.groups)
        raise UserError(
            f"This study reads the sites of FLUX.1's blocks, img, txt and single, but the model has {labels}, stack by "
            "stack; give a pipeline of the organism's architecture."
        )


def plain_run(pipe: Pipeline) -> Run:
    """Plans a run with a pipeline's own sizes and schedule, of one evaluation a step.

    Args:
        pipe: the pipeline.

    Raises:
        UserError: if its guidance is by two branches.
    """
    run = pipe.plan()
    refuse_branches(run.branches)
    return run
