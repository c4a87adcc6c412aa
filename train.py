"""Train BLIP: one loop for pretraining and every finetuning.

    python train.py                     the tiny model on the built-in world, 5 minutes on a laptop
    python train.py --data train.json --val val.json --image-root DIR --preset base    real pairs
    python train.py retrieval --init runs/pretrain/checkpoint.pt     finetune for retrieval
    python train.py caption --init runs/pretrain/checkpoint.pt       finetune for captions
    python train.py vqa --init runs/pretrain/checkpoint.pt           answer questions
    python train.py nlvr2 --init runs/pretrain/checkpoint.pt         judge statements
    python train.py visdial --init runs/pretrain/checkpoint.pt       hold a dialog
    python train.py --resume            continue the run in --out
    python train.py --itc-weight 0      an ablation: switch a loss off
Every field of BLIPConfig and TrainConfig is a flag; `--help` lists them. In the run's folder:
log.jsonl (one line per logged step), checkpoint.pt (everything), best.pt (finetuning: the model
after the epoch that did best on the validation split), metrics.json and samples.png (at the end).
"""

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import checkpoints
import distributed
from blip import BLIP, BLIPConfig
from captioning import Decoding
from config import (
    FREE_ON_RESUME,
    TASKS,
    TrainConfig,
    alpha_at,
    learning_rate,
    objectives_at,
    objectives_of,
    parse,
    resolve,
)
from data import InputError, normalise
from distributed import print0
from eval import evaluate_captions, evaluate_pretraining, evaluate_retrieval
from logbook import Log
from report import exit_status, mean, print_numbers, write_numbers
from run import Run
from sheets import draw_sheet
from task_eval import evaluate_nlvr2, evaluate_visdial, evaluate_vqa
from tasks import MODELS


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast: auto says yes where the hardware multiplies it fast,
    which among CPUs means AMX (without, it measured four times slower than float32)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


@contextlib.contextmanager
def signals_noted() -> Iterator[list]:
    """Within it, SIGINT and SIGTERM put something into the list instead of ending the program."""
    noted = []
    before = {number: signal.signal(number, lambda *_: noted.append(True))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run) -> bool:
    """Train to the end -> True, or until a signal asks to stop -> False; either way the checkpoint
    is written."""
    config, model = run.config, run.model
    log = Log(run.out, run.step, config.log_every)
    net, objectives, stopping = None, None, False
    if config.compile:  # the ViT alone: it is most of the work, and its shapes never change
        model.vit.compile()
    model.train()
    saved = time.perf_counter()
    start = saved - run.seconds
    with signals_noted() as stop, tqdm(run.batches(), "training", run.steps, initial=run.step,
                                       disable=distributed.rank() > 0, unit="step") as bar:
        for micro_batches in bar:
            if objectives != objectives_at(config, run.step):
                objectives = objectives_at(config, run.step)
                model.set_objectives(objectives)
                net = distributed.wrap(model)  # again, because other parameters are trained now
            values = {"lr": learning_rate(config, run.step, run.steps_per_epoch),
                      "alpha": alpha_at(config, run.step, run.steps_per_epoch)}
            for group in run.optimizer.param_groups:
                group["lr"] = values["lr"]

            losses, keys = forward_backward(run, net, micro_batches, values["alpha"])
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            if model.twins():  # the other tasks' models have none
                model.update_momentum()
                model.enqueue(keys)
                model.clamp_temperature()
                values["temp"] = model.temp.detach()

            run.step += 1
            run.seconds = time.perf_counter() - start
            last = run.step == run.steps
            log.add(losses, bar, run.step, last, config.batch_size, **values,
                    minutes=round(run.seconds / 60, 3))
            # After each epoch of a finetuning, which may be the best one.
            chooses = (config.task != "pretrain" and run.sets.val is not None
                       and run.step % run.steps_per_epoch == 0)
            due = False
            if chooses:
                log.write(choose(run))
            # What the clock or a signal decides, all ranks must decide alike: they talk about it at
            # logged steps only, because talking waits for the device.
            if distributed.world_size() == 1 or run.step % config.log_every == 0:
                stopping = distributed.any_rank(bool(stop))
                due = distributed.any_rank(time.perf_counter() - saved > 60 * config.save_minutes)
            if run.step % config.save_every == 0 or due or chooses or stopping or last:
                run.save()
                saved = time.perf_counter()
            if stopping:
                break
    return run.step == run.steps


