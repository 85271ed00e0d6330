"""Slices by hand, of the real encoder's layers, and a loss that makes slices nest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch.nn.functional import cosine_similarity

from workbench.errors import DataError
from workbench.geometry.slices import depth_embeddings, nested, shallow, slice_scores
from workbench.objectives import in_batch_contrastive, paired_contrastive

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=30, deadline=None, database=None)
TEXTS = ["A red car.", "A much longer sentence about a grey bird that sings at night.", "Soup."]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_deepest_slice_at_full_width_is_the_encoder_itself(encoder):
    found = depth_embeddings(encoder, TEXTS, (0, 3, 6), batch_size=2)
    assert found.shape == (3, 3, 384)
    torch.testing.assert_close(found[2], encoder.encode(TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 3))
    assert (found[0] * found[2]).sum(1).max() < 0.9  # lower layers say something else


def test_depths_the_encoder_does_not_have_are_refused(encoder):
    with pytest.raises(DataError, match=r"0\.\.6"):
        depth_embeddings(encoder, TEXTS, (3, 7))


def test_an_encoder_cut_after_a_layer_reads_what_the_whole_one_has_there_and_leaves_it_as_it_was(encoder):
    whole, known = encoder.encode(TEXTS), encoder.fingerprint
    depths = (0, 3, 6)
    for depth, expected in zip(depths, depth_embeddings(encoder, TEXTS, depths), strict=True):
        cut = shallow(encoder, depth)
        torch.testing.assert_close(cut.encode(TEXTS), expected, atol=1e-5, rtol=0)
        sentences, tokens = cut.encode_with_tokens(TEXTS)
        torch.testing.assert_close(sentences, expected, atol=1e-5, rtol=0)
        assert [len(one) for one in tokens] == encoder.count_tokens(TEXTS)
        # The store keeps vectors by this: those of a lower layer must never be taken for the last one's.
        assert (cut.fingerprint == known) == (depth == 6)
    assert torch.equal(encoder.encode(TEXTS), whole)
    assert encoder.model[0].auto_model.config.num_hidden_layers == 6


def test_a_cut_that_cannot_be_made_is_refused(encoder):
    with pytest.raises(DataError, match=r"0\.\.6 for .*, got 7"):
        shallow(encoder, 7)
    odd = shallow(encoder, 6)
    odd.model[0].auto_model.encoder.layer = torch.nn.Sequential(*odd.model[0].auto_model.encoder.layer)
    with pytest.raises(DataError, match="keeps its 6 layers in no list"):
        shallow(odd, 3)


def test_scores_are_scipys_of_the_cut_embeddings_and_shares_are_of_the_deepest_whole():
    label = np.arange(9.0)
    sides = {2: (drawn(9, 4), drawn(9, 4, seed=1)), 6: (drawn(9, 4, seed=2), drawn(9, 4, seed=3))}
    table = slice_scores(sides, label, (2, 4))
    assert table.select("depth", "width").rows() == [(2, 2), (2, 4), (6, 2), (6, 4)]
    values = []
    for depth, width in table.select("depth", "width").rows():
        cosine = cosine_similarity(*(side[:, :width] for side in sides[depth]))
        values.append(spearmanr(cosine, label).statistic)
    np.testing.assert_allclose(table["spearman"], values)
    np.testing.assert_allclose(table["share"], np.array(values) / values[-1])


@pytest.mark.parametrize("width", [0, 5])
def test_a_width_beyond_the_embeddings_is_refused(width):
    sides = {1: (drawn(3, 4), drawn(3, 4, seed=1))}
    with pytest.raises(DataError, match=f"width {width} is no slice"):
        slice_scores(sides, np.arange(3.0), (width,))


def test_the_nested_loss_by_hand():
    # Slices (3) and (3, 4) of one row against (2) and (2, 0): as unit rows their products are 1 and 0.6.
    first, second = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0, 0.0]]])
    assert float(nested(lambda x, y: (x * y).sum(), first, second, (1,))) == pytest.approx(1)
    assert float(nested(lambda x, y: (x * y).sum(), first, second, (1, 2))) == pytest.approx((1 + 0.6) / 2)


@quick
@given(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), st.integers(0, 10_000))
def test_at_full_width_and_one_depth_the_nested_loss_is_the_loss(depths, rows, width, seed):
    first, second = drawn(depths, rows, width, seed=seed), drawn(depths, rows, width, seed=seed + 1)
    whole = [
        paired_contrastive(*(torch.nn.functional.normalize(side[depth], dim=-1) for side in (first, second)))
        for depth in range(depths)
    ]
    found = nested(paired_contrastive, first, second, (width,))
    torch.testing.assert_close(found, torch.stack(whole).mean())


class Given(torch.nn.Module):
    """Stands for a sentence encoder where embeddings are already there."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["sentence_embedding"]}

    def get_embedding_dimension(self) -> int:
        return 6


class Ranking(torch.nn.Module):
    """The library's contrast on what the encoder it is given yields, one column after the other."""

    def __init__(self, model: Given) -> None:
        super().__init__()
        self.model, self.loss = model, MultipleNegativesRankingLoss(model, scale=4.0)

    def forward(self, columns: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        found = [self.model(column)["sentence_embedding"] for column in columns]
        return self.loss.compute_loss_from_embeddings(found, labels)


@quick
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 10_000))
def test_at_one_depth_the_nested_loss_is_sentence_transformers_mean_over_slices(rows, width, seed):
    ours, theirs = ([drawn(rows, 6, seed=seed + one).double() for one in range(2)] for _ in range(2))
    for side in (*ours, *theirs):
        side.requires_grad_()
    value = nested(lambda x, y: in_batch_contrastive(x, y, 0.25), *(side[None] for side in ours), (width, 6))
    model = Given()
    # The library's is the sum over slices.
    expected = MatryoshkaLoss(model, Ranking(model), [width, 6])(
        [{"sentence_embedding": side} for side in theirs], torch.arange(rows)
    )
    torch.testing.assert_close(2 * value, expected)
    (2 * value).backward()
    expected.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_training_with_the_nested_loss_makes_half_the_entries_score_almost_as_the_whole():
    content = drawn(600, 8)
    views = [content @ drawn(8, 32, seed=seed) + 0.5 * drawn(600, 32, seed=seed + 5) for seed in (1, 2)]

    def recall(widths: tuple[int, ...], kept: int) -> float:
        torch.manual_seed(0)
        towers = torch.nn.ModuleList(torch.nn.Linear(32, 16) for _ in range(2))
        optimiser = torch.optim.Adam(towers.parameters(), 1e-2)
        for _ in range(120):
            rows = torch.randperm(400)[:64]
            one, other = (tower(view[rows])[None] for tower, view in zip(towers, views, strict=True))
            loss = nested(lambda x, y: paired_contrastive(x, y, 20.0), one, other, widths)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            one, other = (
                torch.nn.functional.normalize(tower(view[400:])[:, :kept], dim=1)
                for tower, view in zip(towers, views, strict=True)
            )
        return float(((one @ other.T).argmax(1) == torch.arange(200)).double().mean())

    widths = (4, 8, 16)
    assert recall(widths, 8) >= 0.97 * recall(widths, 16)
    assert recall(widths, 4) > recall((16,), 4) + 0.05
