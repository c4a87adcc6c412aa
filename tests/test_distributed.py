"""Two processes on gloo against the same arithmetic in one; crashes, restarts and resuming."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SMALL, equal_states, toy_batch, toy_model

import eval as eval_command
import train
from training import checkpoints, distributed

WORLD, EACH = 2, 3


def rank_batch(rank: int) -> dict:
    """Rows of this rank, cropped to a length of its own, with an image id for each."""
    rows = slice(rank * EACH, (rank + 1) * EACH)
    batch = {name: x[rows] for name, x in toy_batch(WORLD * EACH, 9).items()}
    longest = (9, 6)[rank]
    batch["ids"], batch["mask"] = batch["ids"][:, :longest], batch["mask"][:, :longest]
    return batch | {"image_ids": torch.tensor([[5, 6, 7], [8, 5, 9]])[rank]}


def draw_first(weights: torch.Tensor, count: int) -> torch.Tensor:
    """In place of torch.multinomial: the first column that may be drawn."""
    return (weights > 0).float().argmax(1, keepdim=True)


def itm_gradient(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    torch.multinomial = draw_first
    model = toy_model()
    model.set_objectives(("itm",))
    losses, _ = model(**rank_batch(rank), finetuning=True, all_negatives=True)
    losses["itm"].backward()
    gradient = model.vit.patch_embed.weight.grad / WORLD
    dist.all_reduce(gradient)  # the mean over ranks, as DistributedDataParallel takes it
    if rank == 0:
        torch.save(gradient, out)
    distributed.finish()


def test_negatives_from_all_ranks_with_gradient_through_the_images(tmp_path):
    mp.spawn(itm_gradient, (29543, str(tmp_path / "g.pt")), WORLD)
    model, batches = toy_model(), [rank_batch(rank) for rank in range(WORLD)]
    image, image_ids = (torch.cat([b[name] for b in batches]) for name in ("image", "image_ids"))
    texts = [(b["ids"][i:i + 1], b["mask"][i:i + 1]) for b in batches for i in range(EACH)]
    kv = model.med.project(model.vit(image))
    def score(i, t):
        return model.match(kv.select(torch.tensor([i])), *texts[t])
    losses = []
    for rank in range(WORLD):
        logits, matched = [], []
        for own in range(rank * EACH, (rank + 1) * EACH):
            other = next(j for j in range(WORLD * EACH) if image_ids[j] != image_ids[own])
            logits += [score(own, own), score(own, other), score(other, own)]
            matched += [1, 0, 0]
        losses.append(torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(matched)))
    expected, = torch.autograd.grad(sum(losses) / WORLD, model.vit.patch_embed.weight)
    assert torch.allclose(torch.load(tmp_path / "g.pt"), expected, atol=1e-6)


def wait_for_a_slow_rank(rank: int, port: int) -> None:
    """Tensors may wait for one second, as NCCL's for ten minutes; rank 0 works for three."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    init = dist.init_process_group
    def init_impatiently(*arguments, **options):
        init(*arguments, timeout=timedelta(seconds=1), **options)
    dist.init_process_group = init_impatiently
    distributed.init(torch.device("cpu"))
    for wait in (distributed.barrier, lambda: distributed.gather([rank])):
        if rank == 0:
            time.sleep(3)
        wait()
    distributed.finish()


@pytest.mark.slow
def test_ranks_wait_for_a_slow_one():
    mp.spawn(wait_for_a_slow_rank, (29547,), WORLD)


# ---- whole runs under torchrun ----

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
STARTED: list[subprocess.Popen] = []


