"""The page in headless Chromium: charts stand, nothing is complained about, nothing is asked of any network."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from meshwright.launch.page.document import Live
from meshwright.launch.page.write import write_page
from tests.launch.page.made import START_S, write_run
from tests.launch.waiting import eventually
from tests.launch.worker.runs import run_dir, start, write_job

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    *("--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>"),  # what the browser itself asks for goes nowhere
)
HOVER = """<script>
const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
const place = {clientX: box.left + box.width / 2, clientY: box.top + 50};
svg.dispatchEvent(new PointerEvent("pointermove", place));
</script>"""


WAIT = """

def wait():
    logged = os.environ["MESHWRIGHT_RUN_DIR"] + "/metrics.jsonl"
    while os.path.exists(logged) and len(open(logged).readlines()) >= 3 and not os.path.exists({go!r}):
        time.sleep(0.05)
"""


class Seen(NamedTuple):
    """What came of opening a page: its document, lines of its console, addresses that it asked for."""

    dom: str
    console: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("NOT TESTED: pages in a browser; `apt install chromium` puts one here")
    return found


def look(chromium: str, page: Path, *more: str) -> Seen:
    """Opens a page in a browser that knows nothing yet."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    words = [chromium, *QUIET, *more, f"--user-data-dir={folder}/profile", f"--log-net-log={folder}/net.json"]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads((folder / "net.json").read_text())["events"]
    asked = [event["params"] for event in events if {"url", "initiator"} <= set(event.get("params", {}))]
    # "not an origin" is the browser itself
    return Seen(done.stdout, console, [each["url"] for each in asked if each["initiator"] != "not an origin"])


def artifacts(tmp_path: Path) -> Path:
    """Where pictures are kept: $MESHWRIGHT_ARTIFACTS, or the test's own folder."""
    folder = Path(os.environ.get("MESHWRIGHT_ARTIFACTS") or tmp_path / "artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(tmp_path: Path) -> Path:
    why = "host node1: the connection was lost; its ranks were ended"
    lost = {"node": "node1", "why": why, "step": 100, "time_unix_s": START_S + 99, "back_unix_s": START_S + 150}
    hot = {"node": "node0", "fault": "GPU 3: 91 C, health.watch.max_temp_c is 88", "time_unix_s": START_S + 120}
    restarts = [
        {"next_attempt": 1, "time_unix_s": START_S + 99, "cause": why, "nodes": [2, 1], "excludes": ["node1"]},
        {"next_attempt": 2, "time_unix_s": START_S + 150, "cause": "rank 1 on node0: killed", "nodes": [1, 2]},
    ]
    first = {"traceback": "Traceback (most recent call last):\n  ...\nValueError: <b>no</b>"}
    ended = {"state": "failed", "reason": "rank 3 on node0 failed first", "first_failure": first}
    ended |= {"restarts": restarts, "excluded": [lost], "health": [hot]}
    run_dir = write_run(tmp_path / "r", job="llama <script>x</script>", **ended)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    sized = [{**row, "ranks": 2 if 100 < row.get("step", 0) <= 150 else 4} for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sized))
    return write_page(run_dir)


def test_the_page_stands_in_a_browser_without_a_complaint_or_a_request(chromium: str, tmp_path: Path) -> None:
    page = write(tmp_path)
    seen = look(chromium, page, "--dump-dom")
    assert (seen.console, seen.requests) == ([], [])
    charts = re.findall(r'<svg [^>]*aria-label="([^"]+)"', seen.dom)
    assert charts[:3] == ["Loss", "Throughput", "Model-FLOP utilisation"]
    assert len(charts) == 11
    assert seen.dom.count('<div class="tip"') == 11, "the script ran: the policy knows it"
    assert "<h1>llama &lt;script&gt;x&lt;/script&gt;</h1>" in seen.dom


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_of_the_page_is_kept(chromium: str, tmp_path: Path, scheme: str) -> None:
    picture = artifacts(tmp_path) / f"page-{scheme}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    look(chromium, write(tmp_path), f"--screenshot={picture}", "--window-size=1240,2000", *dark)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 50_000, "more than an empty sheet"


def test_a_pointer_over_a_chart_shows_the_values_of_its_step(chromium: str, tmp_path: Path) -> None:
    page = write(tmp_path)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", f"{HOVER}</body>"))
    seen = look(chromium, page, "--dump-dom")
    (tip,) = re.findall(r'<div class="tip" style="[^"]*">([^<]+)</div>', seen.dom)
    step = int(re.match(r"step (\d+)\n", tip)[1])  # type: ignore[index]
    assert 115 <= step <= 135, "the middle of 250 steps, but for the margins"
    assert re.search(r"^each step 2\.\d+$", tip, re.MULTILINE)
    assert 'class="needle"' in seen.dom


def test_these_tests_would_see_a_request_and_a_complaint(chromium: str, tmp_path: Path) -> None:
    page = write(tmp_path)
    image = '<img src="http://127.0.0.1:9/x.png">'
    page.write_text(page.read_text().replace("</main>", f"{image}</main>"))
    seen = look(chromium, page, "--dump-dom")
    assert any("Content Security Policy" in line for line in seen.console), "the policy holds"
    assert seen.requests == []
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()))
    assert look(chromium, page, "--dump-dom").requests == ["http://127.0.0.1:9/x.png"]


@pytest.mark.slow
def test_the_page_of_a_run_lives_while_it_goes_on_and_rests_when_it_is_over(chromium: str, tmp_path: Path) -> None:
    job = write_job(tmp_path, parallel="{dp: 1}", steps=6, every=6)
    model, go = tmp_path / "tiny.py", tmp_path / "go"
    text = model.read_text().replace("        hidden = self.embed", "        wait()\n        hidden = self.embed")
    model.write_text(f"import os, time\n{text}{WAIT.format(go=str(go))}")
    run = start(job, "lives", "checkpoint.every_steps=6")
    page = run_dir(job, "lives") / "page.html"
    try:
        told = re.compile(r"<span>step [1-5] of 6</span><span>attempt 0</span>")
        assert eventually(lambda: page.exists() and told.search(page.read_text()) is not None)
        seen = look(chromium, page, "--dump-dom", "--virtual-time-budget=1000")
        assert (seen.console, seen.requests) == ([], [])
        assert 'class="pill running">running<' in seen.dom
        assert 'http-equiv="refresh"' in seen.dom
    finally:
        go.touch()
        output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    seen = look(chromium, page, "--dump-dom")
    assert 'class="pill succeeded">succeeded<' in seen.dom
    assert 'http-equiv="refresh"' not in seen.dom
    assert "attempt 0</span>" not in seen.dom


def test_a_browser_asks_for_a_page_that_lives_again_by_itself(chromium: str, tmp_path: Path) -> None:
    page = write_page(write_run(tmp_path / "r"), state="running", live=Live(0, 1.0))
    page.write_text(page.read_text().replace('content="1"', 'content="1;url=other.html"'))
    (tmp_path / "r/other.html").write_text("<!DOCTYPE html><title>it was asked for</title>")
    seen = look(chromium, page, "--dump-dom", "--virtual-time-budget=5000")
    assert "it was asked for" in seen.dom
