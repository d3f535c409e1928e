"""Several processes that train one model: the ranks that torchrun or Slurm starts, see docs/scaling.md.

Each rank owns an equal share of the parallel streams, with their memories. Gradients and figures are summed over the
ranks, and nothing else is exchanged. In a process alone every function here returns what it is given.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .run_folder.files import WriteError

PATIENCE = timedelta(days=2)  # for what ranks rightly wait for, such as the preparation of data
SECONDS_TO_REPORT = 10  # for rank 0 to tell the error of another rank, which otherwise tells it itself

store: Any = None  # of torch.distributed: what ranks can ask for without waiting for one another
training_group: Any = None  # for everything within a training step, with `run.rank_timeout`


class RankLostError(OSError):
    """Another rank has ended, or does not answer."""


def is_launched() -> bool:
    """Whether this process is one of several that torchrun, or its like, has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this rank writes the files and talks to the user; so it stays when it has parted from the others."""
    return not is_launched() or os.environ["RANK"] == "0"


def connect() -> None:
    """Meet the other ranks, if there are any.

    Raises:
        OSError: They cannot be reached, or the port of rank 0 is in use.
    """
    global store
    join_job()
    if not is_launched() or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an error is raised, where torch would abort the process
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's errors of connections are RuntimeErrors
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise OSError(
                f"{address} is in use by another program; set MASTER_PORT, or torchrun --standalone"
            ) from None
        raise OSError(f"rank 0 cannot be reached at {address} ({str(error).splitlines()[0]})") from None
    wait_for_all()
    if rank():
        logging.disable(logging.WARNING)  # rank 0 says it


def join_job() -> None:
    """Let the tasks of a job that submitit has started, on a Slurm cluster, be ranks."""
    if "SUBMITIT_EXECUTOR" in os.environ and not is_launched():
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def disconnect() -> None:
    """Part from the other ranks."""
    global store, training_group
    store = training_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(seconds: float) -> None:
    """Let the ranks wait for one another for at most this long from now on, but for `wait_for_all` and its like."""
    global training_group
    if world_size() > 1 and training_group is None:
        with explain_loss_of_a_rank():
            training_group = dist.new_group(timeout=timedelta(seconds=seconds))


@contextmanager
def explain_loss_of_a_rank() -> Iterator[None]:
    """Turn torch's errors of a connection into the error of the rank that was lost, if it could still give one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        message = asked(lambda: store.get("error").decode() if store.check(["error"]) else "", "")
        if message:
            raise RankLostError(message) from None
        if "imed out" in str(error):
            raise RankLostError("another rank does not answer, see run.rank_timeout") from None
        if "onnection" in str(error):
            raise RankLostError("another rank has ended") from None
        raise RankLostError(f"the other ranks cannot be reached ({str(error).splitlines()[0]})") from None


def is_reporter(message: str) -> bool:
    """Whether this rank is to print an error: rank 0 is, also for others, unless it cannot be reached."""
    if world_size() == 1:
        return True
    number = rank()
    if number == 0:
        asked(lambda: store.set("reported", ""), None)
        return True
    is_first = asked(lambda: not store.check(["error"]), True)
    if is_first:
        asked(lambda: store.set("error", f"rank {number}: {message}"), None)
    if not torch.cuda.is_available():  # where it would wait for the others
        dist.destroy_process_group()  # so that the others do not wait for this rank
    return is_first and not asked(is_reported, False)


def is_reported() -> bool:
    """Whether rank 0 prints an error, or has ended, in a few seconds."""
    try:
        store.wait(["reported"], timedelta(seconds=SECONDS_TO_REPORT))
    except dist.DistNetworkError:  # rank 0, which had the store, has ended
        return True
    except RuntimeError:
        return False
    return True


def asked(question: Callable[[], Any], default: Any) -> Any:
    """What the store answers, or the default: the rank that has it may hang, for which torch would wait."""
    answers = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(question())

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_REPORT + 1)
    return answers[0] if answers else default


def own_streams(num_streams: int, key: str) -> slice:
    """This rank's share of the parallel streams. Raises ValueError, naming the key, unless all shares are equal."""
    count, remainder = divmod(num_streams, world_size())
    if remainder:
        raise ValueError(f"{key}={num_streams} cannot be divided among {world_size()} processes; use a multiple of it")
    return slice(rank() * count, (rank() + 1) * count)


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """The sums of numbers over all ranks."""
    return _reduce_numbers(numbers, dist.ReduceOp.SUM)


def max_numbers(numbers: Sequence[float]) -> list[float]:
    """The largest of each of some numbers over all ranks."""
    return _reduce_numbers(numbers, dist.ReduceOp.MAX)


def _reduce_numbers(numbers: Sequence[float], operation: Any) -> list[float]:
    if world_size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    with explain_loss_of_a_rank():
        dist.all_reduce(values, operation, group=training_group)
    return values.tolist()


def keep_pace() -> None:
    """Wait for the slowest rank. Called once a block, so that ranks that wait for longer know that one hangs."""
    sum_numbers([0.0])


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on its device."""
    if world_size() > 1:
        tensor = tensor.clone()
        with explain_loss_of_a_rank():
            dist.all_reduce(tensor, group=training_group)
    return tensor


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients by their sums over all ranks, in one message.

    A parameter that no rank has used keeps no gradient, as in a process alone: an optimizer passes over it.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([parameter.grad is not None for parameter in parameters]).to(parameters[0])
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    message = torch.cat([used, *(gradient.flatten() for gradient in gradients)])
    with explain_loss_of_a_rank():
        dist.all_reduce(message, group=training_group)
    was_used, *sums = message.split([len(used), *(gradient.numel() for gradient in gradients)])
    for parameter, is_used, total in zip(parameters, was_used.tolist(), sums, strict=True):
        parameter.grad = total.view_as(parameter) if is_used else None


def copy_from_main(module: torch.nn.Module) -> None:
    """Give all ranks the weights of rank 0: other processors may have drawn others in the last bits."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def wait_for_all() -> None:
    """Wait for all ranks, however long one of them takes, such as to write its file."""
    gather(None)


def gather(value: Any) -> list[Any]:
    """A value of each rank, in their order, however long one of them takes."""
    values = [value] * world_size()
    if world_size() > 1:
        with explain_loss_of_a_rank():
            dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The value of rank 0."""
    return gather(value)[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """Let an error of any rank, as it starts, be one of all: rank 0 has the message of the first that failed."""
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError, MemoryError) as own_error:
        error = own_error
    reports = gather(None if error is None else (str(error), isinstance(error, WriteError)))
    failed = [number for number, report in enumerate(reports) if report is not None]
    if error is not None and (rank() == failed[0] or world_size() == 1):
        raise error
    if failed:
        message, is_write_error = reports[failed[0]]
        raise (WriteError if is_write_error else ValueError)(f"rank {failed[0]}: {message}")


def check_same(facts: dict[str, Any]) -> None:
    """Raises ValueError, naming rank and fact, if a rank has another value of one of these facts than rank 0."""
    expected, *others = gather(facts)
    for number, other in enumerate(others, start=1):
        for name, value in expected.items():
            if other[name] != value:
                raise ValueError(f"rank {number} has another {name} than rank 0; start all with the same command")
