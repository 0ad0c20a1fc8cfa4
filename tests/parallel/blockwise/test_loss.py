"""A loss by blocks is the loss: on unmodified models, in float64, with never more than a block of scores."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshwright.parallel.blockwise.loss import TiledHead, TiledScores, find_heads, tile_loss
from meshwright.parallel.errors import WrapError
from meshwright.parallel.loss import LossItems, items_of_graph
from meshwright.parallel.promote import Promote
from tests.parallel.families import FAMILIES, SPECIAL, lm, made, pictures, words
from tests.parallel.models import VOCABULARY, causal_lm, gpt2, llama

BLOCK = 7
BY_BLOCKS = "cross_entropy by blocks"


class HandWritten(nn.Module):
    """Scores that are cast, scaled, shifted by one position and flattened, with a bias and a position dropped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)
        self.register_buffer("temperature", torch.tensor(1.5))
        self.register_buffer("prior", torch.randn(1, VOCABULARY))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(self.mix(self.table(input_ids)).tanh()).float() / self.temperature
        scores = (scores + self.prior)[..., :-1, :].contiguous().mul_(0.5)
        return nn.CrossEntropyLoss()(scores.view(-1, scores.size(-1)), labels[..., 1:].reshape(-1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "gpt2": (gpt2(), words),
    "llama": (llama(), words),
    "llama, tied": (llama(tie_word_embeddings=True), words),
    "gemma3, capped": (lm("gemma3_text", num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0), words),
    "cohere, scaled": (lm("cohere", num_key_value_heads=2, logit_scale=0.25), words),
    "bart, biased": (
        made(
            "BartForConditionalGeneration",
            "BartConfig",
            **{**SPECIAL, "forced_eos_token_id": None, "use_cache": False},
            **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
        ),
        words,
    ),
    "t5": FAMILIES["t5"],
    "bert": FAMILIES["bert"],
    "modernbert": FAMILIES["modernbert"],
    "whisper": FAMILIES["whisper"],
    "by hand": (HandWritten, words),
}


def _step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(1)
    model.zero_grad()
    with Promote():
        found = model(**{key: each.double() if each.is_floating_point() else each for key, each in batch.items()})
        loss: Tensor = found if isinstance(found, Tensor) else found.loss
        loss.backward()
    return loss.detach(), {name: each.grad for name, each in model.named_parameters()}


def _compare(found: dict[str, Tensor | None], plain: dict[str, Tensor | None], tolerance: float = 1e-12) -> None:
    largest = max(float(each.abs().max()) for each in plain.values() if each is not None)
    for name, gradient in plain.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            assert float((gradient - other).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("in_advance", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_untouched_model(name: str, in_advance: bool) -> None:
    build, batch = MODELS[name]
    loss, plain = _step(build().double(), batch())
    model = build().double()
    heads = tile_loss(model, BLOCK, in_advance=in_advance)
    found_loss, found = _step(model, batch())
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=0)
    _compare(found, plain)
    uses = {use for each in heads.values() for use in each.uses if each.vocabulary == VOCABULARY}
    assert uses == {BY_BLOCKS}


def test_few_classes_and_scores_of_two_dims_are_the_same_too() -> None:
    build, _ = FAMILIES["vit"]
    loss, plain = _step(build().double(), pictures())
    model = build().double()
    heads = tile_loss(model, 2, heads=["classifier"])
    found_loss, found = _step(model, pictures())
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=0)
    _compare(found, plain)
    assert heads["classifier"].uses == {BY_BLOCKS: 1}


class _Scored(TorchDispatchMode):
    """How many rows of scores the largest tensor has that an operation makes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = 0
        self._of_weight = {tuple(weight.shape), tuple(weight.T.shape)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            real = isinstance(each, Tensor) and not each.is_meta  # asking for a shape takes no memory
            if real and VOCABULARY in each.shape and tuple(each.shape) not in self._of_weight:
                self.rows = max(self.rows, each.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize("in_advance", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gemma3, capped", "bart, biased", "by hand"])
def test_no_more_scores_than_a_block_are_ever_there(name: str, in_advance: bool) -> None:
    build, batch = MODELS[name]
    model = build()
    weight = model.get_submodule(find_heads(model)[-1]).weight
    assert isinstance(weight, Tensor)
    with _Scored(weight) as plain:
        model(**batch())
    assert plain.rows > 10 * BLOCK
    tile_loss(model, BLOCK, in_advance=in_advance)
    with _Scored(weight) as seen:
        found = model(**batch())
        (found if isinstance(found, Tensor) else found.loss).backward()
    assert seen.rows == BLOCK


def _head(**settings: Any) -> tuple[nn.Linear, TiledHead]:
    torch.manual_seed(0)
    head = nn.Linear(5, VOCABULARY).double()
    ((_, tiled),) = tile_loss(head, 3, heads=[""], **settings).items()
    return head, tiled


ROWS = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, 5, -100, 9], [-100, -100, 96, 0]])


def _flat(scores: Tensor, **settings: Any) -> Tensor:
    return functional.cross_entropy(scores.reshape(-1, VOCABULARY), LABELS.reshape(-1), **settings)


def _set(scores: Tensor) -> Tensor:
    scores[..., 7] = -30.0
    return _flat(scores)


def _filled(scores: Tensor) -> Tensor:
    scores.masked_fill_(torch.arange(VOCABULARY) == 3, -9.0)
    return _flat(scores * 2)


def _scaled_in_place(scores: Tensor) -> Tensor:
    scores.div_(3.0)
    scores *= torch.tensor([0.5])
    return _flat(scores)


WHOLE = {
    "label smoothing": lambda scores: _flat(scores, label_smoothing=0.1),
    "class weights": lambda scores: _flat(scores, weight=torch.arange(1.0, 98.0, dtype=torch.float64)),
    "probabilities": lambda scores: functional.cross_entropy(scores.view(8, -1), torch.eye(97).double()[:8]),
    "classes second": lambda scores: functional.cross_entropy(scores.transpose(1, 2), LABELS),
    "by hand": lambda scores: functional.nll_loss(scores.log_softmax(-1).flatten(0, 1), LABELS.flatten()),
    "set": _set,
    "filled": _filled,
    "one": lambda scores: functional.cross_entropy(scores[0, 1], LABELS[0, 1]),
    "some classes": lambda scores: _flat(scores) + scores[..., :7].square().mean(),
    "regression": lambda scores: functional.mse_loss(scores, torch.ones_like(scores)),
}


def _by_a_number_that_changes(scores: Tensor) -> Tensor:
    number = torch.tensor(2.0, dtype=torch.float64)
    return _flat(scores * number) if not isinstance(scores, TiledScores) else _late(scores * number, number)


def _late(scores: Tensor, number: Tensor) -> Tensor:
    number.fill_(7.0)
    return _flat(scores)


BLOCKS = {
    "a number that changes": _by_a_number_that_changes,
    "summed": lambda scores: _flat(scores, reduction="sum"),
    "each": lambda scores: _flat(scores, reduction="none").square().sum(),
    "chosen rows": lambda scores: functional.cross_entropy(scores[LABELS != -100], LABELS[LABELS != -100]),
    "listed rows": lambda scores: functional.cross_entropy(scores[0, [2, 1, 1]].tanh(), LABELS[1, [2, 3, 3]]),
    "scaled in place": _scaled_in_place,
    "a part": lambda scores: functional.cross_entropy(
        input=scores[:, 1:].flatten(0, 1).to(torch.float64).contiguous().clone(), target=LABELS[:, :-1].flatten()
    ),
    "twice": lambda scores: _flat(scores) + _flat(scores / 2),
}


@pytest.mark.parametrize("in_advance", [False, True])
@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_whatever_is_done_with_scores_gives_the_same(name: str, in_advance: bool) -> None:
    use: Callable[[Tensor], Tensor] = {**WHOLE, **BLOCKS}[name]
    head, tiled = _head(in_advance=in_advance)
    rows, others = ROWS.clone().requires_grad_(), ROWS.clone().requires_grad_()
    plain = use(functional.linear(rows, head.weight, head.bias))
    expected = torch.autograd.grad(plain, [rows, head.weight, head.bias])
    found = use(head(others))
    torch.testing.assert_close(found.detach(), plain.detach(), rtol=1e-12, atol=1e-14)
    for one, other in zip(torch.autograd.grad(found, [others, head.weight, head.bias]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert (set(tiled.uses) == {BY_BLOCKS}) == (name in BLOCKS)


def test_scores_look_like_scores_and_come_whole_where_they_are_touched() -> None:
    head, tiled = _head()
    scores = head(ROWS.requires_grad_())
    assert isinstance(scores, TiledScores)
    assert (scores.shape, scores.dtype, scores.half().dtype, len(scores)) == (
        (2, 4, VOCABULARY),
        torch.float64,
        torch.float16,
        2,
    )
    assert scores.float() is not scores
    assert scores.double() is scores
    assert {scores: 1}[scores] == 1
    assert repr(scores) == "TiledScores(shape=(2, 4, 97))"
    assert not tiled.uses
    torch.testing.assert_close(scores.argmax(-1), functional.linear(ROWS, head.weight, head.bias).argmax(-1))
    assert not scores.detach().softmax(-1).requires_grad
    assert tiled.uses == {"argmax": 1, "softmax": 1}


def test_a_change_of_scores_that_have_two_names_is_refused() -> None:
    head, _ = _head()
    plain = functional.linear(ROWS, head.weight, head.bias)
    scores = head(ROWS)
    copied = scores[:, 1:].contiguous()
    scores.div_(2.0)
    torch.testing.assert_close(copied.exp(), plain[:, 1:].exp())
    torch.testing.assert_close(scores.exp(), plain.div(2.0).exp())
    part = scores[:, 1:]
    with pytest.raises(WrapError, match="div_ changes scores in place that the model also holds under another name"):
        scores.div_(2.0)
    with pytest.raises(WrapError, match="another name"):
        part[..., 3] = 0.0


def test_items_are_counted_as_torch_counts_them() -> None:
    head, _ = _head()
    with LossItems() as counted:
        loss = _flat(head(ROWS))
        functional.mse_loss(head(ROWS), torch.zeros(2, 4, VOCABULARY, dtype=torch.float64))
    assert items_of_graph(loss) == counted.items(loss) == 5
    assert counted._calls[1][1] == 8 * VOCABULARY


def test_weights_whose_memory_is_gone_are_refused() -> None:
    head, _ = _head()
    scores = head(ROWS)
    head.weight.untyped_storage().resize_(0)
    with pytest.raises(WrapError, match=r"after the memory of the head's weight was given back.*leave the loss out"):
        _flat(scores)


def test_what_is_no_matrix_is_refused_and_blocks_are_left_alone() -> None:
    with pytest.raises(WrapError, match=r"norm \(LayerNorm\) does not multiply by one matrix"):
        tile_loss(nn.ModuleDict({"norm": nn.LayerNorm(4)}), 2, heads=["norm"])
    assert find_heads(gpt2()()) == find_heads(llama()()) == ["lm_head"]
    assert find_heads(causal_lm("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=8)()) == []  # not worth while
