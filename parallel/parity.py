"""What parity means in numbers: two runs of one step compared, name by name.

The relative error of a tensor is max|a - b| / max(max|b|, 1e-6 m), where m is the largest entry of all reference
tensors: gradients that are zero in theory (biases of keys) would otherwise divide noise by noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan

import torch
from torch import Tensor

__all__ = ["Outcome", "ParityReport", "compare", "relative_errors"]

_FLOOR = 1e-6


@dataclass(frozen=True)
class Outcome:
    """One optimizer step of one run.

    Attributes:
        loss: global loss.
        gradients: whole gradients by parameter name; None where none was computed.
        gradient_norm: their global L2 norm.
        weights: whole parameters after the step.
        microbatch_losses: loss of each micro-batch, by data rank.
        shares: for the plain run, the part of the gradients that each data rank's samples contribute.
    """

    loss: float
    gradients: Mapping[str, Tensor | None]
    gradient_norm: float
    weights: Mapping[str, Tensor]
    microbatch_losses: Sequence[Sequence[float]]
    shares: Sequence[Mapping[str, Tensor]] = field(default=())


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far a parallel run is from the plain one; `ok` when every error is within `tolerance`."""

    mesh: str
    dtype: str
    tolerance: float
    loss_error: float
    gradient_norm_error: float
    max_relative_gradient_error: float
    worst_parameter: str
    max_relative_weight_error: float
    worst_weight: str
    max_microbatch_loss_error: float
    worst_microbatch: str
    num_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the parallel run equals the plain run within the tolerance."""
        errors = (
            self.loss_error,
            self.gradient_norm_error,
            self.max_relative_gradient_error,
            self.max_relative_weight_error,
            self.max_microbatch_loss_error,
        )
        return all(error <= self.tolerance for error in errors)  # NaN is never within

    def as_dict(self) -> dict[str, object]:
        """A JSON-able copy, `ok` included."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        verdict = "equal to the plain run" if self.ok else "NOT equal to the plain run"
        lines = [
            f"{self.mesh} ({self.dtype}): {verdict}, tolerance {self.tolerance:g}, {self.num_parameters} parameters",
            f"  loss           {self.loss_error:9.2e}",
            f"  micro-batches  {self.max_microbatch_loss_error:9.2e}  worst: {self.worst_microbatch}",
            f"  gradient norm  {self.gradient_norm_error:9.2e}",
            f"  gradients      {self.max_relative_gradient_error:9.2e}  worst: {self.worst_parameter}",
            f"  next weights   {self.max_relative_weight_error:9.2e}  worst: {self.worst_weight}",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor of `expected`; see the module's text.

    >>> relative_errors({"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([2.0, 2.0])})
    {'w': 0.5}
    """
    largest = max((float(tensor.abs().max()) for tensor in expected.values() if tensor.numel()), default=0.0)
    errors = {}
    for name, tensor in expected.items():
        if not tensor.numel():
            continue
        scale = max(float(tensor.abs().max()), _FLOOR * largest)
        difference = float((found[name].double() - tensor.double()).abs().max())
        errors[name] = difference / scale if scale else difference
    return errors


def compare(found: Outcome, expected: Outcome, *, mesh: str, dtype: str, tolerance: float) -> ParityReport:
    """Compares a parallel run with the plain run and says where a difference comes from."""
    gradients = relative_errors(_present(found, expected), _present(expected, found))
    weights = relative_errors(found.weights, expected.weights)
    absent = _absent(found, expected)
    notes = list(absent)
    worst_parameter, gradient_error = _worst(gradients)
    if not gradient_error <= tolerance:
        notes += _origin(worst_parameter, found, expected)
    microbatch, microbatch_error = _worst(_microbatch_errors(found, expected))
    if not microbatch_error <= tolerance:
        notes += _swapped(found, expected, tolerance)
    worst_weight, weight_error = _worst(weights)
    return ParityReport(
        mesh=mesh,
        dtype=dtype,
        tolerance=tolerance,
        loss_error=_relative(found.loss, expected.loss),
        gradient_norm_error=_relative(found.gradient_norm, expected.gradient_norm),
        max_relative_gradient_error=float("inf") if absent else gradient_error,
        worst_parameter=worst_parameter,
        max_relative_weight_error=weight_error,
        worst_weight=worst_weight,
        max_microbatch_loss_error=microbatch_error,
        worst_microbatch=microbatch,
        num_parameters=len(expected.weights),
        notes=tuple(notes),
    )


def _present(one: Outcome, other: Outcome) -> dict[str, Tensor]:
    return {
        name: gradient
        for name, gradient in one.gradients.items()
        if gradient is not None and other.gradients.get(name) is not None
    }


def _absent(found: Outcome, expected: Outcome) -> list[str]:
    notes = []
    for name, gradient in expected.gradients.items():
        here = found.gradients.get(name)
        if (here is None) != (gradient is None):
            which = "is missing, the plain run has one" if here is None else "exists, the plain run has none"
            notes.append(f"gradient of {name} {which}")
    return notes


def _worst(errors: Mapping[str, float]) -> tuple[str, float]:
    if not errors:
        return "", 0.0
    name = max(errors, key=lambda each: float("inf") if isnan(errors[each]) else errors[each])
    return name, errors[name]


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), torch.finfo(torch.float64).tiny)


def _microbatch_errors(found: Outcome, expected: Outcome) -> dict[str, float]:
    return {
        f"data rank {rank}, micro-batch {index}": 0.0 if isnan(there) and isnan(here) else _relative(here, there)
        for rank, (mine, plain) in enumerate(zip(found.microbatch_losses, expected.microbatch_losses, strict=True))
        for index, (here, there) in enumerate(zip(mine, plain, strict=True))
    }


def _origin(name: str, found: Outcome, expected: Outcome) -> list[str]:
    """Tries the usual faults on the worst gradient: a constant factor, or a reduction that did not happen."""
    here, there = found.gradients[name], expected.gradients[name]
    if here is None or there is None:
        return []
    for rank, share in enumerate(expected.shares):
        factor = _factor(here, share[name])
        if factor is not None and len(expected.shares) > 1:
            return [f"gradient of {name} is {factor:.6g} x the share of data rank {rank} alone: a reduction is missing"]
    factor = _factor(here, there)
    if factor is not None:
        return [f"gradient of {name} is {factor:.6g} x the plain one: a normalisation or a reduction is applied twice"]
    return [f"gradient of {name} is no multiple of the plain one"]


def _factor(here: Tensor, there: Tensor) -> float | None:
    """The factor f with here = f x there, if there is one."""
    square = float((there.double() ** 2).sum())
    if square == 0.0:
        return None
    factor = float((here.double() * there.double()).sum()) / square
    rest = float((here.double() - factor * there.double()).abs().max())
    return factor if factor != 0.0 and rest <= 1e-6 * float(here.abs().max()) else None


def _swapped(found: Outcome, expected: Outcome, tolerance: float) -> list[str]:
    """Names data ranks that worked on another rank's samples."""
    notes = []
    for rank, mine in enumerate(found.microbatch_losses):
        if _same(mine, expected.microbatch_losses[rank], tolerance):
            continue
        for other, plain in enumerate(expected.microbatch_losses):
            if other != rank and _same(mine, plain, tolerance):
                notes.append(f"data rank {rank} worked on the samples of data rank {other}")
    return notes


def _same(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    return all(_relative(a, b) <= tolerance for a, b in zip(one, other, strict=True))
