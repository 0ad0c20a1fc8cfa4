"""torch's own record of collectives tells who has not come to one, and nothing where there is none."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from meshwright.parallel.flight_recorder import Recorded, Recorder, Started, recorded_from, save
from meshwright.parallel.hang import Note, Sight, find_hang
from tests.launch.waiting import eventually

GROUPS = {"0": (0, 1, 2), "7": (0, 2)}


def entry(number: int, kind: str = "all_reduce", *, group: str = "0", **more: Any) -> dict[str, Any]:
    return {
        "collective_seq_id": number,
        "record_id": number - 1,
        "is_p2p": False,
        "process_group": [group, "default_pg" if group == "0" else "undefined"],
        "profiling_name": f"gloo:{kind}",
        "input_sizes": [[7]],
        "input_dtypes": ["Float"],
        "state": "scheduled",
        "retired": False,
        **more,
    }


def recorded(*entries: dict[str, Any], groups: Mapping[str, tuple[int, ...]] = GROUPS, rank: int = 0) -> Recorded:
    """What a rank's recorder with such entries says, by way of a note."""
    own = {name: ranks for name, ranks in groups.items() if rank in ranks}
    recorder = Recorder(lambda: {"entries": list(entries)}, lambda: own)
    assert eventually(lambda: bool(recorder.newest(still=True)))
    return recorded_from(json.loads(json.dumps(asdict(recorded_from(recorder.newest(still=True))))))


def test_the_oldest_collective_that_others_have_not_called_is_found_with_them() -> None:
    done, waits = entry(1, retired=True), entry(2, "broadcast")
    own, other, behind = recorded(done, waits), recorded(done, waits), recorded(done)
    assert own.missing({1: other, 2: other}) is None
    found = own.missing({1: other, 2: behind})
    assert found is not None
    call, absent = found
    assert absent == {2: "its last is number 1"}
    assert call.words == "broadcast number 2 of process group 0 (default_pg), Float [[7]], scheduled"


def test_who_called_something_else_instead_has_not_joined() -> None:
    larger = recorded(entry(3, input_sizes=[[8]], retired=True), entry(4))
    found = recorded(entry(3)).missing({1: recorded(entry(3, "broadcast")), 2: larger})
    assert found is not None
    assert found[1] == {1: "it called broadcast Float [[7]]", 2: "it called all_reduce Float [[8]]"}
    assert recorded(entry(3)).missing({1: recorded(entry(3)), 2: recorded(entry(3), entry(4))}) is None
    uneven = recorded(entry(3, "all_gather", input_sizes=[[8]]))
    assert recorded(entry(3, "all_gather")).missing({1: uneven}) is None, "sizes may differ there"


def test_only_ranks_of_the_group_that_record_too_are_missed() -> None:
    own = recorded(entry(3, group="7"))
    behind = recorded(entry(1), rank=2)
    assert own.missing({1: recorded(entry(1), rank=1)}) is None, "rank 1 is not of that group"
    assert own.missing({2: Recorded()}) is None, "rank 2 records nothing"
    assert own.missing({2: recorded(entry(1), groups={"0": (0, 1, 2), "7": (2, 3)}, rank=2)}) is None, (
        "another of that name"
    )
    assert own.missing({2: behind}) is not None
    assert own.missing({2: recorded(entry(9))}) is None, "it may have forgotten the collectives of that group"


def test_messages_between_two_and_what_is_over_are_no_collectives_that_wait() -> None:
    completed = entry(1, state="completed")
    assert recorded(completed, entry(5, "send", is_p2p=True), entry(6, group="gone")).started == ()


def test_backends_of_one_group_count_by_themselves_and_may_have_forgotten_by_themselves() -> None:
    def nccl(number: int, **more: Any) -> dict[str, Any]:
        return entry(number, profiling_name="nccl:all_reduce", **more)

    own = recorded(entry(9), nccl(2))
    found = own.missing({1: recorded(entry(9), nccl(1, record_id=0), rank=1)})
    assert found is not None, "more over gloo is no more over NCCL"
    assert (found[0].group, found[1]) == ("nccl:0", {1: "its last is number 1"})
    assert own.missing({1: recorded(entry(9, record_id=0), nccl(4, group="gone"), rank=1)}) is None, "NCCL's forgot"
    kept = recorded(entry(9, record_id=8), nccl(4, group="7", record_id=0), groups={"0": (0, 1), "7": (0, 1)})
    assert kept.last == {"nccl:0": 0, "nccl:7": 4, "gloo:0": 9}


