"""Memories are hidden states with an age; a mechanism decides how long each of them lives.

With distance = t - i, every model is the same attention with the same soft mask m (section 5.1: "the only difference
among them is how memories are handled"):

    m = clamp(1 + (span - distance) / ramp, 0, 1)        a' = softmax(score + log m)        distance >= 1

    | model          | span                                | its shape             | ramp | what is kept         |
    | -------------- | ----------------------------------- | --------------------- | ---- | -------------------- |
    | Transformer-XL | L                                   | one number            | 1    | the last L           |
    | Adaptive-Span  | z + 1, learned                      | per head              | R    | the last max z + R,  |
    |                |                                     |                       |      | but at most L        |
    | Expire-Span    | e_i, predicted from h_i             | per sample and memory | R    | those with m > 0     |
    | Compressive    | L; L + c (C + 1) for a pooled state | one number per kind   | 1    | the last L, C pooled |

In mechanisms from after the paper memories also get less weight as they age, by a bias of each: score + bias + log m;
or some are evicted before their span is over.

    | model                  | span                       | bias                              | what is kept        |
    | ---------------------- | -------------------------- | --------------------------------- | ------------------- |
    | Forgetting Transformer | L                          | the sum of log f_j over i < j < t | above a threshold   |
    | Expire-Span with gates | e_i, predicted from h_i    | the same                          | both conditions     |
    | ALiBi                  | L                          | -slope (t - i), per head          | the last L          |
    | StreamingLLM           | L; endless for the first S | 0                                 | the last L, S sinks |
    | key norm, TOVA, random | L                          | 0                                 | N of the last L     |

What is kept follows from the span: a memory is deleted, for each sample and layer, once m = 0 for the first query of
the next block. Expire-Span may hold more than L, since a memory with e_i near L fades over R timesteps more (section
4.1 counts R - 1 + floor(e_i) of them).
"""

from .adaptive_span import AdaptiveSpan
from .alibi import Alibi
from .compressive import Compressive
from .expire_fox import ExpireFox
from .expire_span import ExpireSpan
from .fox import Fox
from .key_norm import KeyNorm
from .mechanism import Mechanism
from .packed import Memory
from .random_eviction import RandomEviction
from .streaming import Streaming
from .tova import Tova
from .trans_xl import TransXL

__all__ = [
    "AdaptiveSpan",
    "Alibi",
    "Compressive",
    "ExpireFox",
    "ExpireSpan",
    "Fox",
    "KeyNorm",
    "Mechanism",
    "Memory",
    "RandomEviction",
    "Streaming",
    "Tova",
    "TransXL",
]
