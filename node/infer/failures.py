"""Whatever a model's own code raises, as one sentence of ours."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from node.errors import ModelError, RadnodeError


def last_words(error: BaseException) -> str:
    """The kind of the innermost cause and what it says, in one line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    # TorchScript and torch.export put their own stacks first; what happened stands in the last line.
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    said = lines[-1] if (lines and lines[0].endswith(":")) or "Traceback" in str(cause) else (lines or [""])[0]
    return f"{type(cause).__name__}: {said[:300]}"


@contextmanager
def explained(name: str, doing: str, tell: Callable[[BaseException], str] = last_words) -> Iterator[None]:
    """Turn anything raised within into a `ModelError`: which model could not `doing`, and why, as `tell` says it."""
    import torch

    try:
        yield
    except RadnodeError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(f"model {name} could not {doing}: the GPU is out of memory") from error
    except (Exception, SystemExit) as error:  # a model may raise anything, and must not end the node's process
        if _lacks_memory(error):
            raise ModelError(f"model {name} could not {doing}: out of memory") from error
        logging.getLogger(__name__).debug("model %s could not %s", name, doing, exc_info=error)
        raise ModelError(f"model {name} could not {doing}: {tell(error)}") from error


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether it, or a cause of it, is that the machine or the limit of the process gave no more memory. PyTorch's
    allocator for the CPU says so in a RuntimeError.
    """
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
            return True
        error = error.__cause__
    return False


def name_signal(number: int) -> str:
    """`SIGSEGV` and the like, or the number: Python has no names for most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