def test_both_recorders_of_torch_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C import _distributed_c10d

    def dump(*entries: dict[str, Any], **more: Any) -> Callable[..., bytes]:
        return lambda collectives, active: json.dumps({"version": "2.7", **more, "entries": entries}).encode()

    late = dump(entry(1, time_created_ns=5), entry(2, time_created_ns=9))
    over_nccl = dump(entry(7, profiling_name="nccl:broadcast", time_created_ns=6), nccl_version="2.29")
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace_json", late, raising=False)
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace_json", over_nccl, raising=False)
    save(tmp_path, 0)
    found = json.loads((tmp_path / "hang/fr-rank-0.json").read_text())
    assert [each["collective_seq_id"] for each in found["entries"]] == [1, 7, 2], "by when they were called"
    assert found["nccl_version"] == "2.29"
    recorder = Recorder(groups=lambda: GROUPS)
    assert eventually(lambda: bool(recorder.newest(still=True)))
    assert recorder.newest(still=True)["last"] == {"gloo:0": 2, "gloo:7": 0, "nccl:0": 7}


def test_what_a_rank_says_of_its_collectives_stays_small() -> None:
    calls = [entry(number, group=group) for number in range(1, 100) for group in ("0", "7")]
    few = recorded(*calls, groups={"0": (0, 1), "7": (0, 1)})
    many = recorded(*calls, groups={"0": tuple(range(4096)), "7": tuple(range(0, 4096, 2))})
    sizes = [len(json.dumps(asdict(each))) for each in (few, many)]
    assert sizes[1] < sizes[0] + 50
    assert sizes[1] < 1000, sizes
    assert set(few.newest) == {f"gloo:{group}/{number}" for group in "07" for number in (1, 98, 99)}


@pytest.mark.parametrize(
    "ask",
    [dict, lambda: {"entries": []}, lambda: {"entries": [{}]}, lambda: {}["no"]],
    ids=["off", "none", "other", "no"],
)
def test_a_torch_that_records_nothing_or_otherwise_claims_nothing(tmp_path: Path, ask: Callable[[], Any]) -> None:
    recorder = Recorder(ask, lambda: GROUPS)
    for _ in range(3):
        recorder.newest(still=True)
        assert recorder._thread is not None
        recorder._thread.join(60)
        assert recorder.newest(still=True) == {}
    assert recorded_from({}).missing({1: recorded(entry(1))}) is None


def test_a_recorder_that_does_not_answer_keeps_nobody(tmp_path: Path) -> None:
    never = Event()
    recorder = Recorder(lambda: never.wait(60) and {}, lambda: GROUPS)  # type: ignore[arg-type,return-value]
    assert [recorder.newest(still=True) for _ in range(3)] == [{}, {}, {}]
    save(tmp_path, 0, lambda: never.wait(60) and {})  # type: ignore[arg-type,return-value]
    assert not list(tmp_path.iterdir())
    never.set()


def test_what_was_said_in_another_standstill_is_forgotten() -> None:
    recorder = Recorder(lambda: {"entries": [entry(1)]}, lambda: GROUPS)
    assert eventually(lambda: bool(recorder.newest(still=True)))
    assert recorder.newest(still=False) == {}


def test_the_newest_entries_are_kept_on_disk(tmp_path: Path) -> None:
    save(tmp_path, 3, lambda: {"entries": [entry(number) for number in range(500)], "version": "x"})
    found = json.loads((tmp_path / "hang/fr-rank-3.json").read_text())
    assert [each["collective_seq_id"] for each in found["entries"]] == list(range(400, 500))
    assert found["version"] == "x"
    save(tmp_path, 4, dict)
    assert [each.name for each in (tmp_path / "hang").iterdir()] == ["fr-rank-3.json"]


CALL = Started("gloo:0", 3, "all_reduce", "all_reduce number 3 of process group 0, Float [[7]], scheduled")


def stuck(**more: Any) -> dict[int, Sight]:
    """Rank 0 waits in a call of its program's own, the others in one of ours that it has not come to."""
    behind = Recorded((), {"gloo:0": 2}, {"gloo:0": 1})
    own = Note("forward", 9.0, 4, inside="all_reduce", recorded=Recorded((CALL,), {"gloo:0": 3}, {"gloo:0": 1}))
    ours = Note("all_reduce over dp (number 9)", 9.0, 4, (0, 1, 2), "all_reduce over dp (number 9)", recorded=behind)
    return {0: Sight(own), 1: Sight(ours), 2: Sight(ours)}


def test_of_ranks_that_wait_for_each_other_the_one_in_a_call_of_its_own_is_first() -> None:
    sights = stuck()
    turned = {2: sights[0], 0: sights[1], 1: Sight(replace(sights[1].note, waits_for=(2,)))}
    found = find_hang({**turned, 0: Sight(replace(sights[1].note, waits_for=(2,)))}, 5.0)
    assert found is not None
    assert found.suspects == (2, 0, 1)


def test_a_call_that_our_notes_do_not_see_is_named_with_who_has_not_joined_it() -> None:
    found = find_hang(stuck(), 5.0)
    assert found is not None
    assert found.suspects == (0, 1, 2)
    assert found.ranks[0] == (
        "waits for ranks 1, 2 at step 4, forward, inside all_reduce (torch: all_reduce number 3 of process group 0, "
        "Float [[7]], scheduled; not joined by rank 1 (its last is number 2), "
        "rank 2 (its last is number 2))"
    )
    assert "rank 1 waits for rank 0 at step 4, all_reduce over dp (number 9)" in found.line
