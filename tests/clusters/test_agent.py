"""Words of a command reach a rank as they were written."""

import json

from hypothesis import given
from hypothesis import strategies as st

from meshwright.clusters.agent import escape

WORD = st.text(st.characters(exclude_characters="\0"), max_size=40)


@given(st.lists(WORD | st.sampled_from(["${local_rank}", "$$", "$local_rank", "a b", "'\"", "\n"]), max_size=6))
def test_any_words_survive_the_way_to_torchs_agent(argv: list[str]) -> None:
    from torch.distributed.elastic.utils import macros

    told = json.loads(json.dumps({"argv": argv}))["argv"]
    assert macros.substitute([escape(word) for word in told], "1") == argv


def test_unescaped_words_would_not() -> None:
    from torch.distributed.elastic.utils import macros

    assert macros.substitute(["$$ ${local_rank}"], "1") == ["$ 1"]
