"""The built-in training program of one rank: build, resume, step, measure, save."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.launch.spec.job import Job
from meshwright.launch.worker.borders import check_borders
from meshwright.launch.worker.checkpoint import Checkpoints
from meshwright.launch.worker.errors import CheckpointError
from meshwright.launch.worker.example import example_batch
from meshwright.launch.worker.experts import count_job
from meshwright.launch.worker.leave import Leave
from meshwright.launch.worker.measure import Meter
from meshwright.launch.worker.metrics import MetricsFile, now_unix_s, progress_line, restart_record
from meshwright.launch.worker.model import build_model
from meshwright.launch.worker.optimizer import build_adamw, decay_of, set_rate
from meshwright.launch.worker.prometheus import metrics_of
from meshwright.launch.worker.record import StepFiles, figures, files_of
from meshwright.launch.worker.schedule import LearningRate
from meshwright.launch.worker.text import Text, load_text
from meshwright.parallel.collectives import gather_integers
from meshwright.parallel.progress import doing, patience
from meshwright.parallel.wrap import ParallelModel, parallelize

__all__ = ["Training", "build_training"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Training:
    """One rank's training.

    Args:
        job: what to train.
        model: wrapped.
        optimizer: of what this rank owns.
        text: batches by step.
        checkpoints: of the job.
        metrics: of rank 0; other ranks hold one that writes nothing.
        meter: times and FLOPs.
        say: where lines for people go.
        files: of one recorded step; they lie beside metrics and the plot.
    """

    job: Job
    model: ParallelModel
    optimizer: Optimizer
    text: Text
    checkpoints: Checkpoints
    metrics: MetricsFile
    meter: Meter
    say: Callable[[str], None]
    files: StepFiles
    step: int = 0
    saved: int = 0  # before the first step there is nothing to go on from, and no state of an optimizer
    started_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        assert self.job.train is not None, "checked when the job was read"
        self._resume()
        check_borders(self.model, self.text, _DTYPES[self.job.train.precision])
        if self.step == 0:
            self._validate()
        while self._is_unfinished and not self._out_of_time():
            self.step += 1
            self._one_step()
            if self._due(self.job.checkpoint.every_steps):
                self._save()
        self._finish()

    def _resume(self) -> None:
        found = self.checkpoints.find(self.job.checkpoint.resume)
        if found is None:
            self.metrics.restart(restart_record(0))
            return
        expected, was = self.text.fingerprint(), found.manifest.get("text")
        if was != expected:
            raise CheckpointError(
                f"checkpoint {found.path} was trained on other text, another seed or another batch size "
                f"(fingerprint {was}, now {expected}); put them back, or set checkpoint.resume=never to start anew"
            )
        history = self.checkpoints.load(self.model, found)
        self.step = self.saved = found.step
        self.metrics.restart([*history, *restart_record(found.step)] if self._is_unfinished else history)
        self.meter.tokens = self._tokens_read()
        self.say(f"resumed from {found.path} at step {found.step}")

    def _one_step(self) -> None:
        train = self.job.train
        assert train is not None, "checked when the job was read"
        set_rate(self.optimizer, self._rate().at(self.step))
        doing(f"reading the batch of step {self.step}")
        batch = self.text.training_batch(self.step, self.model.data_rank, self.model.mesh.data_degree)
        loss, extra = self._gradients(batch)
        norm = self.model.clip_gradients(train.clip_norm) if train.clip_norm is not None else None
        doing(f"the optimizer's step {self.step}")
        self.optimizer.step()
        self.files.experts.balance()
        doing(f"measuring and logging step {self.step}")
        self.meter.tick(*self.text.training_size(self.step, self.model.mesh.data_degree))
        extra["time_unix_s"] = now_unix_s()
        if self.meter.needs_peak:
            self.meter.measure_peak()
        if self._is_logged:
            self._log(float(loss), None if norm is None else float(norm), extra)
        if self._due(train.validate_every_steps) and self.step < train.steps:
            self._validate()

    def _gradients(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Forward and backward; loss, and what is to be logged with it."""
        if self.step == 1:  # the same step in every run, since counting may choose other kernels
            loss, counted = self.model.ledger_step(batch)
            return loss, {"collectives": counted.as_dict()}
        if self.model.schedule is None or not self._is_logged:
            return self.model.step(batch), {}
        loss, found = self.model.record_step(batch)
        if self.model.rank == 0:
            self.files.take(found, self.step)
        return loss, figures(found)

    def _log(self, loss: float, norm: float | None, extra: dict[str, Any]) -> None:
        assert self.job.train is not None, "checked when the job was read"
        record = {
            "step": self.step,
            "loss": loss,
            "tokens": self.meter.tokens,
            "ranks": self.model.mesh.world_size,
            **self.meter.read(),
            "lr": self._rate().at(self.step),
            "gradient_norm": norm,
            **self.files.read(),
            **extra,
        }
        self.metrics.write(record)
        self.say(progress_line(record, self.job.train.steps))

    def _validate(self) -> None:
        """Mean loss per token over the held-out batches, on all ranks."""
        train = self.job.train
        if self.text.validation is None or train is None:
            return
        self.model.module.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for number in range(min(train.validate_batches, -(-len(self.text.validation) // train.batch_size))):
            batch = self.text.validation_batch(number, self.model.data_rank, self.model.mesh.data_degree)
            for part in batch if isinstance(batch, list) else [batch]:
                sums += torch.stack(self.model.evaluate(part)).cpu()
        self.model.module.train()
        self.meter.pause()
        record = {"step": self.step, "validation_loss": float(sums[0] / sums[1]), "time_unix_s": now_unix_s()}
        self.metrics.write(record)
        self.say(progress_line(record, train.steps))

    def _save(self) -> None:
        if self.saved == self.step:
            return
        facts = {"name": self.job.name, "text": self.text.fingerprint(), "mesh": self.model.mesh.degrees()}
        with patience(f"saving the checkpoint of step {self.step}"):
            path = self.checkpoints.save(self.model, self.step, facts, self.metrics.history)
        self.saved = self.step
        self.meter.pause()
        self.say(f"saved {path}")

    def _finish(self) -> None:
        done = not self._is_unfinished
        last = self.metrics.history[-1] if self.metrics.history else {}
        if done and "validation_loss" not in last and last.get("event") != "end":
            self._validate()
        if self.job.checkpoint.every_steps is not None or self.checkpoints.leave.decided:
            self._save()
        if last.get("event") != "end":
            seconds = round(time.monotonic() - self.started_s, 3)
            self.metrics.write({"event": "end", "step": self.step, "seconds": seconds, "time_unix_s": now_unix_s()})
        if self.model.rank == 0:
            with patience("plotting"):
                self.files.draw(self.metrics.history, self.say)
        if not done:
            self.say(f"stopped at step {self.step} {_why(self.checkpoints.leave)}")

    def _rate(self) -> LearningRate:
        train = self.job.train
        assert train is not None, "checked when the job was read"
        plan = train.schedule
        return LearningRate(
            peak=train.optimizer.lr,
            steps=train.steps,
            warmup_steps=plan.warmup_steps,
            decay=plan.decay,
            min_ratio=plan.min_lr_ratio,
        )

    def _tokens_read(self) -> int:
        """Tokens up to this step: what the last record says, and the steps behind it."""
        known = [record for record in self.metrics.history if "tokens" in record]
        step, tokens = (known[-1]["step"], known[-1]["tokens"]) if known else (0, 0)
        return tokens + sum(self.text.training_size(each, 1).tokens for each in range(step + 1, self.step + 1))

    @property
    def _is_unfinished(self) -> bool:
        assert self.job.train is not None, "checked when the job was read"
        return self.step < self.job.train.steps

    @property
    def _is_logged(self) -> bool:
        assert self.job.train is not None, "checked when the job was read"
        return self.step in (1, self.job.train.steps) or self._due(self.job.train.log_every_steps)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _out_of_time(self) -> bool:
        if self.checkpoints.leave(gather_integers):
            return True
        limit_s = self.job.train.stop_after if self.job.train is not None else None
        if limit_s is None:
            return False
        return gather_integers(int(time.monotonic() - self.started_s >= limit_s))[0] == 1  # rank 0's clock decides


def build_training(job: Job, run_dir: Path, *, device: torch.device, say: Callable[[str], None]) -> Training:
    """Builds everything a rank trains with; the process group is running.

    Raises:
        MeshwrightError: for a model, a text or a mesh that cannot be had.
    """
    train = job.train
    assert train is not None, "checked when the job was read"
    plain = job.as_dict()
    text = load_text(
        plain["data"],
        seed=train.seed,
        batch_size=train.batch_size,
        num_microbatches=job.parallel.num_microbatches,
    )
    module = _module(job, plain["model"], vocab_size=text.vocab_size, device=device)
    example = example_batch(job)
    meter = Meter(device, _DTYPES[train.precision], num_ranks=job.mesh.world_size)
    meter.count(module, {name: each[:, : text.usual_length] for name, each in example.items()})
    count_job(module, balanced=train.balance_rate is not None)
    model = parallelize(module, job.mesh, **job.options, example=example)
    plan = train.optimizer
    optimizer = model.make_optimizer(build_adamw(plan.lr, plan.betas, plan.eps), decay_of(plan.weight_decay))
    whose_say = say if model.rank == 0 else _silent
    return Training(
        job=job,
        model=model,
        optimizer=optimizer,
        text=text,
        checkpoints=_checkpoints(job, model, whose_say),
        metrics=metrics_of(job, run_dir, rank=model.rank, say=say),
        meter=meter,
        say=whose_say,
        files=files_of(job, model, run_dir, device=device),
    )


def _module(job: Job, spec: dict[str, Any], *, vocab_size: int, device: torch.device) -> nn.Module:
    """The model in the parameters' dtype; bfloat16 computes under autocast, so that no update is lost in rounding."""
    assert job.train is not None, "checked when the job was read"
    assert job.model is not None, "checked when the job was read"
    wide = job.train.precision == "float64"
    dtype = torch.float64 if wide else _DTYPES[job.model.dtype]
    module = build_model(spec, vocab_size=vocab_size, seed=job.train.seed, dtype=dtype, device=device).train()
    if job.train.precision == "bfloat16":
        module.forward = torch.autocast(device.type, dtype=torch.bfloat16)(module.forward)
    return module


def _checkpoints(job: Job, model: ParallelModel, say: Callable[[str], None]) -> Checkpoints:
    return Checkpoints(
        directory=Path(job.checkpoint.dir),
        keep=job.checkpoint.keep,
        rank=model.rank,
        world_size=model.mesh.world_size,
        agree=gather_integers,
        say=say,
    )


def _why(leave: Leave) -> str:
    return "since the nodes are wanted back" if leave.decided else "after train.stop_after; launch again to go on"


def _silent(line: str) -> None:
    del line
