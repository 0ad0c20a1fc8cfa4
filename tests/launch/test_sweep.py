"""A sweep is a value: which runs, in which order, by which names; what is wrong in any of them is said before any."""

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job, open_job
from meshwright.launch.sweep import MOST_RUNS, SweepPlan, plan_sweep, readable
from meshwright.launch.values import check_name
from meshwright.launch.variants import jobs_of, load_one

HEAD = "name: tiny\ncommand: [python, train.py]\n"
TRAINED = """\
name: tiny
model: {architecture: llama}
data: {files: python-stdlib}
train: {steps: 1, batch_size: 2, optimizer: {lr: 1}}
"""
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=90)


def sweep(folder: Path, text: str, *overrides: str, head: str = HEAD) -> SweepPlan:
    path = folder / "job.yaml"
    path.write_text(head + text)
    plan = plan_sweep(open_job(path, overrides))
    assert plan is not None
    return plan


def check(path: Path, overrides: tuple[str, ...]) -> None:
    opened = open_job(path, overrides)
    plan = plan_sweep(opened)
    assert plan is not None
    jobs_of(opened, plan)


def refused(folder: Path, text: str, *overrides: str, head: str = HEAD) -> list[str]:
    path = folder / "job.yaml"
    path.write_text(head + text)
    with pytest.raises(JobError) as caught:
        check(path, overrides)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def test_combinations_come_in_the_order_written_the_last_key_fastest(tmp_path: Path) -> None:
    plan = sweep(tmp_path, "sweep: {grid: {env.B: [x, w], env.A: ['1', '3', '2']}, max_parallel: 2}\n")
    found = [tuple(each.node.plain() for each in variant.settings) for variant in plan.variants]
    assert found == list(itertools.product(["x", "w"], ["1", "3", "2"]))
    assert [variant.index for variant in plan.variants] == list(range(6))
    assert (plan.name, plan.max_parallel) == ("tiny", 2)
    assert plan.variants[1].overrides == ("env.B=x", 'env.A="3"')
    assert [plan.run_id("r1", index) for index in (0, 5)] == ["r1-0", "r1-5"]


VALUES = "1, 1.0, '1', true, 'true', null, 1e-5, 0x10, off, [1, a], {a: 'x: y'}, 'a\"b', '[', ' x ', a/b, ''"


def test_values_keep_their_types_and_are_those_that_set_would_give(tmp_path: Path) -> None:
    plan = sweep(tmp_path, f"sweep: {{grid: {{model.config.x: [{VALUES}]}}}}\n", head=TRAINED)
    jobs = jobs_of(open_job(tmp_path / "job.yaml"), plan)
    for variant, loaded in zip(plan.variants, jobs, strict=True):
        given = ("sweep=null", *variant.overrides, f"name=tiny-{variant.suffix}")
        assert loaded.job == load_job(tmp_path / "job.yaml", given).job, variant
    assert loaded.job.model is not None
    wanted = [1, 1.0, "1", True, "true", None, 1e-5, 16, "off", [1, "a"], {"a": "x: y"}, 'a"b', "[", " x ", "a/b", ""]
    found = [each.job.model.config["x"] for each in jobs if each.job.model is not None]
    assert [(type(each), each) for each in found] == [(type(each), each) for each in wanted]
    assert len({each.job.name for each in jobs}) == len(wanted)


@given(st.lists(SCALARS | TEXTS, min_size=2, max_size=6, unique_by=json.dumps))
def test_suffixes_are_safe_and_tell_any_values_apart(values: list[object]) -> None:
    texts = {"lr", "s"} if all(isinstance(value, str) for value in values) else ()
    names = [readable({"lr": first, "s": second}, texts) for first, second in itertools.product(values, values)]
    assert len(set(names)) == len(names)
    for name in names:
        assert check_name(f"{'j' * 80}-{name}"[:100]), name
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,60}", name)


def test_suffixes_are_what_people_would_write_where_that_is_safe(tmp_path: Path) -> None:
    plan = sweep(tmp_path, "sweep: {grid: {train.optimizer.lr: [3e-4], train.seed: [2], data.seed: [1]}}\n")
    assert plan.variants[0].suffix == "lr-0.0003_train.seed-2_data.seed-1"
    texts = sweep(tmp_path, "sweep: {grid: {env.SEED: ['1', '2']}}\n")
    assert [each.suffix for each in texts.variants] == ["SEED-1", "SEED-2"]
    mixed = sweep(tmp_path, "sweep: {grid: {model.config.x: ['1', 1]}}\n")
    assert mixed.variants[0].suffix.startswith("x-1-")
    assert mixed.variants[1].suffix == "x-1"
    assert readable({"w": "../../etc/passwd"}).startswith("w-..-..-etc-passwd-")
    assert readable({"w": "%a; rm -rf /"}).startswith("w--a-rm--rf--")


