"""The tests mirror the source: `tests/<folder>/test_<module>.py` is about `<folder>/<module>.py`."""

from pathlib import Path

import pytest

from tests.house.tree import FOLDERS, ROOT, modules

TESTS = sorted(path for folder in FOLDERS for path in (ROOT / "tests" / folder).rglob("test_*.py"))

# tests about more than one module
THEMES = {
    "tests/launch/paper/test_hosted.py": "memory of spans and of the host, forecast and run",
    "tests/parallel/test_traced_spans.py": "tracing of blocks by spans",
    "tests/parallel/test_hooks_behind.py": "hooks and changes to gradients that come behind the wrap",
    "tests/parallel/test_layered.py": "micro-batches layer-major: capture, pieces and runtime together",
    "tests/parallel/spans/test_trajectories.py": "a long sequence trained within a given memory",
    "tests/launch/test_jobsets.py": "runs in pods from the launch to the end: which nodes, and restarts of all pods",
    "tests/launch/test_elastic_jobsets.py": "runs in pods of which some come late, or do not come",
    "tests/launch/test_commands.py": "the commands verify, show and simulate",
    "tests/launch/test_import.py": "what importing costs",
    "tests/launch/test_malformed.py": "hundreds of broken job files",
    "tests/launch/worker/test_hang.py": "a rank that stops or dies in the middle of a schedule",
    "tests/launch/worker/test_faults.py": "training runs killed at random moments",
    "tests/parallel/test_sequences.py": "the parity matrix of long sequences: models x masks x ways",
    "tests/parallel/test_cells.py": "the part of each matrix that `make test` runs",
    "tests/parallel/test_between.py": "code between blocks where the sequence is dealt: planners and hooks together",
    "tests/parallel/test_more_families.py": "families unlike those of the parity matrix",
    "tests/parallel/test_decoders.py": "decoders of transformers as they come",
    "tests/parallel/test_matrix.py": "the parity matrix: families x layouts",
    "tests/launch/worker/test_parts.py": "the small parts of the training program",
    "tests/launch/page/test_browser.py": "a page of a run in headless Chromium",
    "tests/clusters/test_carried.py": "any words and variables on the line of every cluster",
    "tests/launch/test_fuzz.py": "ten thousand damaged inputs of the command line",
    "tests/launch/test_dry_run.py": "what 512 nodes cost on paper, and where their ranks are",
    "tests/launch/test_secrets.py": "a secret that a rank prints and dies of, in every file and on every screen",
    "tests/moe/test_compared.py": "layers that benchmarks compare compute the same",
}

