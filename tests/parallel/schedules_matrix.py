"""The parity matrix of schedules: families x schedules x pipelines x what they meet, each equal to the plain run.

`python -m tests.parallel.schedules_matrix` runs all cells and writes docs/parity-schedules.md.
"""

import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import meshwright as mw
from tests.parallel.families import SHAPE, SPECIAL, Family, lm, made, pictures, sounds, words
from tests.parallel.models import VOCABULARY, causal_lm

PAGE = Path(__file__).parents[2] / "docs" / "parity-schedules.md"

SCHEDULES = ("gpipe", "1f1b", "interleaved", "modular", "zb-h1", "zbv")
BESIDE: tuple[dict[str, int], ...] = ({}, {"dp": 2}, {"fsdp": 2}, {"tp": 2})
_DEEP = {**SHAPE, "num_hidden_layers": 8}


def _deep_whisper() -> Family:
    sizes = {"d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "num_mel_bins": 8}
    other = {"max_source_positions": 16, "max_target_positions": 32, "use_cache": False, **SPECIAL}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return made("WhisperForConditionalGeneration", "WhisperConfig", **sizes, **heads, **other, **quiet), sounds


def _deep_t5() -> Family:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "vocab_size": VOCABULARY}
    return made("T5ForConditionalGeneration", "T5Config", **sizes, decoder_start_token_id=0, use_cache=False), words


def _deep_vit() -> Family:
    pixels = {**_DEEP, "vocab_size": 0, "image_size": 16, "patch_size": 4, "num_labels": 5}
    return made("ViTForImageClassification", "ViTConfig", **pixels), pictures


_GPT2 = {"n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, "use_cache": False}
_EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "experts_implementation": "eager"}

DEEP: dict[str, Family] = {
    "gpt2": (causal_lm("gpt2", **_GPT2), words),
    "llama": (lm("llama", **{**_DEEP, "num_key_value_heads": 2, "attention_dropout": 0.1}), words),
    "llama, tied": (lm("llama", **{**_DEEP, "num_key_value_heads": 2, "tie_word_embeddings": True}), words),
    "t5": _deep_t5(),
    "vit": _deep_vit(),
    "whisper": _deep_whisper(),
    "mixtral": (lm("mixtral", **{**_DEEP, **_EXPERTS}), words),
}


def layouts() -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
    """P = 1 in layers, P = 2 and 4 in every schedule, alone and beside each other axis; and all at once on 8 ranks."""
    for beside in BESIDE:
        yield beside, {"schedule": "layered", "num_microbatches": 3}
    for schedule, ranks, beside in product(SCHEDULES, (2, 4), BESIDE):
        yield {"pp": ranks, **beside}, {"schedule": schedule, "num_microbatches": 3}
    yield {"pp": 2, "fsdp": 2, "tp": 2}, {"schedule": "modular", "num_microbatches": 3, "zero_stage": 3}


def main() -> int:
    """Runs the whole matrix and writes its page."""
    wanted = list(layouts())
    largest: dict[str, dict[str, float]] = {family: {} for family in DEEP}
    wrong: list[str] = []
    start_s = time.monotonic()
    for number, (family, (degrees, options)) in enumerate(product(DEEP, wanted)):
        report = mw.verify(*DEEP[family], mw.Mesh(**degrees), **options)  # type: ignore[arg-type]
        error = max(report.max_relative_gradient_error, report.loss_error, report.gradient_norm_error)
        column = options["schedule"]
        largest[family][column] = max(error, largest[family].get(column, 0.0))
        if not report.ok or report.notes or error > 1e-10:
            wrong.append(f"{family} {mw.Mesh(**degrees)} {column}: {report}")
        passed_s = time.monotonic() - start_s
        sys.stderr.write(f"\r{number + 1} cells, {len(wrong)} wrong, {passed_s:.0f} s  {family} {degrees} {column:<30}")
    PAGE.write_text(_page(largest, wrong, len(wanted)), encoding="utf-8")
    sys.stderr.write(f"\nwrote {PAGE}\n" + "\n".join(wrong))
    return 1 if wrong else 0


def _page(largest: dict[str, dict[str, float]], wrong: list[str], num_layouts: int) -> str:
    columns = ("layered", *SCHEDULES)
    lines = [
        "# The parity matrix of schedules",
        "",
        f"Each family, with eight blocks, ran one optimizer step on {num_layouts} layouts: layered on one pipeline",
        "rank, every schedule on pp=2 and pp=4, each alone and beside dp=2, fsdp=2 (ZeRO 3) and tp=2, and modular on",
        "pp=2 x fsdp=2 x tp=2; three micro-batches, real ranks (gloo, float64, dropout on). The number is the largest",
        "relative error of loss, any gradient or their norm against the unwrapped model; the limit is 1e-10.",
        "`make matrix` writes this page.",
        "",
        f"| family | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for family, found in largest.items():
        lines.append(f"| {family} | {' | '.join(f'{found.get(column, 0.0):.1e}' for column in columns)} |")
    return "\n".join([*lines, "", *(f"wrong: {each}" for each in wrong)]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