def torchrun(*arguments, processes: int = 2, options=()) -> subprocess.Popen:
    """Start it on a free port; its output goes to a file, which `finish` shows if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         f"--master_port={port}", *options, *map(str, arguments)], cwd=ROOT, env=ONE_THREAD,
        stdout=out, stderr=subprocess.STDOUT, text=True)
    process.out = out
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            kill(process)


def finish(process: subprocess.Popen) -> str:
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        kill(process)
    process.out.seek(0)
    out = process.out.read()
    assert process.returncode == 0, out[-6000:]
    return out


def kill(process: subprocess.Popen) -> None:
    """torchrun, then its workers, with -9: nobody gets to say goodbye."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    process.kill()
    for child in children.stdout.split():
        try:
            os.kill(int(child), signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def test_two_processes_compute_what_two_micro_batches_do(tmp_path):
    """The whole run: order, mean gradient, queues, momentum, schedule, and evaluation. ITM is off,
    because its negatives are drawn on each rank by itself."""
    flags = [*SMALL, "--scenes", "48", "--itm-weight", "0", "--device", "cpu"]
    out = finish(torchrun("train.py", *flags, "--out", tmp_path / "two"))
    assert "batch 8 = 2 processes x 1 micro-batches x 4 pairs" in out
    torch.set_num_threads(1)
    assert train.main([*flags, "--out", str(tmp_path / "one"), "--accumulate", "2"]) == 0
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 6 and len(two["rng"]) == 2
    # 4 steps with ITC, 8 keys each
    assert one["model"]["queue_ptr"] == two["model"]["queue_ptr"] == (4 * 8) % 20
    for name, value in one["model"].items():
        assert torch.allclose(value.float(), two["model"][name].float(), atol=1e-5), name
    numbers = [json.loads((tmp_path / name / "metrics.json").read_text())
               for name in ("one", "two")]
    for name in ("t2i_r1", "i2t_r5", "t2i_r5_rerank", "cider", "itm_swap", "images"):
        assert numbers[0][name] == pytest.approx(numbers[1][name], abs=1e-6), name


@pytest.mark.slow
def test_two_nodes_compute_what_one_does(tmp_path):
    """Two torchrun agents, as on two machines, one process each."""
    flags = ["train.py", *SMALL, "--scenes", "48", "--itm-weight", "0", "--device", "cpu"]
    finish(torchrun(*flags, "--out", tmp_path / "one"))
    agents = [torchrun(*flags, "--out", tmp_path / "two", processes=1, options=[
        "--nnodes=2", f"--node_rank={n}", "--master_addr=127.0.0.1", "--master_port=29531"])
        for n in (0, 1)]
    for agent in agents:
        finish(agent)
    assert equal_states(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("command", [
    "retrieval", pytest.param("caption", marks=pytest.mark.slow)])
def test_evaluation_is_split_and_gives_the_same_numbers(tmp_path, pretrained, command):
    torch.set_num_threads(1)
    state = checkpoints.load(pretrained)
    state["model"]["itm_head.weight"] *= 1e4  # so that re-ranking changes the order
    checkpoints.save(tmp_path / "c.pt", state)
    asked = ["eval.py", command, "--checkpoint", tmp_path / "c.pt", "--size", "150",
             "--device", "cpu"]
    finish(torchrun(*asked, "--out", tmp_path / "two"))
    assert eval_command.main([*map(str, asked[1:]), "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())
                for name in ("one", "two"))
    assert one.pop("settings") and two.pop("settings")
    assert one == two and one["images"] == 150


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_every_finetuning_runs_on_two_processes(tmp_path, pretrained, task):
    flags = ["--scenes", "32", "--epochs", "2", "--batch-size", "8", "--eval-size", "12",
             "--eval-top-k", "3", "--device", "cpu", "--save-minutes", "0", "--log-every", "2"]
    flags += ["--all-negatives", "true"] if task == "retrieval" else ["--prompt", "a"]
    finish(torchrun("train.py", task, "--init", pretrained, *flags, "--out", tmp_path / "a"))
    best = checkpoints.load(tmp_path / "a" / "best.pt")
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "val_score" in line] == [4, 8]
    assert best["step"] in (4, 8) and (tmp_path / "a" / "metrics.json").exists()


@pytest.mark.parametrize("task", [
    "vqa", *(pytest.param(task, marks=pytest.mark.slow) for task in ("nlvr2", "visdial"))])
def test_every_task_learns_the_same_on_two_processes(tmp_path, pretrained, task):
    torch.set_num_threads(1)
    # Small steps: a key's bias has no gradient but rounding noise, of which Adam makes whole steps.
    flags = [task, "--init", str(pretrained), "--scenes", "24", "--batch-size", "8",
             "--eval-size", "4", "--device", "cpu", "--max-tokens", "30", "--warmup-steps", "100",
             "--precision", "fp32"]
    finish(torchrun("train.py", *flags, "--out", tmp_path / "two"))
    assert train.main([*flags, "--out", str(tmp_path / "one"), "--accumulate", "2"]) == 0
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 3
    assert one["best"] == pytest.approx(two["best"]) and (tmp_path / "two/best.pt").exists()
    for name, value in one["model"].items():
        assert torch.allclose(value, two["model"][name], atol=1e-5), name
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())
                for name in ("one", "two"))
    name = "mrr" if task == "visdial" else "accuracy"
    assert one[name] == pytest.approx(two[name]) and one[f"blank_{name}"] == two[f"blank_{name}"]


