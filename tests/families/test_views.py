"""Two views of the same things: rows that belong together, captions drawn among their own, and the splits."""

import numpy as np
import torch

from workbench.datasets.caption_pairs import PairData, load_pairs
from workbench.families import views as module
from workbench.families.views import DIGITS, Views, captioned_photographs, digit_halves


def test_a_drawn_caption_is_one_of_the_things_own_and_all_are_drawn():
    first = torch.arange(12.0).view(4, 3, 1)  # thing n has the captions 3n, 3n + 1, 3n + 2
    views = Views((first, torch.arange(4.0)[:, None]), (first, torch.arange(4.0)[:, None]))
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        captions, things = views.drawn(torch.tensor([2, 0, 2]))
        assert things[:, 0].tolist() == [2, 0, 2]
        assert (captions[:, 0] // 3).tolist() == [2, 0, 2]
        seen |= set(captions[:, 0].tolist())
    assert seen == {0, 1, 2, 6, 7, 8}
    captions, things = views.pairs()
    assert captions[:, 0].tolist() == list(range(12))
    assert torch.equal(captions[:, 0] // 3, things[:, 0])


def test_captions_and_pictures_of_an_image_share_a_row_and_lie_about_the_training_mean(monkeypatch):
    scenes = load_pairs(PairData(source="scenes", name="scenes", train=120, test=50))
    monkeypatch.setattr(module, "load_pairs", lambda data: scenes)
    loaded = {split: captioned_photographs("scenes", "lsa_words", "colour_histogram", split)
              for split in ("valid", "test")}  # fmt: skip
    most = scenes.choices.shape[1]
    for split, one in loaded.items():
        count = len(scenes.splits[split])
        assert one.counts == {
            "train": {"pictures": 120, "captions": 120 * most},
            split: {"pictures": count, "captions": count * most},
        }
        assert one.content.asked[0].shape[:2] == (count, most)
        assert one.content.asked[1].shape[0] == count
    words, pictures = module.read_pair(scenes, "lsa_words", "colour_histogram", largest=128)
    train, asked = scenes.splits["train"], scenes.splits["test"]
    known = words.unit(scenes.choices[train].flatten()).mean(0)
    expected = words.unit(scenes.choices[asked[7]])[0] - known
    found = loaded["test"].content.asked[0][7, 0]
    torch.testing.assert_close(found, expected / expected.norm())
    expected = pictures.unit(asked)[7] - pictures.unit(train).mean(0)
    torch.testing.assert_close(loaded["test"].content.asked[1][7], expected / expected.norm())


def test_halves_of_a_digit_are_one_view_each_and_every_digit_is_in_one_split():
    parts = {split: digit_halves(split).content for split in ("valid", "test")}
    assert parts["valid"].train[0].shape == (DIGITS, 1, 32)
    whole = [torch.cat([one.asked[0][:, 0], one.asked[1]], 1).numpy() for one in parts.values()]
    whole.append(torch.cat([parts["test"].train[0][:, 0], parts["test"].train[1]], 1).numpy())
    rows = np.concatenate(whole)
    assert len(rows) == 1797  # every digit that scikit-learn has, once
