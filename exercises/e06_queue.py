"""6. The queue (BLIP sec. 3.2; MoCo sec. 3.2).

ITC wants many negatives, more than a batch holds. So the momentum features of the last batches
are kept in a ring of fixed size. New features overwrite the oldest ones. The pointer says where
the next one goes; behind the last slot comes the first one again.
"""

from torch import Tensor


def enqueue(queue: Tensor, pointer: int, features: Tensor) -> int:
    """Write the features over the oldest slots, in place.

    queue (Q, E), features (B, E), any B, also B > Q: then only the last Q of them can stay.
    -> the new pointer, in 0 .. Q - 1. With B > Q keep the last Q features and put the first of
    those at the pointer, which does not move then.
    """
    # TODO: the slots pointer, pointer + 1 ... wrapped at Q; write; return the new pointer.
    raise NotImplementedError


HINT = """The slots are (pointer + torch.arange(B)) % Q. Cut first: features = features[-Q:]. The
new pointer wraps as well."""
