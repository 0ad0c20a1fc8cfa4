"""The table of faults is what was measured, no more and no less."""

import json

from tests.lab.reliability_page import PAGE, RESULTS, page


def test_the_page_is_made_of_the_trials_that_were_run() -> None:
    assert PAGE.read_text() == page(RESULTS), "python -m tests.lab.reliability --write"


def test_every_trial_was_as_it_must_be() -> None:
    trials = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    bad = [each for each in trials if each["left"] or each["lost_steps"] or not each["same"] or not each["named"]]
    assert trials
    assert bad == []
