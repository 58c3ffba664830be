"""What the main process finds, known to all processes of a launch."""

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def found_by_main(find: Callable[[], Found]) -> Found:
    """What `find` returns in the main process, in all of them; a ValueError there is raised in all of them too.

    Called by all processes together. What is found must be picklable.
    """
    # Not with the others above: preparation locks folders too, and waits for no PyTorch.
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state, answer = PartialState(), []
    if state.is_main_process:
        try:
            answer = [find(), None]
        except ValueError as error:
            answer = [None, str(error)]
    if state.num_processes > 1:
        answer = broadcast_object_list(answer or [None, None])
    found, problem = answer
    if problem is not None:
        raise ValueError(problem)
    return found


def refuse_together(find_problem: Callable[[], str | None]) -> None:
    """Raise ValueError in all processes with what the main process finds; nothing where it finds nothing."""
    if problem := found_by_main(find_problem):
        raise ValueError(problem)
