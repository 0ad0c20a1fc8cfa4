"""A process that follows many files may open them, or says why not."""

import json
import subprocess
import sys
from typing import Any

SCRIPT = """
import json, os, resource, sys
soft, hard, count = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from meshwright.clusters.descriptors import make_room, need_room
from meshwright.clusters.errors import UnavailableError
room, said = make_room(count), ""
try:
    need_room(count, "7 nodes")
except UnavailableError as error:
    said = str(error)
opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(room)]
print(json.dumps({"room": room, "said": said, "limits": resource.getrlimit(resource.RLIMIT_NOFILE)}))
"""


def told(soft: int, hard: int, count: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(count)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_limit_stays_where_it_is_enough() -> None:
    assert told(256, 4096, 20) == {"room": 20, "said": "", "limits": [256, 4096]}


def test_the_limit_is_raised_as_far_as_is_needed() -> None:
    found = told(256, 4096, 2000)
    assert (found["room"], found["said"]) == (2000, "")
    assert 2000 < found["limits"][0] < 2200
    assert found["limits"][1] == 4096, "only the soft one"


def test_a_hard_limit_that_is_too_low_gives_what_there_is_and_is_said_with_what_is_needed() -> None:
    found = told(256, 512, 2000)
    assert 300 < found["room"] < 384
    assert found["limits"] == [512, 512]
    assert found["said"].startswith("7 nodes take 2000 open files; this process may have 512, which leaves 3")
    assert "`ulimit -Hn`" in found["said"]
