"""Several processes that train one model together, forked from one that has everything imported."""

import multiprocessing
import os
import socket
import traceback

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["expire_span.runner.cli", "expire_span.runner.train", "tiny_config"])


def run_ranks(world_size, function, *arguments, seconds=120.0):
    """Call function(rank, *arguments) in `world_size` connected processes; return what each returns.

    An exception of a process is raised here, with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **address}
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
