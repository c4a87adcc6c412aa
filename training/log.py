"""What a run writes down while it trains."""

import json
import math
import time
from collections import Counter
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data.files import InputError, whole_file
from training import distributed


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of a log.jsonl up to a step, without what a crash or a full disk has damaged."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            pass
    return lines


class Log:
    """log.jsonl, the progress bar's losses, and TensorBoard where it is installed.

    Rank 0 writes.
    """

    def __init__(self, out: Path, step: int, every: int):
        """out: the run's folder; step: where it stands; every: steps between two lines."""
        self.every, self.sums, self.count, self.since = every, {}, 0, time.perf_counter()
        self.counts = Counter()
        self.file = self.board = None
        self.announced: set[str] = set()  # losses whose rate was told
        if distributed.rank():
            return
        path = out / "log.jsonl"
        # resumed: what was logged after the checkpoint happens again
        kept = lines_until(path, step) if step and path.exists() else []
        with whole_file(path) as file:
            file.writelines(line + "\n" for line in kept)
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out / "tensorboard")
        except ImportError:
            pass

    def add(self, losses: dict[str, Tensor], bar: tqdm, step: int, last: bool, batch_size: int,
            measures: dict[str, Tensor], **values: float) -> None:
        """Called after every step; losses and measures stay on the device until a line is due.

        A line holds their means over the steps since the line before, and `values` as they are.
        Raises InputError for a loss that is not finite, or has the name of another number.
        """
        taken = sorted(losses.keys() & {"step", "pairs_per_s", *measures, *values})
        if taken:
            raise InputError(f"a loss cannot be called {taken[0]!r}: log.jsonl has another number "
                             "of that name; give it another one")
        for name, value in (losses | measures).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.counts[name] += 1  # an objective may begin between two lines
        self.count += 1
        if step % self.every and not last:
            return
        all_means = {name: round(total.item() / self.counts[name], 4)
                     for name, total in self.sums.items()}
        means = {name: all_means[name] for name in losses}
        if not all(map(math.isfinite, means.values())):
            raise InputError(f"the loss is no longer finite at step {step} ({means}); try a "
                             "smaller --lr or --grad-clip 1, or --precision fp32")
        # A gradient that overflows in fp16 is skipped by the scaler: its norm is no number.
        measured = {name: all_means[name] for name in measures if math.isfinite(all_means[name])}
        rate = self.count * batch_size / (time.perf_counter() - self.since)
        self.sums, self.count, self.since = {}, 0, time.perf_counter()
        self.counts.clear()
        if self.file and set(means) != self.announced:  # other losses: another rate
            self.announced, left = set(means), (bar.total - step) * batch_size / rate / 60
            bar.write(f"step {step}: {rate:.0f} pairs a second with {' + '.join(means)}; at this "
                      f"rate about {left:.1f} minutes to the end")
        bar.set_postfix(means | {"pairs/s": round(rate)} | measured)
        self.write({"step": step, **means, **measured, **{k: float(v) for k, v in values.items()},
                    "pairs_per_s": round(rate, 1)})

    def judged(self, line: dict) -> None:
        """The line of an epoch's end. The next line's rate is that of the steps after it."""
        self.write(line)
        self.count, self.since = 0, time.perf_counter()

    def write(self, line: dict) -> None:
        """One line of log.jsonl, {step, ...}; nothing on other ranks than 0."""
        if not self.file:
            return
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"{self.file.name} could not be written ({error.strerror}); make room "
                             "and continue with --resume")
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, line["step"])
