"""Texts of errors, word for word."""

from collections.abc import Callable
from textwrap import dedent

import pytest

Refuse = Callable[..., list[str]]
PROGRAM = "name: a\ncommand: [b]\n"
TRAINING = "name: a\nmodel: {architecture: llama}\ndata: {files: python-stdlib}\ntrain: {steps: 3, batch_size: 4}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROGRAM + "nodez: 2\n", "job.yaml:3:1: nodez: unknown key 'nodez'; did you mean 'nodes'?"),
        (
            PROGRAM + "failure: {backoff: {jiter: 1}}\n",
            "job.yaml:3:21: failure.backoff.jiter: unknown key 'jiter'; did you mean 'jitter'?",
        ),
        (
            PROGRAM + "secrets: {TOKEN: {value: hunter2}}\n",
            "job.yaml:3:19: secrets.TOKEN.value: unknown key 'value'; choose from: from_env, from_file",
        ),
        (
            PROGRAM + 'failure: {max_restarts: "2"}\n',
            'job.yaml:3:25: failure.max_restarts: expected an integer, got "2"; write 2 without quotes',
        ),
        (
            PROGRAM + "failure: {max_restarts: 1_000}\n",
            'job.yaml:3:25: failure.max_restarts: expected an integer, got "1_000"; write 1000 without separators',
        ),
        (
            PROGRAM + "nodes:\n  max: two\n  min: 1\n",
            'job.yaml:4:8: nodes.max: expected an integer, got "two"',
        ),
        (PROGRAM + "nodes: two\n", 'job.yaml:3:8: nodes: expected an integer or a mapping, got "two"'),
        (PROGRAM + "nodes: 0\n", "job.yaml:3:8: nodes: expected a number, at least 1, got 0"),
        (
            PROGRAM + "logs: {merge: no}\n",
            'job.yaml:3:15: logs.merge: expected true or false, got "no"; YAML 1.2 writes false',
        ),
        (PROGRAM + "env: {A: 017}\n", 'job.yaml:3:10: env.A: expected text, got 017; write "017" in quotes'),
        (
            PROGRAM + "failure: {shutdown_grace: 120}\n",
            "job.yaml:3:27: failure.shutdown_grace: expected a duration with its unit, such as 120s or 120m, got 120",
        ),
        (
            PROGRAM + "resources: {memory_per_node: 900Gib}\n",
            "job.yaml:3:30: resources.memory_per_node: expected a size; 'Gib' is no unit of bytes: "
            "did you mean 'GiB'?, got \"900Gib\"",
        ),
        (
            PROGRAM + "binding: nuna\n",
            "job.yaml:3:10: binding: expected 'none', 'numa' or 'socket', got \"nuna\"; did you mean 'numa'?",
        ),
        (
            PROGRAM + 'logs: {dir: "runs/{nmae}"}\n',
            "job.yaml:3:13: logs.dir: unknown template field {nmae}; the legal ones are {name}, {run_id}; "
            "did you mean 'name'?, got \"runs/{nmae}\"",
        ),
        (
            "name: {name}\ncommand: [b]\n",
            'job.yaml:1:1: name: expected text, got a mapping; quote text that starts with "{"',
        ),
        (PROGRAM + "logs:\n", "job.yaml:3:6: logs: expected a mapping, got nothing; give it a value or remove the key"),
        (
            PROGRAM + "env: {A-B: x}\n",
            "job.yaml:3:7: env.A-B: expected a variable name of letters, digits and '_' that does not start with a "
            'digit, got "A-B"',
        ),
        (PROGRAM + "name: c\n", "job.yaml:3:1: name: duplicate key, first written at line 1; keep one of them"),
        (
            PROGRAM + "cluster: {type: rya, address: auto}\n",
            "job.yaml:3:17: cluster.type: no cluster type 'rya'; did you mean 'ray'? (this version of meshwright has "
            "local, ssh, slurm, kubernetes, mpi, ray)",
        ),
        (
            "name: a\n",
            "job.yaml:1:1: the job runs nothing; add `command:` (your program) or `model:` (the built-in one)",
        ),
        (
            "name: a\nmodel: {architecture: llama}\ntrain: {steps: 1}\n",
            "job.yaml:3:1: train.batch_size: required key is missing; add `batch_size:`",
        ),
        (
            "name: a\nmodel: {architecture: llama}\ndata: {files: x}\n",
            "job.yaml:2:1: model: the built-in program also needs `train:`; add what is missing",
        ),
        (
            TRAINING + "parallel: {dp: 4}\nnodes: 1\nnproc_per_node: 2\n",
            "job.yaml:7:17: nproc_per_node: nodes x nproc_per_node = 1 x 2 = 2 ranks, but the mesh of `parallel` "
            "(dp=4) has 4; set nproc_per_node: 4, or make the product of the axes 2",
        ),
        (
            TRAINING + "parallel: {zero_stage: 0}\n",
            "job.yaml:5:24: parallel.zero_stage: zero_stage=0 exists for data_engine deepspeed only; with torch use "
            "the axis dp",
        ),
        (
            TRAINING + "parallel: {dp: 2, num_microbatches: 4}\n",
            "job.yaml:4:31: train.batch_size: batch_size=4 gives some rank an empty micro-batch: dp x fsdp x "
            "num_microbatches = 8 need a sequence each; set at least 8",
        ),
        (
            PROGRAM + "nodes: 2\n",
            "job.yaml:3:8: nodes: nodes=2, but the local cluster has 1 pretended node; set cluster.simulate_nodes: 2",
        ),
    ],
)
def test_an_error_says_where_what_and_what_to_write(text: str, message: str, refuse: Refuse) -> None:
    assert refuse(text) == [message]


def test_all_errors_of_a_file_are_listed_in_its_order(refuse: Refuse) -> None:
    text = dedent("""\
        name: a b
        nodez: 2
        parallel: {dp: 0, tp: "2"}
        logs: {merge: no}
        logs: {}
        time: 24:00:00
        """)
    found = refuse(text, "train.stepz=3", "nodes=x")
    assert [line.split(": ")[0] for line in found] == [
        "job.yaml:1:7",
        "job.yaml:2:1",
        "job.yaml:3:16",
        "job.yaml:3:23",
        "job.yaml:4:15",
        "job.yaml:5:1",
        "job.yaml:6:1",
        "--set train.stepz=3",
        "--set train.stepz=3",
        "--set train.stepz=3",
        "--set nodes=x",
    ]


def test_a_secret_written_down_by_mistake_is_not_repeated(refuse: Refuse) -> None:
    for lines in (
        refuse(PROGRAM + "secrets: {TOKEN: hunter2}\n"),
        refuse(PROGRAM + "secrets: {TOKEN: {from_env: [hunter2]}}\n"),
        refuse(PROGRAM, "secrets.TOKEN=hunter2"),
    ):
        assert len(lines) == 1
        assert "hunter2" not in lines[0]
    assert refuse(PROGRAM + "secrets: {TOKEN: hunter2}\n") == [
        "job.yaml:3:18: secrets.TOKEN: expected a mapping; write {from_env: NAME} or {from_file: PATH}"
    ]


def test_the_value_of_a_wrong_key_is_shown_short_and_printable(refuse: Refuse) -> None:
    (line,) = refuse(PROGRAM + f'nodes: "{"x" * 200}\\e[31m"\n')
    assert line.endswith(f'got "{"x" * 60}..."')
