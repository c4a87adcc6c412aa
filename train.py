"""Train BLIP: one loop for pretraining and every finetuning.

    python train.py                     the tiny model on the picture world, minutes on a laptop
    python train.py --data train.json --val val.json --image-root DIR --preset base    real pairs
    python train.py retrieval --init runs/pretrain/checkpoint.pt     finetune for retrieval
    python train.py caption --init runs/pretrain/checkpoint.pt       finetune for captions
    python train.py vqa --init runs/pretrain/checkpoint.pt           answer questions
    python train.py nlvr2 --init runs/pretrain/checkpoint.pt         judge statements
    python train.py visdial --init runs/pretrain/checkpoint.pt       rank the answers in a dialog
    python train.py --resume            continue the run in --out
    python train.py --itc-weight 0      an ablation: switch a loss off

The fields of BLIPConfig and TrainConfig (config.py) are flags; `--help` lists them. In the run's
folder: log.jsonl (one line per logged step), checkpoint.pt (everything), best.pt (finetuning: the
model after the epoch that did best on the validation split), metrics.json, samples.png and
curves.png (at the end).
"""

import math
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from config import TrainConfig, alpha_at, learning_rate, objectives_at
from data.datasets import some_pictures
from data.files import InputError, named_files, read_json, refuse_own_files
from data.text import Tokenizer
from reports.curves import draw_curves, read_log
from reports.numbers import print_highlights, print_numbers, write_numbers
from reports.sheets import draw_sheet
from tasks.registry import TASKS, preset_settings
from tasks.task import EvalSettings, Evaluation
from training import checkpoints, devices, distributed, plan
from training.diagnostics import Diagnostics, chance_levels, final_lines, share_of_equal
from training.distributed import print0
from training.folders import begin, prepare_folder
from training.log import Log
from training.precision import autocast, evaluation_precision
from training.program import exit_status, signals_noted
from training.reach import (
    freeze_unreached,
    require_reached,
    require_read_weights,
    require_same_losses,
)
from training.run import Run
from training.settings import FREE_ON_RESUME, flag_name, flags_of, parse, resolve
from training.vocabulary import texts_of

# ---- the loop ------------------------------------------------------------------------------------

@devices.failures_explained()
def train(run: Run) -> bool:
    """Train to the end -> True, or until a signal asks to stop -> False.

    Either way the checkpoint is written.
    """
    config, model = run.config, run.model
    log = Log(run.out, run.step, config.log_every)
    diagnostics = Diagnostics(model)
    net, objectives, expected = None, None, set()  # expected: names of the losses
    if config.compile:
        devices.compile_forward(model, run.device)
    model.train()
    saved = time.perf_counter()
    began = saved - run.seconds
    with signals_noted() as signals, tqdm(run.batches(), "training", run.steps, initial=run.step,
                                          disable=distributed.rank() > 0, unit="step") as bar:
        for micro_batches in bar:
            lr = learning_rate(config, run.step, run.steps_per_epoch)
            alpha = alpha_at(config, run.step, run.steps_per_epoch)
            if objectives != objectives_at(config, run.step):
                first, objectives = objectives is None, objectives_at(config, run.step)
                expected = begin_objectives(run, objectives, first,
                                            run.inputs(micro_batches[0], alpha))
                net = distributed.wrap(model)  # again, because other parameters are trained now
            for group in run.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)  # a group of your own may have one

            losses, keys = forward_backward(run, net, micro_batches, alpha)
            require_same_losses(losses, expected, run.step)
            run.scaler.unscale_(run.optimizer)  # (the scaler acts with --precision fp16 alone)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(),
                                                       config.grad_clip or math.inf)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            # After the optimizer's step (BLIP sec. 3.2; MoCo, algorithm 1). Other models: nothing.
            model.update_momentum()
            model.enqueue(keys)
            model.clamp_temperature()

            run.step += 1
            run.seconds = time.perf_counter() - began
            values = {"lr": lr, "alpha": alpha, "minutes": round(run.seconds / 60, 3)}
            if hasattr(model, "temp"):
                values["temp"] = model.temp.detach().mean()  # (of one for each direction, too)
            log.add(losses, bar, run.step, run.step == run.steps, config.batch_size,
                    diagnostics.take(grad_norm), **values)
            if ends_an_epoch_to_judge(run):
                log.judged(judge_epoch(run))
            stopping, due = decide_together(run, signals, saved)
            if due:
                run.save()
                saved = time.perf_counter()
            if stopping:
                break
    return run.step == run.steps