def test_a_suffix_follows_from_the_values_alone(tmp_path: Path) -> None:
    few = sweep(tmp_path, "sweep: {grid: {env.A: ['a b', 'b c']}}\n")
    more = sweep(tmp_path, "sweep: {grid: {env.A: ['0 0', 'b c', 'a b']}}\n")
    assert few.variants[0].suffix == more.variants[2].suffix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sweep:\n  grid:\n    nodes: [1, 1]\n", "job.yaml:5:5: sweep.grid.nodes: 1 stands twice"),
        ("sweep:\n  grid:\n    nodes: []\n", "job.yaml:5:5: sweep.grid.nodes: no values"),
        ("sweep: {grid: {name: [a, b]}}", "job.yaml:3:16: sweep.grid.name: name cannot be swept"),
        ("sweep: {grid: {secrets.T: [hunter22]}}", "sweep.grid.secrets.T: secrets cannot be swept: values of a sweep"),
        ("sweep: {grid: {sweep.max_parallel: [1]}}", "sweeps do not nest"),
        ("sweep: {grid: {a..b: [1]}}", "expected a dotted key"),
        ("sweep: {grid: {env: [{}], env.A: [x]}}", "sweep.grid.env.A: env is swept too, and one lies in the other"),
        (f"sweep: {{grid: {{nodes: {list(range(1, MOST_RUNS + 2))}}}}}", "1,001 combinations, of which 1000 may run"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_where_it_stands(tmp_path: Path, text: str, said: str) -> None:
    (message,) = refused(tmp_path, text)
    assert said in message
    assert "hunter22" not in message


def test_a_key_that_the_command_line_sets_is_not_swept_over_its_head(tmp_path: Path) -> None:
    text = "sweep: {grid: {env.A: [x, y]}}\n"
    (message,) = refused(tmp_path, text, "env.A=z")
    assert message.endswith("sweep.grid.env.A: --set env.A sets it too; --set sweep=null launches one run")
    assert plan_sweep(open_job(tmp_path / "job.yaml", ["sweep=null"])) is None
    assert len(sweep(tmp_path, text, "sweep={grid: {env.A: [a, b, c]}}").variants) == 3


def test_a_bad_value_of_the_last_run_is_said_with_its_place_in_the_sweep(tmp_path: Path) -> None:
    text = "sweep:\n  grid:\n    env.A: [x]\n    failure.max_restarts: [1, 2, many]\n    nodez: [1]\n"
    first, second = refused(tmp_path, text)
    assert first.startswith('job.yaml:6:34: failure.max_restarts: expected an integer, got "many"')
    assert first.endswith("(run 2 of the sweep: env.A=x failure.max_restarts=many nodez=1)")
    assert second.startswith("job.yaml:7:5: nodez: unknown key 'nodez'; did you mean 'nodes'?")


def test_a_key_that_the_cluster_does_not_act_on_is_refused_for_all(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, "sweep:\n  grid:\n    binding: [none, numa]\n")
    assert message.startswith("job.yaml:5:5: binding: the local cluster does not act on binding yet")
    messages = refused(tmp_path, "cluster: {type: kubernetes, image: x}\nsweep: {grid: {env.A: [x]}}\n")
    assert "the kubernetes cluster does not act on sweep yet; launch once per value with --set" in messages[0]


def test_runs_share_no_directory_no_port_and_one_kind_of_cluster(tmp_path: Path) -> None:
    text = "sweep: {grid: {env.A: [x, y]}, max_parallel: 2}\n"
    assert "put {name} or {run_id} in it" in refused(tmp_path, f"logs: {{dir: here}}\n{text}")[0]
    assert "would meet at one port" in refused(tmp_path, f"rendezvous: {{port: 29500}}\n{text}")[0]
    clusters = "sweep: {grid: {cluster: [{type: local}, {type: slurm}]}}\n"
    assert "a sweep runs on one kind of cluster" in refused(tmp_path, clusters)[0]
    trained = refused(tmp_path, "checkpoint: {dir: c}\nsweep: {grid: {train.seed: [1, 2]}}\n", head=TRAINED)
    assert "would continue from each other's checkpoints" in trained[0]


def test_looking_at_a_sweep_looks_at_one_run_and_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, "sweep: {grid: {env.A: [x, y]}}\n")
    assert load_one(tmp_path / "job.yaml").job.env == {"A": "x"}
    assert "a sweep of 2 runs; this is the first, env.A=x" in capsys.readouterr().err
    assert load_one(tmp_path / "job.yaml", index=1).job.env == {"A": "y"}
    assert capsys.readouterr().err == ""
    with pytest.raises(JobError, match="the sweep has the runs 0 to 1"):
        load_one(tmp_path / "job.yaml", index=2)
