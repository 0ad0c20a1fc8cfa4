"""A job becomes a request: its command, its directories, its environment, its secrets."""

import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.clusters.base import StartRequest
from meshwright.clusters.environment import BASE
from meshwright.clusters.imports import IMPORTS
from meshwright.clusters.retry import RetryPolicy
from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job
from meshwright.launch.request import WORKER_ARGV, imports_of, request_of, resolved_job
from meshwright.launch.spec.job import Job

MODEL = "model: {architecture: llama}\ndata: {files: python-stdlib}\ntrain: {steps: 1, batch_size: 1}\n"


def request(folder: Path, text: str, *, reveal: bool = True, **environment: str) -> StartRequest:
    (folder / "job.yaml").write_text(f"name: j\n{text}")
    loaded = load_job(folder / "job.yaml")
    return request_of(loaded, "r1", base=Path("/base"), environment=environment, reveal=reveal)


def test_words_are_filled_and_python_is_this_python(tmp_path: Path) -> None:
    found = request(tmp_path, "command: [python, a.py, '{run_id}', '{other}']")
    assert found.program.argv == (sys.executable, "a.py", "r1", "{other}")
    with_setup = request(tmp_path, "command: [python, a.py]\nsetup: 'true'")
    assert with_setup.program.argv[0] == "python", "setup may put another one on PATH"


def test_text_goes_to_a_shell_and_no_command_is_the_built_in_program(tmp_path: Path) -> None:
    assert request(tmp_path, "command: echo $X\nshell: true").program.argv == ("/bin/sh", "-c", "echo $X")
    assert request(tmp_path, MODEL).program.argv == WORKER_ARGV


def test_ranks_start_beside_the_job_and_the_run_lies_where_it_was_launched(tmp_path: Path) -> None:
    found = request(tmp_path, "command: [x]")
    assert found.program.workdir == tmp_path
    assert found.run_dir == Path("/base/runs/j/r1")
    with pytest.raises(JobError, match="none is no directory"):
        request(tmp_path, "command: [x]\nworkdir: none")


def test_ranks_read_a_job_with_absolute_directories(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"name: j\n{MODEL}")
    resolved = resolved_job(load_job(tmp_path / "job.yaml"), "r1", Path("/base"))
    job = Job.model_validate(resolved)
    assert (job.logs.dir, job.checkpoint.dir) == ("/base/runs/j/r1", "/base/runs/j/checkpoints")


MAKES_AN_OPTIMIZER = """
import sys
from meshwright.parallel.importing import import_all
assert import_all(sys.argv[1].split()) == []
before = {*sys.modules}
import torch
from meshwright.launch.worker.optimizer import build_adamw
parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
build_adamw(0.1, (0.9, 0.99), 1e-8)([parameter]).step()
print(len({*sys.modules} - before))
"""


@pytest.mark.slow
def test_a_rank_that_makes_its_optimizer_finds_imported_what_torch_wants_for_it(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"name: j\n{MODEL.replace('architecture: llama', 'python: tiny:build')}")
    names = imports_of(load_job(tmp_path / "job.yaml").job)[IMPORTS]
    words = [sys.executable, "-c", MAKES_AN_OPTIMIZER, names]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20, "torch imports 500 with its first optimizer"


def test_everything_is_inherited_unless_the_job_names_what_is(tmp_path: Path) -> None:
    assert request(tmp_path, "command: [x]").program.inherit == ("*",)
    named = request(tmp_path, "command: [x]\nenv_pass: ['NCCL_*']").program.inherit
    assert set(named) == {"NCCL_*", *BASE}


def test_secrets_are_read_where_they_are_and_never_printed(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from the file\n")
    text = "command: [x]\nsecrets: {A: {from_env: X}, B: {from_file: token}}"
    found = request(tmp_path, text, X="from the env")
    assert [secret.value for secret in found.program.secrets] == ["from the env", "from the file"]
    assert "from the" not in repr(found)
    assert [secret.value for secret in request(tmp_path, text, reveal=False).program.secrets] == ["", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{from_env: NONE}", r"job.yaml:3:\d+: secrets.A: the variable NONE is not set"),
        ("{from_file: none}", r"secrets.A: the file .*none cannot be read: No such file"),
        ("{from_env: SHORT}", "shorter than 4 characters"),
    ],
)
def test_a_secret_that_cannot_be_had_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        request(tmp_path, f"command: [x]\nsecrets: {{A: {text}}}", SHORT="abc")


def test_restarts_are_as_the_job_says_and_by_default_as_the_policy_is(tmp_path: Path) -> None:
    assert request(tmp_path, "command: [x]").limits.retry == RetryPolicy()
    text = (
        "command: [x]\nfailure:\n  max_restarts: 7\n  backoff: {initial: 2s, factor: 3, max: 1m, jitter: 0.5}\n"
        "  retry_on: [signal]\n  no_retry_on: ['exit:3']\n  stop_after_no_progress: 4\n"
    )
    found = request(tmp_path, text).limits
    assert found.max_restarts == 7
    assert found.retry == RetryPolicy(2.0, 3.0, 60.0, 0.5, ("signal",), ("exit:3",), 4)
