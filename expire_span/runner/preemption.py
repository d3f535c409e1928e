"""Pre-emption on a Slurm cluster: submitit requeues the job, in its own way, once the run has been saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .ranks import RankLostError, wait_for_all
from .stop_signals import Stopped, stop_signals


@contextmanager
def requeue_after_saving() -> Iterator[None]:
    """Let submitit's handler of a pre-emption or time-out (SIGUSR2) wait until the run has stopped and saved.

    The handler requeues the job, which starts in the same folder and goes on. Without submitit this does nothing.
    """
    requeue = signal.getsignal(signal.SIGUSR2)
    if not callable(requeue):
        yield
        return
    preempted = False
    with stop_signals() as stop:

        def stop_first(number: int, frame: Any) -> None:
            nonlocal preempted
            preempted = True
            if stop.number is None:  # a second signal would not wait for the update
                signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGUSR2, stop_first)
        try:
            yield
        except Stopped:
            if preempted:
                requeue(signal.SIGUSR2, None)  # which ends rank 0; a task that ended before it could end the job
                with suppress(RankLostError):
                    wait_for_all()
            raise
        finally:
            signal.signal(signal.SIGUSR2, requeue)