def begin_objectives(run: Run, objectives: tuple[str, ...], first: bool, inputs: dict) -> set[str]:
    """Compute these objectives from now on; freeze what they do not reach -> their losses.

    first: of the run; then every parameter must be reached by one of BLIP's objectives.
    """
    with autocast(run.device, run.precision):  # as a step: it fits where a step fits
        if first:
            require_reached(run.model, run.trainable, inputs)
        run.model.set_objectives(objectives)
        losses = freeze_unreached(run.model, run.trainable, inputs, run.weight_of)
    require_read_weights(run.config, losses)
    return losses


def forward_backward(run: Run, net: torch.nn.Module, micro_batches: list[dict],
                     alpha: float) -> tuple[dict, dict]:
    """Add up the gradients of a step's micro-batches -> losses, their mean; keys of all.

    A micro-batch counts as much as a process: its ITC columns are its own keys and the queue as it
    stands, its gradient is one part of the mean, and twins and queue change once, after the step.
    So 1 process x 2 micro-batches computes what 2 processes x 1 do.
    """
    count, means, all_keys = len(micro_batches), {}, []
    for number, batch in enumerate(micro_batches):
        with distributed.no_sync(net, number < count - 1):
            with autocast(run.device, run.precision):
                losses, keys = net(**run.inputs(batch, alpha))
            total = sum(run.weight_of(name) * loss for name, loss in losses.items())
            run.scaler.scale(total / count).backward()
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / count
        all_keys.append(keys)
    return means, {name: torch.cat([keys[name] for keys in all_keys]) for name in all_keys[0]}


def ends_an_epoch_to_judge(run: Run) -> bool:
    """Whether this step ends an epoch of a finetuning, which may be the best one."""
    judged = run.task.score is not None and run.datasets.val is not None
    return judged and run.step % run.steps_per_epoch == 0


def decide_together(run: Run, signals: list, saved: float) -> tuple[bool, bool]:
    """Whether to stop after this step, and whether a checkpoint is due; the same on all ranks.

    What the clock or a signal says, ranks must agree on. They talk about it after every step (1.6
    ms between two processes): torchrun kills a rank 30 seconds after a signal, steps may be long.
    """
    late = time.perf_counter() - saved > 60 * run.config.save_minutes
    asked = distributed.gather([(bool(signals), late)])
    stopping, late = (any(flags) for flags in zip(*asked))
    due = (run.step % run.config.save_every == 0 or run.step == run.steps or stopping or late
           or ends_an_epoch_to_judge(run))
    return stopping, due


# ---- judging -------------------------------------------------------------------------------------

def judge_epoch(run: Run) -> dict:
    """Judge the model on the validation split; keep it in best.pt if it is the best so far.

    Returns what goes into the log. All ranks call it.
    """
    run.require_finite()
    settings = EvalSettings(baselines=False)
    with evaluation_precision(run.config.precision, run.device):
        evaluation = run.task.evaluate(run.trained_model(), run.datasets.val, settings)
    score = run.task.score(evaluation.numbers)
    if score > run.best:
        run.best = score
        if distributed.rank() == 0:
            checkpoints.save(run.out / "best.pt", run.weights() | {"step": run.step})
    run.model.train()
    return {"step": run.step, "val_score": round(score, 5), "best": round(run.best, 5)}


