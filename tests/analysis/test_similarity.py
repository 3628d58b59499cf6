"""How alike two models are on the same texts: CKA, heads and neurons against numpy on everything at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import config, drawn
from matplotlib import image
from transformers import AutoModel
from worlds import WORDS, make_base, make_tokenizer, make_upgraded

from recyclable.analysis import similarity
from recyclable.analysis.similarity import Moments, compare, plot
from recyclable.errors import InputError
from recyclable.weights.team import Team

LAYERS, HEADS, NEURONS = 2, 2, 64


def model(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.nn.Module]:
    root = tmp_path_factory.mktemp("similarity")
    old = make_base(root / "old")
    folders = {"old": old, "new": make_upgraded(old, root / "new"), "stranger": make_base(root / "s", seed=9)}
    return {name: model(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    """Six texts of 1 to 16 words, in three batches, padded."""
    draw, tokenizer = np.random.default_rng(3), make_tokenizer()
    texts = [" ".join(draw.choice(WORDS, size)) for size in (3, 16, 1, 5, 9, 2)]
    return [tokenizer(texts[i : i + 2], padding=True, return_tensors="pt") for i in (0, 2, 4)]


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """By Gram matrices of the examples, centred (HSIC)."""
    centring = np.eye(len(x)) - 1 / len(x)
    k, m = (centring @ z @ z.T @ centring for z in (x, y))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def test_cka_of_streamed_batches_is_that_of_whole_matrices_of_any_widths() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(3, 1, (50, 7)), draw.normal(-2, 2, (50, 4))
    y[:, :2] += x[:, :2] ** 2
    moments = Moments()
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        moments.add(torch.tensor(x[start:stop]), torch.tensor(y[start:stop]))
    assert moments.cka() == pytest.approx(linear_cka(x, y), rel=1e-9)
    turned = Moments()
    turned.add(torch.tensor(x), torch.tensor(5 + 3 * x @ np.linalg.qr(draw.normal(size=(7, 7)))[0]))
    assert turned.cka() == pytest.approx(1)


def told(of: torch.nn.Module, batches: list) -> tuple[list, list, list]:
    """Per layer and token that is no padding: attention rows [A, T], states, activated neurons; by plain calls."""
    rows, states, neurons = ([[] for _ in range(n)] for n in (LAYERS, LAYERS + 1, LAYERS))
    for batch in batches:
        with torch.no_grad():
            out = of(**batch, output_attentions=True, output_hidden_states=True)
            for layer in range(LAYERS):
                inside = of.encoder.layer[layer]
                mixed = inside.attention(out.hidden_states[layer], attention_mask=_bias(batch))[0]
                active = inside.intermediate(mixed)
                for text, token in batch["attention_mask"].nonzero().tolist():
                    rows[layer].append(out.attentions[layer][text, :, token].numpy())
                    neurons[layer].append(active[text, token].numpy())
        for layer in range(LAYERS + 1):
            states[layer] += list(out.hidden_states[layer][batch["attention_mask"].bool()].numpy())
    return rows, states, neurons


def _bias(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (1.0 - batch["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min


def test_heads_states_and_neurons_are_compared_over_real_tokens(bases, batches) -> None:
    found = compare(bases["old"], bases["new"], batches)
    one, other = told(bases["old"], batches), told(bases["new"], batches)
    for layer in range(LAYERS):
        for head in range(HEADS):
            pairs = [(a[head], b[head]) for a, b in zip(one[0][layer], other[0][layer], strict=True)]
            cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
            assert found.heads[layer, head] == pytest.approx(np.mean(cosines), abs=1e-6)
        top = round(0.05 * NEURONS)
        tops = [[set(np.argsort(-v)[:top]) for v in of[2][layer]] for of in (one, other)]
        shared = [len(a & b) / top for a, b in zip(*tops, strict=True)]
        assert found.neurons[layer] == pytest.approx(np.mean(shared), abs=1e-6)
    for layer in range(LAYERS + 1):
        wanted = linear_cka(*(np.stack(of[1][layer]).astype(float) for of in (one, other)))
        assert found.cka[layer] == pytest.approx(wanted, abs=1e-6)


def test_a_model_is_itself_a_descendant_is_close_and_a_stranger_is_not(bases, batches) -> None:
    itself, near, far = (compare(bases["old"], bases[name], batches) for name in ("old", "new", "stranger"))
    for values in vars(itself).values():
        assert np.allclose(values, 1)
    assert near.heads.mean() > far.heads.mean() and near.neurons.mean() > 2 * far.neurons.mean()
    assert (near.cka > far.cka).all()


class Pair(Team):
    """One of two members that run one after the other: the second knows what the first gathered."""

    size = 2

    def __init__(self, rank: int, before: list) -> None:
        self.rank, self.before = rank, before

    def gather(self, value):
        self.before.append(value)
        return list(self.before)


def test_a_team_shares_the_batches_out_and_finds_the_same(bases, batches) -> None:
    gathered: list = []
    for rank in (0, 1):
        together = compare(bases["old"], bases["new"], batches, Pair(rank, gathered))
    alone = compare(bases["old"], bases["new"], batches)
    for one, other in zip(vars(together).values(), vars(alone).values(), strict=True):
        assert np.allclose(one, other, atol=1e-9)
    gathered.clear()
    for rank in (0, 1):  # one batch: the second member has none and takes part all the same
        together = compare(bases["old"], bases["new"], batches[:1], Pair(rank, gathered))
    assert np.allclose(together.heads, compare(bases["old"], bases["new"], batches[:1]).heads)


@pytest.mark.parametrize("family", ["distilbert", "deberta-v2", "modernbert", "gpt2", "opt", "llama", "gemma2"])
def test_neurons_of_any_family_are_what_its_second_matrix_reads(family: str) -> None:
    of = drawn(config(family))
    of.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert [tuple(each.shape) for each in similarity._run(of, batch).neurons] == [(2, 3, 24)] * LAYERS
    assert compare(of, of, [batch]).neurons == pytest.approx(np.ones(LAYERS))


def test_models_of_other_shapes_are_refused(bases, batches, tmp_path: Path) -> None:
    other = model(make_base(tmp_path / "deep", layers=3))
    with pytest.raises(InputError, match=r"\[2, 2\] and \[2, 2, 2\] attention heads"):
        compare(bases["old"], other, batches)
    with pytest.raises(InputError, match="texts: found none"):
        compare(bases["old"], bases["new"], [])


def test_the_heat_map_is_drawn(bases, batches, tmp_path: Path) -> None:
    found = {name: compare(bases["old"], bases[name], batches) for name in ("new", "stranger")}
    plot(found, tmp_path / "similarity.png")
    pixels = image.imread(tmp_path / "similarity.png")
    assert pixels.shape[1] > 800 and pixels.std() > 0.1
    assert similarity.Similarity(**{k: np.array(v) for k, v in found["new"].as_dict().items()}).heads.shape == (2, 2)
