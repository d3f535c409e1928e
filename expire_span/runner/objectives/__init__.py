"""What a training step minimizes. An objective is a class with these members, chosen by the kind of task:

__init__(task, config, device, averager, timer)
                                            reads the training data; refuses what cannot work, by ValueError
next_block(model, states) -> block          the next block to learn from, of this process's streams
loss(model, block, states, index, span_loss_scale, progress) -> loss
                                            one micro-batch's share of the block's loss: replaces states[index], and
                                            adds its metrics to the averager; progress goes from 0 to 1 in training
summarize(means) -> metrics                 the metrics of a logging interval
advance_curriculum()                        tells the task how well the model has done since the last call
time_metrics(counts, milliseconds) -> metrics
                                            perf/ms_per_... and perf/tokens_per_second, from what the timer measured;
                                            beside its own phases there is "update", a whole training step
evaluate(model, task, split, config, device) -> metrics             a static method
blocks                                      number of blocks processed so far
state_dict()                                what all processes have in common
streams_state_dict()                        what belongs to this process's streams, tensors (B, ...)
load_state_dict(state, streams_state)
"""

from typing import Any

from expire_span.tasks.base import RLTask, Task

from .actor_critic import ActorCritic
from .prediction import Prediction


def objective_class(task: Task | RLTask) -> Any:
    """Actor-critic for tasks in which the model acts, prediction for all others; each takes its own kind of task."""
    return ActorCritic if isinstance(task, RLTask) else Prediction
