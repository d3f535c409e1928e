"""Several processes that train one model together, forked from one that has everything imported."""

import multiprocessing
import os
import socket
import time
import traceback

import forked_command

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["expire_span.runner.cli", "expire_span.runner.train", "tiny_config"])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment_of(rank, world_size, port):
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in numbers.items()}


def run_ranks(world_size, function, *arguments, seconds=120.0):
    """Call function(rank, *arguments) in `world_size` connected processes; return what each returns.

    An exception of a process is raised here, with its traceback.
    """
    port = free_port()
    receivers, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run_rank, args=(rank, world_size, port, sender, function, arguments))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    results = []
    for rank, (receiver, process) in enumerate(zip(receivers, processes, strict=True)):
        if not receiver.poll(seconds):
            for other in processes:
                other.kill()
            raise TimeoutError(f"rank {rank} takes longer than {seconds} s")
        try:
            error, result = receiver.recv()
        except EOFError:
            error, result = "it ended without a result", None
        process.join()
        if error:
            for other in processes:
                other.kill()
            raise RuntimeError(f"rank {rank}: {error}")
        results.append(result)
    return results


def run_rank(rank, world_size, port, sender, function, arguments):
    """What a process does."""
    os.environ |= environment_of(rank, world_size, port)
    from expire_span.runner import ranks

    error, result = None, None
    try:
        ranks.connect()
        result = function(rank, *arguments)
        ranks.disconnect()
    except BaseException:
        error = traceback.format_exc()
    sender.send((error, result))
    sender.close()


def forked_rank_commands(world_size, command, folder, during=None, extra=None, folders=None, seconds=120.0):
    """Run a command as all ranks of a group; return how each of them ended.

    Args:
        during: called with the processes once they have started.
        extra: further arguments of single ranks.
        folders: other folders of single ranks to run in.
    """
    port, folders = free_port(), folders or {}
    own_folders = [folders.get(rank, folder) for rank in range(world_size)]
    outputs = [[folder / f"rank{rank}-{stream}" for stream in ("stdout", "stderr")] for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        arguments = [*command, *(extra or {}).get(rank, [])]
        environment = environment_of(rank, world_size, port)
        target = (arguments, own_folders[rank], outputs[rank], environment)
        processes.append(forked_command.context.Process(target=forked_command.run_here, args=target))
        processes[-1].start()
    if during is not None:
        during(processes)
    start = time.perf_counter()
    for process in processes:
        process.join(max(0.0, seconds - (time.perf_counter() - start)))
        if process is processes[0]:  # torchrun ends the others, too, some time later
            seconds = min(seconds, time.perf_counter() - start + 5)
    for process in processes:
        process.kill()
        process.join()
    ended = []
    for process, paths in zip(processes, outputs, strict=True):
        texts = [path.read_text() for path in paths]
        ended.append(forked_command.Ended(process.exitcode, *texts, time.perf_counter() - start))
    return ended
