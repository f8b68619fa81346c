"""What the losses of several processes are divided by."""

from detectron2.utils import comm


def mean_per_process(count: int) -> float:
    """How many boxes or masks a process has in the mean, at least one.

    Args:
        count: how many this one has.
    """
    counts = comm.all_gather(count)
    return max(sum(counts) / len(counts), 1.0)
