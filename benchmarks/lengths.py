"""Step time on documents of unequal lengths: padded as they come, sorted by length in part, packed without padding.

All contenders train the same llama on the same documents in one process, in turn; one round of a contender is a whole
epoch, so each has computed on the same tokens. Lengths are log-normal, cut at the longest sequence.
`python -m benchmarks.lengths [--json] [--rounds N] [--cpu-time]`
"""

import argparse
import json
import sys
import time
from typing import Any

import torch

import meshwright as mw
from benchmarks.loops import Step, build_llama, our_model
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.launch.worker.samples import cut_documents
from meshwright.launch.worker.text import Text
from meshwright.parallel.ranks import RankPool

__all__ = ["main", "measure"]

_VOCABULARY, _LONGEST, _BATCH, _STEPS = 256, 512, 8, 32
_BASE = "padded, K=1"
_CONTENDERS: dict[str, dict[str, Any]] = {
    _BASE: {"form": "padded"},
    "padded, K=1 again": {"form": "padded"},
    "padded, K=16": {"form": "padded", "sort_window": 16},
    "padded, K=all": {"form": "padded", "sort_window": None},
    "packed": {"form": "packed"},
    "packed, 4 rows": {"form": "packed", "num_microbatches": 4},
}


def _text(form: Any, **settings: Any) -> Text:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(_BATCH * _STEPS, generator=generator) * 0.8 + 4.2).exp().int().clamp(4, _LONGEST - 1)
    texts = [torch.randint(0, _VOCABULARY - 1, (length,), generator=generator) for length in lengths.tolist()]
    laid = cut_documents(texts, separator=_VOCABULARY - 1, sequence_length=_LONGEST, vocab_size=_VOCABULARY, form=form)
    return Text(laid, None, vocab_size=_VOCABULARY, seed=0, batch_size=_BATCH, **settings)


def _epochs(text: Text) -> Step:
    """Goes through the steps of the first epoch again and again."""
    wrapped, optimizer = our_model(build_llama(128, 2, _VOCABULARY), mw.Mesh(), num_microbatches=text.num_microbatches)
    done = 0

    def step() -> None:
        nonlocal done
        wrapped.step(text.training_batch(done % _STEPS + 1, 0, 1))
        optimizer.step()
        done += 1

    return step


def measure(rounds: int, cpu_time: bool) -> dict[str, Any]:
    """Seconds per step of each contender by rounds, and the tokens and padding of its epoch."""
    texts = {name: _text(**settings) for name, settings in _CONTENDERS.items()}
    sizes = {name: [text.training_size(step, 1) for step in range(1, _STEPS + 1)] for name, text in texts.items()}
    tokens = {name: sum(size.tokens for size in each) for name, each in sizes.items()}
    ratios = {name: 1.0 - tokens[name] / sum(size.places for size in each) for name, each in sizes.items()}
    contenders = {name: _epochs(text) for name, text in texts.items()}
    clock = time.process_time if cpu_time else time.perf_counter
    times = alternate(contenders, rounds=rounds, steps=_STEPS, clock=clock)
    return {"times": times, "tokens": tokens, "padding_ratio": ratios}


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, where others share the machine")
    arguments = parser.parse_args()
    pool = RankPool()
    try:
        found = pool.run(measure, 1, (arguments.rounds, arguments.cpu_time), timeout_s=3600.0)[0]
    finally:
        pool.close()
    times = found["times"]
    ratios = {name: ratio_of(each, times[_BASE]) for name, each in times.items() if name != _BASE}
    result = {
        "rounds": arguments.rounds,
        "clock": "cpu" if arguments.cpu_time else "wall",
        "tokens_per_epoch": found["tokens"],
        "median_step_s": {name: sorted(each)[len(each) // 2] for name, each in times.items()},
        "padding_ratio": found["padding_ratio"],
        "over_padded": {name: ratio.median for name, ratio in ratios.items()},
        "half_width": {name: ratio.half_width for name, ratio in ratios.items()},
        "noise": noise_of(times[_BASE], times["padded, K=1 again"]),
    }
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':<20} {'ms a step':>9} {'padding':>8} {'tokens/s':>9}  over {_BASE}"]
    for name, seconds in result["median_step_s"].items():
        over = f"{result['over_padded'][name]:.3f} +- {result['half_width'][name]:.3f}" if name != _BASE else ""
        speed = result["tokens_per_epoch"][name] / _STEPS / seconds
        lines.append(f"{name:<20} {seconds * 1e3:>9.1f} {result['padding_ratio'][name]:>8.1%} {speed:>9,.0f}  {over}")
    return "\n".join([*lines, f"noise (A/A) {result['noise']:.3f}"]) + "\n"


if __name__ == "__main__":
    main()