@pytest.mark.slow
def test_resuming_on_another_number_of_processes_sees_the_same_samples(tmp_path):
    flags = [*SMALL, "--scenes", "64", "--epochs", "2", "--device", "cpu", "--itm-weight", "0"]
    finish(torchrun("train.py", *flags, "--out", tmp_path / "two", "--save-every", "5",
                    "--keep", "9"))
    kept = sorted(p.name for p in (tmp_path / "two").glob("checkpoint-*.pt"))
    assert kept == [f"checkpoint-{step:08d}.pt" for step in (5, 10, 15, 16)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two" / kept[1]).rename(tmp_path / "one" / "checkpoint.pt")
    torch.set_num_threads(1)
    assert train.main(["--resume", "--out", str(tmp_path / "one"), "--accumulate", "2"]) == 0
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pt")["model"]
                for name in ("one", "two"))
    for name, value in one.items():  # no dropout, no mining: the same samples, the same end
        assert torch.allclose(value.float(), two[name].float(), atol=1e-5), name


def kill_and_resume(folder: Path, kills: int, seed: int, processes: int) -> None:
    """A run that is killed at random moments, many of them within the writing of a checkpoint, and
    resumed each time ends exactly where one that never was does."""
    flags = [*SMALL, "--scenes", "400", "--epochs", "2", "--dropout", "0.1", "--save-every",
             "1", "--eval-size", "8", "--device", "cpu"]
    def start(out, *more):
        return torchrun("train.py", *more, "--out", folder / out, processes=processes)
    finish(start("whole", *flags))
    rng, checkpoint, more = random.Random(seed), folder / "part" / "checkpoint.pt", flags
    for _ in range(kills):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start("part", *more)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        kill(process)
        more = ["--resume"]
    finish(start("part", "--resume"))
    assert equal_states(folder / "whole", folder / "part")


@pytest.mark.slow
def test_killed_and_resumed_ends_the_same(tmp_path):
    kill_and_resume(tmp_path, 2, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_many_times_and_resumed_ends_the_same(tmp_path, processes):
    for seed in range(3):
        kill_and_resume(tmp_path / str(seed), 5, seed, processes)


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again(tmp_path):
    """torchrun --max-restarts runs the same command again, which finds its checkpoint."""
    flags = [*SMALL, "--scenes", "160", "--epochs", "2", "--save-every", "5", "--device", "cpu"]
    process = torchrun("train.py", *flags, "--out", tmp_path / "a",
                       options=["--max-restarts=2"])
    while not (tmp_path / "a" / "checkpoint.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                           text=True).stdout.split()[0]
    os.kill(int(child), signal.SIGKILL)
    finish(process)
    log = [json.loads(line)["step"]
           for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert log == list(range(2, 41, 2)) and (tmp_path / "a" / "metrics.json").exists()
