"""A run as one HTML document that loads nothing. Everything that comes from a run is escaped. Pure.

A policy in the document itself lets only its own style and script act, by their digests: what a run might smuggle into
its names or messages could not run or load anything.
"""

import base64
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from meshwright.launch.page.charts import Chart, draw
from meshwright.launch.page.panels import charts, figures
from meshwright.launch.page.read import RunView, points
from meshwright.launch.page.style import SCRIPT, STYLE
from meshwright.launch.page.units import STEP

__all__ = ["Live", "document"]

_STATES = frozenset(["succeeded", "failed", "interrupted", "running", "pending", "lost", "cancelled"])


@dataclass(frozen=True)
class Live:
    """What is said of a run that goes on.

    Args:
        attempt: how often it was started again.
        again_s: after which a browser asks for the page again.
    """

    attempt: int
    again_s: float


def document(view: RunView, live: Live | None = None) -> str:
    """The page of a run.

    Args:
        view: of the run.
        live: where it goes on, and its page is written again.

    >>> "<h1>a &lt;b&gt;</h1>" in document(RunView("a <b>", "r1", "running"))
    True
    """
    parts = (_figures, _failure, _charts, _restarts, _machines, _footer)
    body = "".join([*_header(view, live), *(each for part in parts for each in part(view))])
    again = "" if live is None else f'<meta http-equiv="refresh" content="{math.ceil(live.again_s)}">\n'
    policy = f"default-src 'none'; img-src data:; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(view.name)}: {escape(view.state)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _header(view: RunView, live: Live | None) -> Iterator[str]:
    state = view.state if view.state in _STATES else "unknown"
    yield f'<header><h1>{escape(view.name)}</h1><span class="pill {state}">{escape(view.state)}</span>'
    facts = [*([] if live is None else _standing(view, live)), f"run {view.run_id}", *view.facts]
    if view.started_unix_s is not None:
        facts.append(f"started {_clock(view.started_unix_s)}")
    yield f'<div class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</div></header>\n'


def _standing(view: RunView, live: Live) -> Iterator[str]:
    """How far a run has come that goes on, and as of when."""
    steps = points(view.records, "step")
    done = STEP.text(steps[-1][1]) if steps else "0"
    yield f"step {done}{f' of {STEP.text(view.steps)}' if view.steps else ''}"
    yield f"attempt {live.attempt}"
    yield f"at {_clock(time.time())}"


def _clock(unix_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_s))
    except (OverflowError, ValueError, OSError):
        return "at no time that a clock shows"


def _figures(view: RunView) -> Iterator[str]:
    found = figures(view)
    if not found:
        return
    yield '<dl class="figures">\n'
    for name, value, below in found:
        yield f'<div class="card"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        yield f'<dd class="below">{escape(below)}</dd></div>\n'
    yield "</dl>\n"


def _failure(view: RunView) -> Iterator[str]:
    if not (view.reason or view.failure):
        return
    bad = " failure" if view.state == "failed" else ""
    yield f'<section class="card{bad}"><h2>{escape(view.state.capitalize())}</h2>'
    if view.reason:
        yield f'<p class="reason">{escape(view.reason)}</p>'
    if view.failure:
        yield f"<pre>{escape(view.failure)}</pre>"
    yield "</section>\n"


def _charts(view: RunView) -> Iterator[str]:
    found = charts(view)
    if not found:
        yield '<section class="card empty">No step has been logged.</section>\n'
        return
    yield '<div class="charts">\n'
    for chart in found:
        yield f'<figure class="card{" wide" if chart.wide else ""}">{_caption(chart)}'
        yield f"{draw(chart, view.marks, steps=view.steps)}</figure>\n"
    yield "</div>\n"


def _caption(chart: Chart) -> str:
    keys = "".join(
        f'<span class="c{line.color}"><i class="{line.kind}"></i>{escape(line.label)}</span>' for line in chart.lines
    )
    legend = f'<span class="legend">{keys}</span>' if len(chart.lines) > 1 else ""
    note = f'<span class="note">{escape(chart.note)}</span>' if chart.note else ""
    return f"<figcaption><h2>{escape(chart.title)}</h2>{note}{legend}</figcaption>"


def _restarts(view: RunView) -> Iterator[str]:
    if not view.marks:
        return
    yield '<section class="card"><h2>Restarts</h2><table><tr><th>#</th><th>from step</th><th>at</th><th>cause</th></tr>'
    for count, mark in enumerate(view.marks, start=1):
        when = _when(mark.time_unix_s)
        yield f"<tr><td>{count}</td><td>{mark.step:,.0f}</td><td>{when}</td><td>{escape(mark.text)}</td></tr>"
    yield "</table></section>\n"


def _machines(view: RunView) -> Iterator[str]:
    if not view.machines.events:
        return
    yield '<section class="card"><h2>Machines</h2><table><tr><th>node</th><th>at</th><th>what</th></tr>'
    for each in view.machines.events:
        yield f"<tr><td>{escape(each.node)}</td><td>{_when(each.time_unix_s)}</td><td>{escape(each.text)}</td></tr>"
    yield "</table></section>\n"


def _when(unix_s: float | None) -> str:
    return "" if unix_s is None else _clock(unix_s)


def _footer(view: RunView) -> Iterator[str]:
    told = [f"{len(view.records):,} records of metrics.jsonl; x axes are optimizer steps"]
    if view.ended_unix_s is not None:
        told.append(f"the newest of {_clock(view.ended_unix_s)}")
    yield f"<footer>{escape('; '.join(told))}</footer>\n"