def forward_backward(run: Run, net: torch.nn.Module, micro_batches: list[dict],
                     alpha: float) -> tuple[dict, dict]:
    """Add up the gradients of a step's micro-batches -> losses, their mean; keys of all.

    A micro-batch is to a process what a process is to the group: its ITC columns are its own keys
    and the queue as it stands, its gradient is one part of the mean, and twins and queue change
    once, after the step. So 1 process x 2 micro-batches computes what 2 processes x 1 do.
    """
    config, device, count = run.config, run.device, len(micro_batches)
    weights, bf16 = config.weights(), use_bf16(config.precision, device)
    means, all_keys = {}, []
    for number, batch in enumerate(micro_batches):
        run.count(batch)
        inputs = inputs_of(run, batch, alpha)
        with distributed.no_sync(net, number < count - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                losses, keys = net(**inputs)
            (sum(weights.get(name, 1.0) * loss for name, loss in losses.items()) / count).backward()
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / count
        all_keys.append(keys)
    return means, {name: torch.cat([keys[name] for keys in all_keys]) for name in all_keys[0]}


def inputs_of(run: Run, batch: dict, alpha: float) -> dict:
    """What the model's forward wants of a batch: its tensors, on the device."""
    inputs = {name: value.to(run.device, non_blocking=True) for name, value in batch.items()
              if isinstance(value, torch.Tensor)}
    inputs["image"] = normalise(inputs["image"])
    if isinstance(run.model, BLIP):
        image_ids = inputs.pop("image_id")
        if run.config.task != "retrieval":  # pretraining does not know which texts share an image
            image_ids = None
        inputs |= {"alpha": alpha, "image_ids": image_ids, "prompt_length": run.prompt_length,
                   "all_negatives": run.config.all_negatives}
    return inputs


def judge(run: Run, dataset: Dataset, baselines: bool = True) -> tuple[dict, list]:
    """What the run's task is judged by -> the numbers, and the sections of a sheet. baselines:
    also, in tasks.py's tasks, what a model that sees nothing scores."""
    c = run.config
    shared = (run.model, run.tokenizer, dataset, run.device)
    how = Decoding(prompt=c.prompt, min_length=c.min_length, max_length=c.max_length)
    if c.task == "vqa":
        return evaluate_vqa(*shared, run.sets.texts, run.sets.train if baselines else None,
                            c.max_tokens, blank=baselines)[:2]
    if c.task in MODELS:
        return {"nlvr2": evaluate_nlvr2, "visdial": evaluate_visdial}[c.task](
            *shared, c.max_tokens, baselines)[:2]
    if c.task == "retrieval":
        return evaluate_retrieval(*shared, c.eval_top_k, c.max_tokens)
    if c.task == "caption":
        return evaluate_captions(*shared, how, run.sets.texts)[:2]
    return evaluate_pretraining(*shared, c.eval_top_k, c.max_tokens, how, run.sets.texts)


def choose(run: Run) -> dict:
    """Judge the epoch on the validation split; keep its model in best.pt if it is the best so far
    -> what goes into the log. All ranks call it."""
    score = selection_score(run.config.task, judge(run, run.sets.val, baselines=False)[0])
    if score > run.best:
        run.best = score
        if distributed.rank() == 0:
            checkpoints.save(run.out / "best.pt", run.weights() | {"step": run.step})
    run.model.train()
    return {"step": run.step, "val_score": round(score, 5), "best": round(run.best, 5)}


def selection_score(task: str, numbers: dict) -> float:
    """By what the best epoch is chosen: accuracy, MRR, CIDEr, or the mean of the six recalls that
    count."""
    if task in MODELS:
        return numbers["mrr" if task == "visdial" else "accuracy"]
    if task == "caption":
        return numbers["cider"]
    suffix = "_rerank" if numbers["top_k"] else ""
    return mean(numbers[f"{way}_r{k}{suffix}"] for way in ("t2i", "i2t") for k in (1, 5, 10))


def evaluate(run: Run) -> dict:
    """The final judgement of the best model, which all ranks share -> the numbers, which rank 0
    writes to metrics.json beside samples.png, and prints."""
    numbers = {"train_minutes": round(run.seconds / 60, 2), "steps": run.step}
    counts = distributed.gather([(run.broken, run.seen)])
    broken = sum((broken for broken, _ in counts), Counter())
    if broken:
        numbers |= {"train_broken": broken.total(), "train_broken_by": dict(broken),
                    "train_seen": sum(seen for _, seen in counts)}
    best = run.out / "best.pt"
    distributed.barrier()
    if best.exists():
        state = checkpoints.load(best)
        run.model.load_state_dict(state["model"])
        numbers["best_step"] = state["step"]
        print0(f"the model that did best in validation is that of step {state['step']}")
    if run.sets.final is not None:
        found, sections = judge(run, run.sets.final)
        numbers |= found
    if distributed.rank() == 0:
        if run.sets.final is not None:
            draw_sheet(run.out / "samples.png", sections)
            print_numbers(found)
        if broken:
            reasons = ", ".join(f"{count} {reason}" for reason, count in broken.items())
            print(f"{broken.total()} of {numbers['train_seen']} images could not be read "
                  f"and were replaced by others: {reasons}")
        write_numbers(run.out / "metrics.json", numbers, asdict(run.config))
    return numbers


def start(arguments: list[str]) -> Run:
    """Parse, set up the run's folder, build or resume the run."""
    given, resume = parse(arguments, __doc__)
    task_out = TASKS[given.get("task", TrainConfig.task)].get("out", TrainConfig.out)
    path = Path(given.get("out", task_out)) / "checkpoint.pt"
    state = source = init = None
    # torchrun --max-restarts starts the same command again after a crash.
    resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and path.exists()
    if resume:
        state = checkpoints.load(path)
        if "optimizer" not in state:
            raise InputError(f"{path} holds a model but no run to continue")
        saved = asdict(TrainConfig(**state["train_config"])) | state["model_config"]
        changed = [f"--{name.replace('_', '-')}" for name in given.keys() - FREE_ON_RESUME
                   if given[name] != saved[name]]
        if changed:
            raise InputError(f"{', '.join(changed)} cannot change when a run is resumed; leave it "
                             "out, or start a new run")
        kept = {name: given[name] for name in given.keys() & FREE_ON_RESUME}
        config = TrainConfig(**{**state["train_config"], **kept, "out": str(path.parent)})
        model_config = BLIPConfig(**state["model_config"])
    else:
        if given.get("init"):
            task = given.get("task", TrainConfig.task)
            *source, settings = checkpoints.open_model(
                given["init"], objectives_of(task), given.get("vocab", ""),
                kinds=(BLIP, MODELS[task]) if task in MODELS else (BLIP,))
            init = {"model_config": asdict(source[0].config), "train_config": settings}
        try:
            model_config, config = resolve(given, init)
        except ValueError as error:
            raise InputError(str(error))
    device = distributed.init(config.device)
    chunks = distributed.world_size() * config.accumulate
    if config.batch_size % chunks:
        raise InputError(f"--batch-size {config.batch_size} is not a multiple of {chunks}, which "
                         f"are {distributed.world_size()} processes x {config.accumulate} "
                         "micro-batches")
    run = Run(model_config, config, device, state, source)
    if distributed.rank() == 0:
        prepare_folder(run.out, resume)
    online = sum(p.numel() for p in {id(p): p for g in run.optimizer.param_groups
                                     for p in g["params"]}.values())
    print0(f"model    {asdict(run.model.config)}\ntraining {asdict(config)}")
    print0(f"{online / 1e6:.2f}M parameters without twins, {len(run.train_set)} pairs, {run.steps} "
           f"steps, on {device} ({'bf16' if use_bf16(config.precision, device) else 'fp32'}), "
           f"writing to {config.out}")
    print0(f"batch {config.batch_size} = {distributed.world_size()} processes x "
           f"{config.accumulate} micro-batches x {config.batch_size // chunks} pairs, learning "
           f"rate up to {config.lr:g}")
    if run.sets.final is None:
        print0("no --val given: there will be no evaluation")
    return run


def prepare_folder(out: Path, resume: bool) -> None:
    """Make the run's folder. An earlier run in it is moved aside, not overwritten."""
    try:
        if not resume and (out / "checkpoint.pt").exists():
            aside = next(p for n in range(1, 10000) if not (p := Path(f"{out}.old{n}")).exists())
            out.rename(aside)
            print(f"{out} holds an earlier run: moved to {aside} (--resume would have continued "
                  "it)")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run's folder {out} cannot be made ({error}); give another --out")


def whole_run(arguments: list[str]) -> int:
    """Set up, train, evaluate -> exit status."""
    run = start(arguments)
    if not train(run):
        print0(f"stopped at step {run.step} of {run.steps}; continue with: python train.py "
               f"--resume --out {run.config.out}")
        return 130
    print0(f"trained for {run.seconds / 60:.1f} minutes; evaluating")
    evaluate(run)
    print0("wrote " + f"{run.out}/" + ", ".join(
        p.name for p in sorted(run.out.iterdir()) if p.is_file()))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    return exit_status(lambda: whole_run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