def best_of(run: Run) -> dict | None:
    """The content of best.pt, if it is this run's."""
    path = run.out / "best.pt"
    if not path.exists():
        return None
    best = checkpoints.load(path)
    is_own = best.get("run_id", run.run_id) == run.run_id
    return best if is_own else None


def evaluate(run: Run) -> Evaluation:
    """The final judgement of the best model, shared out over all ranks.

    Rank 0 writes its numbers to metrics.json, its sheet to samples.png and the curves.
    """
    numbers = {"train_minutes": round(run.seconds / 60, 2), "steps": run.step}
    counts = distributed.gather([(run.broken, run.seen)])
    broken = sum((broken for broken, _ in counts), Counter())
    if broken:
        numbers |= {"train_broken": broken.total(), "train_broken_by": dict(broken),
                    "train_seen": sum(seen for _, seen in counts)}
    distributed.barrier()
    best = best_of(run)
    if best:
        with checkpoints.understood(run.out / "best.pt"):
            run.model.load_state_dict(best["model"])
            numbers["best_step"] = best["step"]
    evaluation = Evaluation({}, [])
    if run.datasets.final is not None:
        # The world asks something else in each epoch: also a resumed run counts the last one's.
        run.datasets.train.set_epoch(run.config.epochs - 1)
        settings = EvalSettings(training=run.datasets.train)
        with evaluation_precision(run.config.precision, run.device):
            evaluation = run.task.evaluate(run.trained_model(), run.datasets.final, settings)
    if distributed.rank() == 0:
        write_numbers(run.out / "metrics.json", numbers | evaluation.numbers,
                      asdict(run.config) | {"model": asdict(run.model.config), "code": run.code,
                                          "processes": distributed.world_size(),
                                          "precision": run.precision})
        if evaluation.sections:
            draw_sheet(run.out / "samples.png", evaluation.sections)
        log = log_of(run)
        if log:
            draw_curves(run.out / "curves.png", {run.out.name: log}, chances(run))
    return Evaluation(numbers | evaluation.numbers, evaluation.sections)


# ---- set up --------------------------------------------------------------------------------------

def start(given: dict, resume: bool = False) -> Run:
    """Set up the run's folder, build or resume the run. Raises InputError.

    given: what differs from the task's settings, by the names of TrainConfig's and BLIPConfig's
    fields, for instance {"task": "caption", "init": "model.pt", "epochs": 2}.
    """
    task = given.get("task", "pretrain")
    out = Path(given.get("out", preset_settings(task, "base").get("out", TrainConfig.out)))
    state = checkpoints.load(out / "checkpoint.pt") if resume else None
    settings = state["train_config"] | given if state else given
    device = devices.start(settings.get("device", TrainConfig.device))
    # torchrun --max-restarts starts the same command again after a crash.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    run_id = distributed.from_rank_0(lambda: begin(out, state, restarted))
    if restarted and not resume and (out / "checkpoint.pt").exists():
        state = checkpoints.load(out / "checkpoint.pt")
        if state.get("run_id") != run_id:  # an earlier run's, which was to be moved aside
            state = None
    source = None
    if state:
        with checkpoints.understood(out / "checkpoint.pt"):
            model_config, config = resumed_config(given, state, out)
    else:
        model_config, config, source = new_config(given)
    chunks = distributed.world_size() * config.accumulate
    if config.batch_size % chunks:
        raise InputError(f"--batch-size {config.batch_size} is not a multiple of {chunks}, which "
                         f"are {distributed.world_size()} processes x {config.accumulate} "
                         "micro-batches")
    if task_needs_negatives(config) and config.batch_size == chunks:
        raise InputError(f"--batch-size {config.batch_size} leaves one pair to each process and "
                         "micro-batch, and ITM needs a second one as a negative; give a larger "
                         "one, or a smaller --accumulate")
    refuse_own_files(files_of(config), config.out)
    run = Run(model_config, config, device, state, source, given, run_id)
    if not state:
        refuse_own_files(some_pictures(run.datasets.train), config.out)
    if distributed.rank() == 0:
        prepare_folder(run.out, resume=state is not None)
    return run