# modules without a test file of their own that no test names either: reached through their users
THROUGH_OTHERS = {
    "meshwright.parallel.context.arguments": "tests/parallel/context/test_install.py: what blocks take besides",
    "meshwright.parallel.context.attending": "tests/parallel/context/test_planner.py proves with it",
    "meshwright.launch.spec.data": "tests/launch/test_spec.py and test_malformed.py, through Job",
    "meshwright.parallel.as_given": "tests/parallel/test_hooks_behind.py clips gradients by torch",
    "meshwright.parallel.tiles": "tests/moe/test_slices.py joins them, tests/parallel/test_experts.py saves them",
    "meshwright.moe.expert_pass": "tests/parallel/test_experts.py: every model on every layout is dealt by it",
    "meshwright.parallel.serving": "tests/parallel/test_ranks.py: every rank of a pool lives in it",
    "meshwright.parallel.forking": "tests/parallel/test_forks.py: what it forks is looked at from within",
    "meshwright.parallel.bundle": "tests/parallel/test_experts.py and test_rotate.py: every layered step of shards",
    "meshwright.parallel.sharding": "tests/parallel/test_rotate.py and test_experts.py: rows over fsdp and edp",
    "meshwright.parallel.spread": "tests/parallel/test_experts.py and test_dealt.py: states of every axis",
    "meshwright.parallel.legal": "tests/launch/test_commands.py and tests/parallel/test_layered.py are refused by it",
    "meshwright.launch.worker.example": "tests/launch/test_commands.py shows and simulates a job with tp",
    "meshwright.parallel.blockwise.block_dropout": "tests/parallel/blockwise/test_pointwise.py draws masks",
    "meshwright.parallel.blockwise.aliases": "tests/parallel/blockwise/test_pointwise.py runs with them",
    "meshwright.parallel.plotting": "tests/parallel/pipeline/test_picture.py, tests/moe/test_heat_map.py",
    "meshwright.parallel.spans.answers": "tests/parallel/spans/test_run.py, like the rest of the folder",
    "meshwright.parallel.spans.arguments": "tests/parallel/spans/test_run.py",
    "meshwright.parallel.spans.backward": "tests/parallel/spans/test_run.py",
    "meshwright.parallel.spans.call": "tests/parallel/spans/test_run.py",
    "meshwright.parallel.spans.forward": "tests/parallel/spans/test_run.py",
    "meshwright.parallel.spans.joining": "tests/parallel/spans/test_run.py",
    "meshwright.parallel.blockwise.head": "tests/parallel/blockwise/test_entropy.py",
    "meshwright.parallel.blockwise.wanted": "tests/parallel/blockwise/test_entropy.py asks for halves",
    "meshwright.parallel.scores": "tests/parallel/test_vocabulary.py and blockwise/test_loss.py use both kinds",
    "meshwright.parallel.targets": "tests/parallel/test_vocabulary.py and blockwise/test_entropy.py",
    "meshwright.parallel.exchange": "tests/parallel/test_matrix.py: every pair of collectives, forward and backward",
    "meshwright.clusters.simulated.alive": "tests/clusters/simulated/test_keeping.py: moments of walks, each keeper",
    "meshwright.clusters.fitting": "tests/clusters/test_calibration.py finds the numbers that times were made from",
    "meshwright.parallel.paper": "tests/parallel/test_fake_rank.py runs every rank of every job on it",
    "meshwright.parallel.build": "every wrapped model is built by it",
    "meshwright.parallel.pipeline.paper_routes": "tests/parallel/test_fake_rank.py compares pipelines with real ones",
    "meshwright.parallel.traced_kernels": "tests/parallel/test_tracing.py counts attention and dropout with it",
    "meshwright.parallel.pieces": "tests/parallel/test_layered.py goes back through every family piece by piece",
    "meshwright.parallel.pipeline.posting": "tests/parallel/pipeline/test_transfers.py: no ring in any schedule",
    "meshwright.parallel.capture": "tests/parallel/test_layered.py captures every family",
    "meshwright.parallel.pipeline.runtime": "tests/parallel/test_layered.py runs every family on it",
    "meshwright.parallel.absent": "tests/parallel/test_staged.py: every rank of a pipeline skips blocks",
    "meshwright.parallel.stages": "tests/parallel/test_staged.py cuts models in every way",
    "meshwright.parallel.pipeline.leftovers": "tests/parallel/test_staged.py: blocks that collect are refused",
    "meshwright.parallel.pipeline.passes": "tests/parallel/test_layered.py and test_staged.py run every family on it",
    "meshwright.parallel.pipeline.route": "tests/parallel/test_staged.py: every family takes one",
    "meshwright.parallel.pipeline.routes": "tests/parallel/test_staged.py: each shape is looked for once",
    "meshwright.parallel.attributes": "tests/parallel/test_cuts.py: what a model keeps on its modules is refused",
    "meshwright.parallel.length": "tests/parallel/test_recompute.py deals sequences in a pipeline",
    "meshwright.parallel.passing": "tests/parallel/test_recompute.py deals sequences in a pipeline",
    "meshwright.parallel.pipeline.way_back": "tests/parallel/test_layered.py goes back through every family",
    "meshwright.parallel.pipeline.transfers": "tests/parallel/test_staged.py sends and receives by every schedule",
    "meshwright.parallel.pipeline.wire": "tests/parallel/test_staged.py sends and receives by every schedule",
    "meshwright.parallel.predicted": "tests/parallel/test_report.py and test_rotate.py compare it with the ledger",
    "meshwright.parallel.sharded": "tests/parallel/test_rotate.py and test_verify.py, through both sharded engines",
    "meshwright.parallel.units": "tests/parallel/test_rotate.py gathers and reduces them",
    "meshwright.parallel.part": "tests/parallel/test_dealt.py saves and resumes on other meshes",
    "meshwright.parallel.prove": "tests/parallel/test_tensor_planner.py and test_matrix.py",
    "meshwright.parallel.tensor": "tests/parallel/test_matrix.py runs it on every family",
    "meshwright.parallel.tensor_planner": "tests/parallel/test_tensor_planner.py",
    "meshwright.parallel.unit_run": "tests/parallel/test_matrix.py, through the proof of every unit",
    "meshwright.parallel.variants": "tests/parallel/test_matrix.py, through the proof of every unit",
    "meshwright.parallel.vocabulary_plan": "tests/parallel/test_tensor_planner.py",
    "meshwright.parallel.wishes": "tests/parallel/test_tensor_planner.py",
    "meshwright.parallel.context.columns": "tests/parallel/context/test_attention.py: bias rows and columns",
    "meshwright.parallel.context.gathered": "tests/parallel/context/test_attention.py runs every feature on it",
    "meshwright.parallel.context.packed": "tests/parallel/context/test_attention.py, through every ring",
    "meshwright.parallel.context.route": "tests/parallel/context/test_ring.py, test_traffic.py: rings that end early",
    "meshwright.parallel.context.supply": "tests/parallel/context/test_attention.py runs every feature on it",
    "meshwright.parallel.context.swap": "tests/parallel/context/test_attention.py, through Ulysses and the hybrid",
    "meshwright.clusters.bootstrap": "every launch of tests/launch starts ranks through it",
    "meshwright.clusters.channel": "every launch of tests/launch talks through it",
    "meshwright.clusters.spawn": "every launch of tests/launch starts agents through it",
    "meshwright.clusters.mpi_seat": "tests/clusters/test_mpi.py seats processes",
    "meshwright.clusters.mpi_words": "tests/lab/test_mpi.py: all its runs, where MPI can pickle nothing",
    "meshwright.clusters.ray_nodes": "tests/lab/test_ray.py examines nodes through it",
    "meshwright.clusters.kubectl": "tests/clusters/test_kubernetes.py: every command goes through it",
    "meshwright.launch.wishes": "tests/launch/test_doctor.py, through wishes_of",
    "meshwright.clusters.ray_plan": "tests/clusters/test_ray.py plans by it",
    "meshwright.clusters.ray_line": "tests/lab/test_ray.py runs agents through it",
    "meshwright.clusters.bandwidth": "tests/clusters/test_examine.py times real ranks",
    "meshwright.launch.commands.doctor": "tests/launch/test_doctor.py runs the command",
    "meshwright.launch.commands.launch": "tests/launch/test_cli.py runs the command",
    "meshwright.launch.commands.show": "tests/launch/test_commands.py runs the command",
    "meshwright.launch.commands.simulate": "tests/launch/test_commands.py runs the command",
    "meshwright.launch.commands.plan": "tests/launch/test_plan_report.py runs the command",
    "meshwright.launch.commands.verify": "tests/launch/test_commands.py runs the command",
    "meshwright.clusters.contract": "protocols only: what tests of clusters and of launch run against",
    "meshwright.launch.follow": "tests/launch/test_launch.py and tests/lab follow every run through it",
    "meshwright.launch.commands.attach": "tests/launch/test_runs.py types the command",
    "meshwright.launch.commands.cancel": "tests/launch/test_runs.py types the command",
    "meshwright.launch.commands.logs": "tests/launch/test_runs.py types the command",
    "meshwright.launch.commands.ps": "tests/launch/test_runs.py types the command",
    "meshwright.launch.background": "tests/launch/test_runs.py leaves a run alone",
    "meshwright.launch.series": "tests/launch/test_sweeping.py starts them, on this machine and as an array",
    "meshwright.clusters.node_run": "tests/clusters/test_agent.py runs the program",
    "meshwright.launch.registry": "every launch goes through it",
    "meshwright.launch.spec.clusters": "tests/launch/test_load.py and test_malformed.py, through Job",
    "meshwright.launch.spec.conduct": "tests/launch/test_spec.py and test_malformed.py, through Job",
    "meshwright.launch.spec.health": "tests/launch/test_spec.py and test_malformed.py, through Job",
    "meshwright.launch.spec.machines": "tests/launch/test_spec.py and test_malformed.py, through Job",
    "meshwright.launch.spec.rules": "tests/launch/test_spec.py and test_malformed.py, through Job",
    "meshwright.launch.spec.training": "tests/launch/test_spec.py and test_malformed.py, through Job",
    "meshwright.launch.worker.record": "tests/launch/worker/test_train.py runs a job with a schedule",
    "meshwright.launch.yaml_scalars": "tests/launch/test_yaml_text.py",
    "meshwright.parallel.data": "tests/parallel/test_verify.py runs every engine",
    "meshwright.parallel.reference": "tests/parallel/test_verify.py compares with it",
    "meshwright.parallel.shard": "tests/parallel/test_verify.py, test_engine.py and test_report.py run all its stages",
}


def _source_of(test: Path) -> Path:
    return ROOT / test.relative_to(ROOT / "tests").with_name(f"{test.stem.removeprefix('test_')}.py")


@pytest.mark.parametrize("test", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_file_is_about_a_module(test: Path) -> None:
    source = _source_of(test)
    known = source.exists() or source.with_suffix("").is_dir() or str(test.relative_to(ROOT)) in THEMES
    assert known, f"no {source.relative_to(ROOT)}; name it after a module, or say in THEMES what it is about"


def test_every_module_has_a_test() -> None:
    words = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    own = {_source_of(test) for test in TESTS}
    bare = {name for name, path in modules().items() if path not in own and path.name != "__init__.py"}
    assert {name for name in bare if name not in words} <= set(THROUGH_OTHERS) <= set(modules())


def test_the_lists_name_what_exists() -> None:
    assert [name for name in THEMES if not (ROOT / name).exists()] == []
