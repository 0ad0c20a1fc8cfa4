"""What ranks inherit is what was named, and nothing of an outer run."""

from meshwright.clusters.environment import inherited, rank_environment


def test_a_star_stands_for_any_end_and_alone_for_everything() -> None:
    found = {"A": "1", "AB": "2", "B": "3"}
    assert inherited(["A*"], found) == {"A": "1", "AB": "2"}
    assert inherited(["A"], found) == {"A": "1"}
    assert inherited(["*"], found) == found
    assert inherited([], found) == {}


def test_an_outer_run_is_not_inherited() -> None:
    assert inherited(["*"], {"MESHWRIGHT_RUN_ID": "outer", "TORCHELASTIC_RUN_ID": "outer", "A": "1"}) == {"A": "1"}


def test_the_plan_wins_over_what_is_inherited_and_secrets_over_both() -> None:
    plan, node = {"inherit": ["*"]}, {"env": [["A", "plan"], ["B", "plan"]]}
    found = rank_environment(plan, node, secrets={"B": "secret"}, environment={"A": "shell", "C": "shell"})
    assert found == {"A": "plan", "B": "secret", "C": "shell"}