def files_of(config: TrainConfig) -> list[str]:
    """The files and the folder that a run reads, by its settings."""
    files = [*named_files(config.data), *named_files(config.val), config.image_root, config.vocab,
             config.init, config.init_vit, config.init_text, config.answers]
    return [file for file in files if file]


def task_needs_negatives(config: TrainConfig) -> bool:
    """Whether ITM takes its negatives from the pairs of one process and micro-batch."""
    task = TASKS[config.task]
    from_all = config.all_negatives or getattr(task.model, "all_negatives", False)
    alone = not from_all or distributed.world_size() == 1
    return bool(task.reranks and config.itm_weight and alone)


def resumed_config(given: dict, state: dict, out: Path) -> tuple[object, TrainConfig]:
    """The settings of a checkpoint, with what may change. Raises InputError for the rest."""
    if "optimizer" not in state:
        raise InputError(f"{out}/checkpoint.pt holds a model but no run to continue")
    saved = state["model_config"] | state["train_config"]  # (--vocab: the file, not its words)
    if given.get("task", saved["task"]) != saved["task"]:
        raise InputError(f"the run in {out} is of {saved['task']}, not of {given['task']}; begin "
                         f"with `python train.py {saved['task']}`, or give another --out")
    changed = [flag_name(name) for name in given.keys() - FREE_ON_RESUME
               if given[name] != saved.get(name)]
    if changed:
        raise InputError(f"{', '.join(changed)} cannot change when a run is resumed, and the run "
                         f"in {out} has another; leave it out, or start a new run in another --out")
    free = {name: given[name] for name in given.keys() & FREE_ON_RESUME}
    return (TASKS[state["train_config"]["task"]].config(**state["model_config"]),
            TrainConfig(**(state["train_config"] | free | {"out": str(out)})))


def new_config(given: dict) -> tuple[object, TrainConfig, object]:
    """The settings of a new run, and the model that it starts from or None. Raises InputError."""
    source = start_settings = None
    task = TASKS[given.get("task", "pretrain")]
    if given.get("init"):
        kinds = tuple({TASKS[name].model for name in (*task.starts_from, task.name)})
        heads = {name: given[name] for name in ("vit_heads", "text_heads") if name in given}
        source = checkpoints.open_model(given["init"], task.needs, given.get("vocab", ""),
                                        kinds=kinds, heads=heads, to_train=True)
        if given.get("vocab"):
            pieces = Tokenizer.from_file(given["vocab"]).vocab
            if source.tokenizer.vocab[:len(pieces)] != pieces:  # a start may have more behind them
                raise InputError(f"--vocab {given['vocab']} is not the vocabulary of "
                                 f"{given['init']}, whose weights it would not fit; leave it out")
        start_settings = {"model_config": asdict(source.model.config),
                          "train_config": source.settings}
    model_config, config = resolve(given, start_settings)
    return model_config, config, source


def describe(run: Run) -> None:
    """Print what will be trained, where and with which settings."""
    c, processes = run.config, distributed.world_size()
    parameters = sum(p.numel() for name, p in run.model.named_parameters()
                     if name in run.trainable)
    share = c.batch_size // (processes * c.accumulate)
    if run.edited:
        print0("WARNING the code was edited since this run's checkpoint: it goes on with the new "
               "one; for a comparison start a new run")
    print0(f"model    {flags_of(run.model.config)}\ntraining {flags_of(c)}")
    print0(f"{parameters / 1e6:.2f}M parameters without twins, on {run.device} ({run.precision}), "
           f"writing to {c.out}")
    print0(f"batch {c.batch_size} = {processes} processes x {c.accumulate} micro-batches x {share} "
           f"pairs, learning rate up to {c.lr:g}")
    print0("\n".join([plan.describe(c, len(run.datasets.train)), *run.plan]))
    if run.datasets.final is None:
        print0("no --val given: there will be no evaluation")


