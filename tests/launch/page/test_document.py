"""The page loads nothing, runs nothing of what a run wrote, and says how the run stands."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from meshwright.launch.page.document import document
from meshwright.launch.page.machines import MachineEvent, Machines
from meshwright.launch.page.read import Mark, RunView, read_view
from meshwright.launch.page.style import SCRIPT, STYLE
from tests.launch.page.made import write_run

EVIL = "</title></script></style><script>alert(1)</script><img src=//evil.example/x onerror='a\"b'>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text of all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.found)


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = document(read_view(write_run(tmp_path / "r", state="succeeded")))
    links = [value for _, attributes in Elements(page).found for name, value in attributes.items() if name in LINKS]
    assert links == ["data:,"], "the icon, so that no browser asks for one"
    assert not re.search(r"url\(|@import|fetch|XMLHttp|import\(", STYLE + SCRIPT)


LINKS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


def test_a_policy_lets_only_the_pages_own_style_and_script_act() -> None:
    page = document(RunView("j", "r", "running"))
    (policy,) = [found["content"] for tag, found in Elements(page).found if found.get("http-equiv")]
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-[^' ]+'; script-src 'sha256-[^' ]+'", policy or ""
    )


@pytest.mark.parametrize("field", ["name", "run_id", "state", "facts", "reason", "failure", "marks", "machines"])
def test_what_a_run_wrote_is_text(field: str) -> None:
    plain = {"name": "j", "run_id": "r", "state": "failed", "records": ({"step": 1, "loss": 1.0},)}
    machines = Machines((MachineEvent(EVIL, None, EVIL),))
    listed = {"facts": (EVIL,), "marks": (Mark(1.0, None, EVIL),), "machines": machines}
    page = document(RunView(**{**plain, field: listed.get(field, EVIL)}))  # type: ignore[arg-type]
    elements = Elements(page)
    assert (elements.count("script"), elements.count("img"), elements.count("style")) == (1, 0, 1)
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert "alert(1)" in elements.text


def test_a_failed_run_says_why_and_shows_the_end_of_the_traceback(tmp_path: Path) -> None:
    first = {"traceback": "Traceback ...\nValueError: <tensor> & more"}
    view = read_view(write_run(tmp_path / "r", state="failed", reason="rank 3 on n0 failed first", first_failure=first))
    page = document(view)
    assert 'class="pill failed">failed<' in page
    assert "rank 3 on n0 failed first" in page
    assert "ValueError: &lt;tensor&gt; &amp; more</pre>" in page


def test_restarts_are_listed_with_their_causes(tmp_path: Path) -> None:
    restarts = [{"next_attempt": 1, "time_unix_s": 1_795_690_099.0, "cause": "rank 1 on n0 exited with code 7"}]
    page = document(read_view(write_run(tmp_path / "r", state="succeeded", restarts=restarts)))
    assert "<td>1</td><td>100</td><td>2026-11-26 10:48:19 UTC</td><td>attempt 1: rank 1 on n0 exited" in page


def test_an_elastic_run_shows_its_sizes_and_what_became_of_its_machines(tmp_path: Path) -> None:
    shrunk = {"next_attempt": 1, "cause": "host h2: lost", "nodes": [3, 2], "excludes": ["h2"], "time_unix_s": 1.0}
    lost = {"node": "h2", "why": "host h2: lost <b>", "step": 99, "time_unix_s": 1_795_690_099.0, "back_unix_s": None}
    run_dir = write_run(tmp_path / "r", state="succeeded", restarts=[shrunk], excluded=[lost])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    sized = [{**row, "ranks": 3 if row.get("step", 0) <= 100 else 2} for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sized))
    page = document(read_view(run_dir))
    assert "attempt 1: host h2: lost; on 2 nodes instead of 3, without h2</td>" in page
    assert "<td>h2</td><td>2026-11-26 10:48:19 UTC</td><td>left out at step 99: host h2: lost &lt;b&gt;</td>" in page
    assert "<td>h2</td><td></td><td>there again, and taken back</td>" in page
    assert 'aria-label="Ranks"' in page


def test_a_run_that_logged_nothing_has_a_page_too(tmp_path: Path) -> None:
    page = document(read_view(tmp_path))
    assert "No step has been logged." in page
    assert Elements(page).count("svg") == 0
    assert document(RunView("j", "r", "lost", started_unix_s=1e300, ended_unix_s=-1e300))


@pytest.mark.parametrize("strange", ["1e999", "-1e999", "NaN", "null", "[]", "1" + 400 * "0", "-5", "1e300"])
def test_no_number_of_a_file_keeps_the_page_from_being_made(tmp_path: Path, strange: str) -> None:
    keys = ("step", "loss", "tokens_per_s", "validation_loss", "counted_s", "loopback_bytes", "time_unix_s")
    lines = [{key: 2.0 for key in keys} | {"step": 7}, *({**dict.fromkeys(keys, 1.0), key: 77.5} for key in keys)]
    rows = "\n".join(json.dumps(line).replace("77.5", strange) for line in lines)
    restart = {"next_attempt": 77.5, "time_unix_s": 77.5}
    ended = {"started_unix_s": 77.5, "ended_unix_s": 77.5, "restarts": [restart]}
    job = {"train": {"steps": 77.5}, "parallel": {"dp": 77.5}}
    for name, told in (("job.json", job), ("exit.json", ended)):
        (tmp_path / name).write_text(json.dumps(told).replace("77.5", strange))
    (tmp_path / "metrics.jsonl").write_text(rows)
    page = document(read_view(tmp_path))
    places = [value for _, found in Elements(page).found for name, value in found.items() if name in PLACES]
    assert places
    assert not re.search("nan|inf", " ".join(map(str, places)))


PLACES = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "d"}


def test_losses_that_are_no_numbers_have_a_page_too() -> None:
    records = tuple({"step": step, "loss": float("nan"), "gradient_norm": float("inf")} for step in range(1, 90))
    elements = Elements(document(RunView("j", "r", "running", records=records)))
    assert elements.count("svg") == 2
