"""What programs complain of comes down to the lines that tell something, as real ones wrote them."""

import pytest

from meshwright.clusters.telling import refusal, telling

RULE = "-" * 74 + "\n"
ROOT = f"""{RULE}mpiexec has detected an attempt to run as root.

Running as root is *strongly* discouraged as any mistake (e.g., in
defining TMPDIR) or bug can result in catastrophic damage to the OS
file system, leaving your system in an unusable state.

You can override this protection by adding the --allow-run-as-root option
to the cmd line or by setting two environment variables in the following way:
the variable OMPI_ALLOW_RUN_AS_ROOT=1 to indicate the desire to override this
protection, and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 to confirm the choice and
add one more layer of certainty that you want to do so.
We reiterate our advice against doing so - please proceed at your own risk.
{RULE}"""
SLOTS = f"""{RULE}There are not enough slots available in the system to satisfy the 99
slots that were requested by the application:

  true

Either request fewer slots for your application, or make more slots
available for use.
{RULE}"""
KLOG = 'E1128 07:21:35.898114   12010 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API"\n'
REFUSED = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
INVALID = """\
Error from server (Invalid): error when creating "STDIN": JobSet.jobset.x-k8s.io "j" is invalid:
* spec.replicatedJobs[0].replicas: Invalid value: -1
* spec.network: Required value
"""
SBATCH = "sbatch: error: Invalid qos\nsbatch: error: Batch job submission failed: Invalid qos specification\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            ROOT,
            "mpiexec of Open MPI refuses to run as root; set OMPI_ALLOW_RUN_AS_ROOT=1 and "
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or launch as another user",
        ),
        (
            SLOTS,
            "There are not enough slots available in the system to satisfy the 99 slots that were requested by the "
            "application: / true / Either request fewer slots for your application, or make more slots available "
            "for use.",
        ),
        (
            "mpiexec: Error: unknown option \"--no\"\nType 'mpiexec --help' for usage.\n",
            'mpiexec: Error: unknown option "--no"',
        ),
        (
            "[proxy:0:0@h] HYDU_create_process (launch.c:73): execvp error on file /no (No such file or directory)\n",
            "[proxy:0:0@h] HYDU_create_process (launch.c:73): execvp error on file /no (No such file or directory)",
        ),
        (KLOG * 5 + REFUSED, REFUSED),
        (KLOG, KLOG.strip()),
        (INVALID, " / ".join(INVALID.splitlines())),
        (SBATCH, " / ".join(SBATCH.splitlines())),
        (f"Warning: old version\n{RULE}{SBATCH}", " / ".join(SBATCH.splitlines())),
        (
            "Authorized users only\n*****\nroot@h: Permission denied (publickey).",
            "root@h: Permission denied (publickey).",
        ),
        ("Traceback (most recent call last):\n  File 'a.py'\nValueError: what is wrong\n", "ValueError: what is wrong"),
        ("", ""),
        ("-----\n\n =====\n", ""),
    ],
)
def test_lines_that_tell_something_are_kept_and_rules_and_hints_are_not(text: str, words: str) -> None:
    assert telling(text) == words


def test_only_what_is_known_by_heart_is_a_refusal() -> None:
    assert refusal(ROOT) == telling(ROOT)
    assert [refusal(text) for text in (SLOTS, SBATCH, "")] == ["", "", ""]


def test_of_many_lines_the_first_and_the_last_are_kept() -> None:
    lines = [f"Line {number} " + "x" * 40 for number in range(20)]
    assert telling("\n".join(lines), 150) == f"{lines[0]} / {lines[1]} / ... / {lines[-1]}"
    assert telling("y" * 500, 100) == "y" * 100 + "..."