def run_all(given: dict, resume: bool) -> int:
    """Set up, train, evaluate -> exit status."""
    run = start(given, resume)
    describe(run)
    go_on = f"python train.py --resume --out {shlex.quote(run.config.out)}"
    if not train(run):
        print0(f"stopped at step {run.step} of {run.steps}; continue with: {go_on}")
        return 130
    print0(f"trained for {run.seconds / 60:.1f} minutes; evaluating")
    try:
        evaluation = evaluate(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the training is done: judge it with: {go_on}")
    if distributed.rank() == 0:
        report(run, evaluation.numbers)
    return 0


def train_into(folder: Path, given: dict) -> str:
    """Train with these settings, or go on where it stopped -> the best checkpoint.

    For programs that train several models. KeyboardInterrupt when a signal asks to stop. Raises
    InputError where the folder holds a run of other settings or of other code.
    """
    resume = (folder / "checkpoint.pt").exists()
    run = start(given | {"out": str(folder)}, resume)
    if run.edited:
        raise InputError(f"{folder} holds a model of other code: train.py, the model, a loss or "
                         "what they use was edited since; give another --out")
    print0(f"{run.steps} steps into {folder}")
    if not train(run):
        raise KeyboardInterrupt
    if not distributed.from_rank_0(lambda: is_evaluated(run)):
        evaluate(run)
    distributed.barrier()
    return str(folder / ("best.pt" if best_of(run) else "checkpoint.pt"))


def is_evaluated(run: Run) -> bool:
    """Whether metrics.json is there and whole."""
    try:
        return bool(read_json(run.out / "metrics.json"))
    except InputError:
        return False


def chances(run: Run) -> dict[str, float]:
    """What chance gives in this run, for each loss and measure of its log."""
    texts = texts_of(run.datasets.train, 5000) if run.config.equal_texts else []
    return chance_levels(run.model.config, run.config, share_of_equal(texts))


def log_of(run: Run) -> list[dict]:
    """The lines of its log.jsonl; none where the checkpoint alone was brought here."""
    return read_log(run.out) if (run.out / "log.jsonl").stat().st_size else []


def report(run: Run, numbers: dict) -> None:
    """Print what was found, where it is written, and what to try next."""
    if "best_step" in numbers:
        print(f"the model that did best in validation is that of step {numbers['best_step']}")
    if "train_broken" in numbers:
        reasons = ", ".join(f"{n} {reason}" for reason, n in numbers["train_broken_by"].items())
        print(f"{numbers['train_broken']} of {numbers['train_seen']} images could not be read and "
              f"were replaced by others: {reasons}")
    if not print_highlights(run.task.highlights, numbers):
        said = ("train_minutes", "train_broken_by")  # in words, above
        print_numbers({name: value for name, value in numbers.items() if name not in said})
    for line in final_lines(log_of(run), chances(run)):
        print(line)
    files = sorted(path.name for path in run.out.iterdir() if path.is_file())
    pictures = "; pictures: samples.png" if "samples.png" in files else ""
    print(f"wrote {run.out}/{', '.join(files)} (all numbers: metrics.json{pictures})")
    if run.config.task == "pretrain":
        checkpoint = f"--checkpoint {shlex.quote(str(run.out))}/checkpoint.pt"
        print(f"try next: python eval.py describe PICTURE {checkpoint}\n"
              f"          python eval.py search \"a small red star\" --images FOLDER {checkpoint}\n"
              f"          edit itc_loss in losses.py, then python train.py --out runs/mine",
              flush=True)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status."""
    given, resume = parse(sys.argv[1:] if arguments is None else arguments, __doc__)
    return exit_status(lambda: run_all(given, resume))


if __name__ == "__main__":
    sys.exit(main())
