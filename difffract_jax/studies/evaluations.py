"""How many evaluations of the model a step has, of what studies read place by place.

A place of a study (`choices.FeaturePlaces`) is a feature at a step. With guidance by two branches a step is two
evaluations, and a feature at a step is two things, which nothing here may add up or take for one another. Such runs are
refused; `flow`, which only sums edges, takes them.
"""

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
