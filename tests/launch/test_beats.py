"""Whoever looks at a queued run hears of its launcher, and says so when it does not."""

import json
import os
from pathlib import Path

from meshwright.clusters.files import alive_file
from meshwright.launch.beats import Beats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def looked_at(run_dir: Path) -> tuple[Beats, Clock, Path]:
    clock, path = Clock(), alive_file(run_dir)
    path.parent.mkdir(parents=True)
    (run_dir / "plan.json").write_text(json.dumps({"nodes": [{"name": "gpu7"}, {"name": "gpu9"}]}))
    return Beats(run_dir, clock), clock, path


def heard(beats: Beats, clock: Clock, for_s: float, *, touched: Path | None = None) -> list[str]:
    """What is said in a while in which the launcher touches its file every two seconds, or does not."""
    said = []
    for _ in range(round(for_s / 0.5)):
        clock.now_s += 0.5
        if touched is not None and clock.now_s % 2 == 0:
            touched.touch()
            os.utime(touched, (1e9, clock.now_s))
        said.append(beats.news())
    return [words for words in said if words]


def test_a_launcher_that_falls_silent_is_named_by_its_node_once_within_eleven_seconds(tmp_path: Path) -> None:
    beats, clock, alive = looked_at(tmp_path)
    assert heard(beats, clock, 60, touched=alive) == []
    (words,) = heard(beats, clock, 11)
    assert words.startswith("node gpu7: the launcher there was not heard of for 10 s; is the node up")
    assert heard(beats, clock, 600) == []


def test_a_launcher_that_is_heard_again_is_said_and_may_fall_silent_again(tmp_path: Path) -> None:
    beats, clock, alive = looked_at(tmp_path)
    heard(beats, clock, 4, touched=alive)
    heard(beats, clock, 20)
    assert heard(beats, clock, 20, touched=alive) == ["node gpu7: the launcher there is heard of again"]
    assert len(heard(beats, clock, 20)) == 1


def test_nothing_is_said_before_a_launcher_follows_its_run_and_after_it_has(tmp_path: Path) -> None:
    beats, clock, alive = looked_at(tmp_path)
    assert heard(beats, clock, 60) == []
    heard(beats, clock, 4, touched=alive)
    alive.unlink()
    assert heard(beats, clock, 60) == []


def test_a_silence_that_ends_with_the_run_is_no_news(tmp_path: Path) -> None:
    beats, clock, alive = looked_at(tmp_path)
    heard(beats, clock, 4, touched=alive)
    assert len(heard(beats, clock, 20)) == 1
    alive.unlink()
    assert heard(beats, clock, 20) == []
