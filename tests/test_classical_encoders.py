"""Classical encoders: their features against arithmetic and other libraries, and what every encoder keeps."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from skimage.feature import hog, local_binary_pattern
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

from workbench import classical_encoders
from workbench.classical_encoders import (
    CONSTANT,
    IMAGE_NAMES,
    TEXT_NAMES,
    binary_patterns,
    colour_shares,
    cosine_magnitudes,
    fit_image_encoder,
    fit_text_encoder,
    gabor_statistics,
    oriented_gradients,
    patches,
    random_convolutions,
    reduction,
    visual_words,
)
from workbench.datasets.scenes import SceneData, load_scenes
from workbench.errors import DataError

pytestmark = pytest.mark.usefixtures("one_encoder")

WIDTHS = {
    "pixels_pca": 128, "colour_histogram": 320, "hog": 256, "lbp": 252, "frequencies": 128, "gabor": 217,
    "visual_words": 256, "random_convolutions": 256,
}  # fmt: skip
CENTRED = [name for name in IMAGE_NAMES if name not in ("colour_histogram", "lbp")]
# The captions of scenes have 122 words and pairs of words that occur twice and are independent, and 37 words.
TEXT_WIDTHS = {"lsa_words": 122, "lsa_letters": 37, "hashed_words": 256, "word_table": 384}
# Sums of some hundred products in single precision, in another order.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}


@cache
def scenes():
    return load_scenes(SceneData(source="scenes", train=400, test=250))


@cache
def fitted(name):
    train = scenes()[0]
    return (
        fit_image_encoder(name, train.pixels) if name in IMAGE_NAMES else fit_text_encoder(name, train.texts)
    )


def noise(count, side=48, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=rng)


def plain(*colours, side=48):
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, side, side).contiguous()


def of_grey(image):
    """Make an RGB image of a grey one, 0 to 255."""
    return torch.from_numpy(np.asarray(image)).round().byte().expand(1, 3, -1, -1).contiguous()


def luma(image):
    red, green, blue = image.double().numpy()
    return 0.299 * red + 0.587 * green + 0.114 * blue


def same_as_nearest(rows, labels):
    """Share of rows whose nearest other row, by cosine, has the same label."""
    cosines = normalize(rows) @ normalize(rows).T
    return float((labels[cosines.fill_diagonal_(-2).argmax(1)] == labels).float().mean())


# --- what every encoder of images keeps ---------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_images_of_any_side_become_rows_of_one_width(name):
    for side in (32, 48, 75, 224):
        rows = fitted(name)(noise(3, side))
        assert rows.shape == (3, WIDTHS[name])
        assert rows.dtype == torch.float32
        assert rows.isfinite().all()
        assert (rows.norm(dim=1) > CONSTANT / 2).all()
    assert fitted(name)(noise(0)).shape == (0, WIDTHS[name])


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_images_of_one_colour_and_the_average_image_have_rows_that_are_not_zero(name):
    pixels = torch.cat([
        plain((0, 0, 0), (255, 255, 255), (119, 119, 119), (255, 0, 0)),
        scenes()[0].pixels.float().mean(0, keepdim=True).round().byte(),
    ])  # fmt: skip
    rows = fitted(name)(pixels)
    assert rows.isfinite().all()
    assert (rows.norm(dim=1) > CONSTANT / 2).all()


@pytest.mark.parametrize("name", CENTRED)
def test_centred_rows_end_in_the_constant_and_have_a_root_mean_square_norm_of_one(name):
    rows = fitted(name)(scenes()[0].pixels)
    assert (rows[:, -1] == CONSTANT).all()
    torch.testing.assert_close(rows[:, :-1].mean(0), torch.zeros(WIDTHS[name] - 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows[:, :-1].square().sum(1).mean(), torch.tensor(1.0), **SINGLE)


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_a_seed_fixes_an_image_encoder_and_global_random_numbers_stay_the_same(name):
    pixels, asked = scenes()[0].pixels[:40], scenes()[1]["test"].pixels[:5]
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (fit_image_encoder(name, pixels, seed=3)(asked) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert torch.equal(first, second)
    if name in ("visual_words", "random_convolutions"):
        assert not torch.allclose(fit_image_encoder(name, pixels, seed=4)(asked), first, atol=0.01)


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_an_image_has_the_same_row_alone_in_a_batch_and_in_parts(name, monkeypatch):
    pixels = scenes()[1]["test"].pixels[:7]
    kept = pixels.clone()
    rows = fitted(name)(pixels)
    assert torch.equal(pixels, kept)
    torch.testing.assert_close(fitted(name)(pixels[4:5]), rows[4:5], **SINGLE)
    monkeypatch.setattr(classical_encoders, "_TOGETHER", 3)
    torch.testing.assert_close(fitted(name)(pixels), rows, **SINGLE)
    assert torch.pdist(normalize(rows)).min() > 0.01


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_eight_images_are_enough_and_seven_are_not(name):
    rows = fit_image_encoder(name, noise(8, 32))(noise(3, 32, seed=1))
    # Eight rows span seven dimensions around their mean; the eighth column is the constant.
    reduced = name in ("pixels_pca", "hog", "visual_words")
    assert rows.shape == (3, 8 if reduced else WIDTHS[name])
    with pytest.raises(DataError, match=f"7 training images are too few to fit {name}; give at least 8"):
        fit_image_encoder(name, noise(7, 32))


def test_of_many_images_a_draw_is_looked_at(monkeypatch):
    monkeypatch.setattr(classical_encoders, "MOST", 16)
    first, other = (fit_image_encoder("pixels_pca", noise(60), seed)(noise(3)) for seed in (0, 1))
    assert first.shape == (3, 16)  # 15 dimensions and the constant
    assert not torch.allclose(first, other, atol=0.01)


@pytest.mark.parametrize("name", CENTRED)
def test_training_images_that_are_all_alike_are_refused(name):
    with pytest.raises(DataError, match="all look the same to this encoder; give images that differ"):
        fit_image_encoder(name, noise(1).expand(9, -1, -1, -1))


@pytest.mark.parametrize("name", ["hog", "gabor"])
def test_what_looks_at_edges_refuses_training_images_without_any(name):
    with pytest.raises(DataError, match="all look the same"):
        fit_image_encoder(name, plain(*[(level, 255 - level, 90) for level in range(20)]))


@pytest.mark.parametrize(
    "pixels",
    [noise(9).float(), noise(9)[:, :1], noise(9)[0], noise(9)[:, :, :40], noise(9, 31)],
    ids=["floats", "grey", "one image", "not square", "small"],
)
def test_other_than_square_rgb_bytes_are_refused(pixels):
    # Called by itself: under test, the annotation of the functions around it refuses some of these before.
    with pytest.raises(DataError, match=r"pixels are .*; give uint8 \(images, 3, side, side\), side >= 32"):
        classical_encoders._check_pixels(pixels)


def test_images_are_checked_before_fitting_and_before_encoding():
    for refuse in (fitted("pixels_pca"), lambda pixels: fit_image_encoder("pixels_pca", pixels)):
        with pytest.raises(DataError, match=r"\(9, 3, 31, 31\); give"):
            refuse(noise(9, 31))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        DataError, match="image encoder named 'sift'; there are: pixels_pca, colour_histogram"
    ):
        fit_image_encoder("sift", noise(8))
    with pytest.raises(DataError, match="text encoder named 'glove'; there are: lsa_words, .*word_table"):
        fit_text_encoder("glove", ["a"] * 8)


# Leave-one-out nearest neighbours among 250 scenes; chance is 1 / 8 for colour, 1 / 6 for shape, 1 / 3 for
# texture and for count, 1 / 5 for place. Floors lie well below what was seen, ceilings near chance.
@pytest.mark.parametrize(
    ("name", "attribute", "floor"),
    [
        ("pixels_pca", "place", 0.8), ("colour_histogram", "colour", 0.6), ("hog", "shape", 0.38),
        ("hog", "count", 0.7), ("lbp", "texture", 0.48), ("lbp", "place", 0.9),
        ("frequencies", "texture", 0.5), ("gabor", "texture", 0.55), ("visual_words", "place", 0.8),
        ("random_convolutions", "colour", 0.35),
    ],
)  # fmt: skip
def test_the_nearest_scene_shows_the_same(name, attribute, floor):
    asked = scenes()[1]["test"]
    labels = {one.name: one.label for one in asked.sets}
    rows = fitted(name)(asked.pixels)
    assert same_as_nearest(rows, labels[attribute]) > floor
    if name in ("hog", "lbp"):
        assert same_as_nearest(rows, labels["colour"]) < 0.25


# --- features of images -------------------------------------------------------------------------------------


def test_pixels_are_projected_on_their_principal_components():
    train, asked = scenes()[0].pixels, scenes()[1]["test"].pixels[:20]
    # 48 to 16 pixels: each is the mean of 3 x 3, rounded to a level.
    small = [
        (part.double().unflatten(3, (16, 3)).unflatten(2, (16, 3)).mean((3, 5)).round() / 255).flatten(1)
        for part in (train, asked)
    ]
    reference = PCA(127, svd_solver="full").fit(small[0].numpy())
    wanted, found = torch.from_numpy(reference.transform(small[1].numpy())), fitted("pixels_pca")(asked)
    scale = math.sqrt(reference.explained_variance_.sum() * 399 / 400)  # divides by n - 1
    # Signs are free, and the search is randomised: of 127 components the first 20 are settled to 1 %.
    found = (found[:, :20] * scale).abs().double()
    torch.testing.assert_close(found, wanted[:, :20].abs(), rtol=0.01, atol=0.01)


def test_features_are_divided_by_their_deviations_and_one_that_is_constant_in_training_is_bounded():
    deviations = torch.tensor([2.0, 1.0, 0.5, 0.0])
    # Columns of +-1 that are independent: their deviations are exactly these.
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, -1, 1], [-1, 1, -1, 1], [-1, -1, 1, 1]])
    reduce = reduction(signs * deviations + 7, None)
    rows = reduce(signs * deviations + 7)
    # A thousandth of the largest is added: 1 / (1 + 0.002), 0.5 / (0.5 + 0.002); then the norm becomes 1.
    wanted = torch.tensor([2 / 2.002, 1 / 1.002, 0.5 / 0.502])
    torch.testing.assert_close(rows[:, :3], signs[:, :3] * wanted / wanted.norm(), **SINGLE)
    assert (rows[:, 3] == 0).all()
    changed = reduce(torch.tensor([[7, 7, 7, 7.002]]))[0]  # by one of what is added
    assert float(changed[3]) == pytest.approx(1 / float(wanted.norm()), rel=1e-3)


@pytest.mark.parametrize("side", [33, 75, 224])
def test_images_are_resized_to_whole_levels_of_the_same_mean(side):
    pixels = noise(2, side)
    found = classical_encoders._resized(pixels, 48)
    assert (found == found.round()).all()
    assert found.shape == (2, 3, 48, 48)
    # Corners weigh less or more than the middle where the sides do not divide each other.
    assert float((found.mean() - pixels.float().mean()).abs()) < 2


def test_an_image_of_one_colour_has_one_colour_in_each_region():
    # (200, 100, 30) // 64 = (3, 1, 0), 16 * 3 + 4 * 1 + 0 = 52; five regions of 64 colours.
    for side in (32, 48, 90):
        row = colour_shares(plain((200, 100, 30), side=side))[0]
        assert row.nonzero().flatten().tolist() == [52, 64 + 52, 128 + 52, 192 + 52, 256 + 52]
        assert (row[row > 0] == 1).all()


def test_regions_are_the_image_and_its_quarters_in_reading_order():
    pixels = plain((0, 0, 0))
    pixels[:, :, :24, 24:] = 255  # the upper right
    row = colour_shares(pixels)[0].reshape(5, 64)
    # A quarter of the image is white: the roots of 3/4 and 1/4.
    torch.testing.assert_close(row[0, [0, 63]], torch.tensor([0.75, 0.25]).sqrt())
    assert row[1:, 63].tolist() == [0, 1, 0, 0]
    assert row[1:, 0].tolist() == [1, 0, 1, 1]


def test_gradients_are_those_of_scikit_image():
    image = noise(1, 64)
    wanted = hog(luma(image[0]) / 255, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
    torch.testing.assert_close(oriented_gradients(image)[0].double(), torch.from_numpy(wanted), **SINGLE)


def test_binary_patterns_are_those_of_scikit_image_away_from_the_border():
    image = noise(1)
    grey, counts = luma(image[0]).round().astype(int), []
    for points, radius in ((8, 1), (16, 2)):
        codes = local_binary_pattern(grey, points, radius, "uniform")[16:32, 16:32].astype(int)
        counts.append(np.bincount(codes.flatten(), minlength=points + 2))
    row = binary_patterns(image)[0]
    middle = [row[: 9 * 10].reshape(9, 10)[4], row[9 * 10 :].reshape(9, 18)[4]]
    for found, count in zip(middle, counts, strict=True):
        torch.testing.assert_close(found.square() * 256, torch.from_numpy(count).float(), **SINGLE)


@pytest.mark.parametrize("level", [0, 77, 119, 255])
def test_binary_patterns_of_flat_images_are_the_flat_one_whatever_the_level(level):
    # No neighbour is darker: pattern 8 of 0..9 and 16 of 0..17, where scikit-image has others for 77 and 119.
    row = binary_patterns(plain((level, level, level)))[0]
    assert row.nonzero().flatten().tolist() == [
        *(10 * cell + 8 for cell in range(9)), *(90 + 18 * cell + 16 for cell in range(9))
    ]  # fmt: skip


def test_binary_patterns_do_not_change_with_brightness():
    image = noise(1) // 2
    assert torch.equal(binary_patterns(image), binary_patterns(image + 100))


def test_cosine_magnitudes_follow_their_definition():
    image = noise(1, 32)
    grey, row = luma(image[0]) / 255, cosine_magnitudes(image)[0]
    # Place -> frequencies of rows and columns, by their sum: 1 + 2 + ... + 15 = 120 have one below 15.
    places = {0: (0, 0), 1: (0, 1), 2: (1, 0), 4: (1, 1), 120: (0, 15), 126: (6, 9)}
    for place, pair in places.items():
        waves = [[math.cos(math.pi * (at + 0.5) * frequency / 32) for at in range(32)] for frequency in pair]
        size = math.prod(math.sqrt((2 if frequency else 1) / 32) for frequency in pair)
        wanted = size * abs(np.outer(*waves).ravel() @ grey.ravel())
        assert float(row[place]) == pytest.approx(wanted, abs=1e-5)


def test_a_white_image_has_a_mean_and_no_other_frequency():
    row = cosine_magnitudes(plain((255, 255, 255)))[0]
    assert float(row[0]) == pytest.approx(32, abs=1e-4)  # the root of 32 * 32 values of 1
    torch.testing.assert_close(row[1:], torch.zeros(126), rtol=0, atol=1e-4)


@pytest.mark.parametrize("wavelength", [3, 6, 12])
@pytest.mark.parametrize("turn", range(4))
def test_a_wave_is_answered_by_the_filter_of_its_length_and_direction(wavelength, turn):
    rows, columns = np.mgrid[:48, :48]
    along = columns * math.cos(turn * math.pi / 4) + rows * math.sin(turn * math.pi / 4)
    wave = of_grey(127.5 + 102 * np.cos(2 * math.pi * along / wavelength))
    # Wavelengths, mean and deviation, directions, cells.
    parts = gabor_statistics(wave)[0].reshape(3, 2, 4, 9)
    means, deviations = parts[:, 0, :, 4], parts[:, 1, :, 4]
    assert divmod(int(means.argmax()), 4) == ((3, 6, 12).index(wavelength), turn)
    # A wave of amplitude 0.4 has 0.2 of each of exp(+-i): all of it answers, but for the cut at 2 deviations.
    assert 0.85 * 0.2 < float(means.max()) < 1.01 * 0.2
    assert float(deviations.flatten()[means.argmax()]) < 0.02


def test_a_flat_image_is_answered_by_no_gabor_filter():
    assert gabor_statistics(plain((90, 90, 90), (255, 255, 255))).abs().max() < 1e-6


def test_patches_are_cut_in_reading_order_and_normalised():
    image = noise(1, 32)
    found = patches(image)[0]
    assert found.shape == (13 * 13, 192)
    for row, column in ((0, 0), (3, 11), (12, 12)):
        cut = image[0, :, 2 * row : 2 * row + 8, 2 * column : 2 * column + 8].double().flatten()
        wanted = (cut - cut.mean()) / (cut.var(correction=0) + 10).sqrt()
        torch.testing.assert_close(found[13 * row + column].double(), wanted, **SINGLE)
    assert patches(plain((77, 77, 77))).abs().max() == 0


def test_words_are_counted_by_how_much_nearer_they_are_than_the_average_word(monkeypatch):
    seen = []

    class FirstPatches:
        """Takes the first patches as words."""

        def __init__(self, count, **_):
            self.count = count

        def fit(self, rows):
            seen.append(rows)
            self.cluster_centers_ = rows[: self.count]
            return self

    monkeypatch.setattr(classical_encoders, "MiniBatchKMeans", FirstPatches)
    monkeypatch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
    pixels = noise(10, 32)
    row = visual_words(pixels, 0)(pixels[2:3])[0].reshape(256, 2, 2)
    [white] = seen
    # Whitened: no mean, and a covariance of size / (size + 0.1), near 1 where noise has size 1; except along
    # the mean of a patch, which is always zero.
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    sizes = np.linalg.eigvalsh(np.cov(white.T))
    assert sizes[0] < 1e-6
    assert 0.75 < sizes[1] < sizes[-1] < 1
    own = white[2 * 169 : 3 * 169].reshape(13, 13, 192)
    for (down, across), places in {(0, 0): np.s_[:7, :7], (1, 0): np.s_[6:, :7]}.items():
        total = np.zeros(256)
        for patch in own[places].reshape(-1, 192):
            distances = np.linalg.norm(white[:256] - patch, axis=1)
            total += np.maximum(0, distances.mean() - distances)
        # Distances of 10 come from squares in single precision.
        np.testing.assert_allclose(row[:, down, across], total / 49, rtol=1e-3, atol=1e-3)


def test_random_convolutions_are_those_of_scipy_with_the_weights_of_the_seed():
    image, rng = noise(1, 32), torch.Generator().manual_seed(5)
    maps = image[0].double().numpy() / 127.5 - 1
    for outputs, inputs, side in ((32, 3, 5), (64, 32, 3), (51, 64, 3)):
        weights = (
            torch.randn(outputs, inputs, side, side, generator=rng).double() * (2 / inputs / side**2) ** 0.5
        )
        biases = 0.1 * torch.randn(outputs, generator=rng)
        if inputs > 3:
            half = maps.shape[1] // 2
            maps = maps.reshape(inputs, half, 2, half, 2).mean((2, 4))
        sums = [
            sum(correlate2d(one, kernel, "same") for one, kernel in zip(maps, kernels, strict=True)) + bias
            for kernels, bias in zip(weights.numpy(), biases.numpy(), strict=True)
        ]
        maps = np.maximum(0, np.stack(sums))
    wanted = [*maps.reshape(51, 2, 4, 2, 4).mean((2, 4)).flatten(), *maps.max((1, 2))]
    torch.testing.assert_close(random_convolutions(5)(image)[0].double(), torch.tensor(wanted), **SINGLE)


# --- what every encoder of texts keeps ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_texts_become_rows_of_one_width_that_are_not_zero(name):
    asked = [
        *scenes()[0].texts[:20],
        "",
        "?!",
        "☃",
        "a thing nobody described",
        "\N{CJK UNIFIED IDEOGRAPH-6F22}",
    ]
    rows = fitted(name)(asked)
    assert rows.shape == (25, TEXT_WIDTHS[name])
    assert rows.dtype == torch.float32
    assert rows.isfinite().all()
    assert (rows.norm(dim=1) > 1e-3).all()
    assert fitted(name)([]).shape == (0, TEXT_WIDTHS[name])


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_text_of_unknown_words_only_gets_the_mean_row_of_the_training_texts(name):
    texts = [*scenes()[0].texts[:60], "☃"]
    encode = fit_text_encoder(name, texts)
    mean = encode(texts[:-1]).mean(0)
    for unknown in ("", "☃", " "):
        torch.testing.assert_close(encode([texts[0], unknown])[1], mean, **SINGLE)
    if name.startswith("lsa"):
        torch.testing.assert_close(encode(["zzyzx qwrtp"])[0], mean, **SINGLE)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_seed_fixes_a_text_encoder_and_global_random_numbers_stay_the_same(name):
    texts = scenes()[0].texts[:60]
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (fit_text_encoder(name, texts, seed=3)(texts) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert torch.equal(first, second)
    if name == "hashed_words":
        assert not torch.allclose(fit_text_encoder(name, texts, seed=4)(texts), first, atol=0.01)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_text_has_the_same_row_alone_and_in_a_batch(name):
    texts = scenes()[0].texts[:30:3]
    rows = fitted(name)(texts)
    torch.testing.assert_close(fitted(name)(texts[4:5]), rows[4:5], **SINGLE)
    assert torch.pdist(normalize(rows)).min() > 0.01


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_eight_texts_are_enough_and_seven_are_not(name):
    texts = ["a dog", "a cat", "two dogs", "two cats", "a sun", "a moon", "two suns", "two moons"]
    rows = fit_text_encoder(name, texts)(["a dog", "two moons"])
    if name == "lsa_words":  # "a" and "two" occur twice, pairs do not: less than two dimensions are asked for
        assert rows.shape[1] == 1
    if name == "lsa_letters":
        assert 2 <= rows.shape[1] < 8
    with pytest.raises(DataError, match=f"7 training texts are too few to fit {name}; give at least 8"):
        fit_text_encoder(name, texts[:7])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lsa_words", "no part of a text occurs in two training texts; give more texts"),
        ("lsa_letters", "no part of a text occurs in two training texts; give more texts"),
        ("hashed_words", "hashed_words knows no word of the training texts; give texts in words"),
        ("word_table", "word_table knows no word of the training texts; give texts in words"),
    ],
)
def test_texts_without_words_are_refused(name, message):
    with pytest.raises(DataError, match=message):
        fit_text_encoder(name, ["", " "] * 4)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_captions_of_one_meaning_are_nearer_than_others(name):
    # 143 meanings, each in three wordings. Chance is 0.5; 0.976 to 0.999 were seen.
    train = scenes()[0]
    rows, same = normalize(fitted(name)(train.texts)), train.meaning[:, None] == train.meaning
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    assert roc_auc_score(same[apart], (rows @ rows.T)[apart]) > 0.95


# --- features of texts --------------------------------------------------------------------------------------


def rarity_weighted(texts):
    """Cosines of tf-idf rows by their definition: words and pairs of words, at least in two texts."""
    split = [text.lower().split() for text in texts]
    terms = [[*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))] for words in split]
    found = {term: sum(term in one for one in terms) for one in terms for term in one}
    kept = sorted(term for term, count in found.items() if count >= 2)
    table = torch.zeros(len(texts), len(kept), dtype=torch.double)
    for row, one in enumerate(terms):
        for column, term in enumerate(kept):
            if term in one:
                rarity = math.log((1 + len(texts)) / (1 + found[term])) + 1
                table[row, column] = (1 + math.log(one.count(term))) * rarity
    table = normalize(table)
    return table @ table.T


def test_lsa_keeps_the_cosines_of_tf_idf_when_no_dimension_is_dropped():
    texts = [*scenes()[0].texts[:80], "two two red things", "red red red and two stars"]
    rows = fit_text_encoder("lsa_words", texts)(texts)
    assert rows.shape[1] < 81  # what the texts span: fewer than would be cut
    torch.testing.assert_close((rows @ rows.T).double(), rarity_weighted(texts), rtol=0, atol=1e-5)


def test_principal_directions_are_the_first_singular_vectors_and_none_that_is_noise():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 40)) @ np.diag(0.8 ** np.arange(40)) @ rng.normal(size=(40, 40))
    found = classical_encoders._principal(torch.from_numpy(rows).float(), 5).numpy()
    wanted = np.linalg.svd(rows)[2][:5].T
    np.testing.assert_allclose(np.abs((found * wanted).sum(0)), 1, atol=1e-3)
    # Ten rows twice span ten dimensions, however many are asked for.
    twice = torch.from_numpy(np.tile(rows[:10], (2, 1))).float()
    assert classical_encoders._principal(twice, 30).shape == (40, 10)


def test_letters_recognise_a_misspelt_word_and_words_do_not():
    asked = ["turquois thing", "turquoise thing", "orange thing", "yellow thing"]
    letters, words = (normalize(fitted(name)(asked)) for name in ("lsa_letters", "lsa_words"))
    assert letters[0] @ letters[1] > letters[0] @ letters[2:].T.amax(1) + 0.1
    torch.testing.assert_close(words[0] @ words[2], words[0] @ words[3], rtol=0, atol=0.15)


def test_hashed_words_have_about_the_cosines_of_tf_idf():
    texts = scenes()[0].texts[:200]
    rows = normalize(fit_text_encoder("hashed_words", texts)(texts)).double()
    apart = ~torch.eye(200, dtype=torch.bool)
    # All terms occur twice here, but for some pairs; a random projection to 256 errs by 1 / 16.
    found, wanted = (rows @ rows.T)[apart], rarity_weighted(texts)[apart]
    assert np.corrcoef(found, wanted)[0, 1] > 0.9
    assert float((found - wanted).square().mean().sqrt()) < 2 / 16


def test_every_hashed_word_has_a_row_of_its_own():
    rows = fitted("hashed_words")(["", *(f"word{number}" for number in range(300))])
    # Of 300 words in 16384 places, about 300 * 299 / 2 / 16384 = 3 share one.
    assert len(rows.unique(dim=0)) > 290


def test_a_word_counts_by_how_rare_it_is_in_the_training_texts(encoder):
    encode = fit_text_encoder("word_table", ["dog"] * 6 + ["cat"] * 2)
    numbers = encoder.model.tokenizer.convert_tokens_to_ids(["dog", "cat", "sun"])
    dog, cat, sun = encoder.model[0].auto_model.embeddings.word_embeddings.weight[numbers]
    # Shares of tokens: dog 6 / 8, cat 2 / 8, sun 0, which counts fully.
    wanted = [
        dog * 0.001 / 0.751,
        (dog * 0.001 / 0.751 + cat * 0.001 / 0.251) / 2,
        (2 * sun + cat * 0.001 / 0.251) / 3,
    ]
    found = encode(["dog", "Dog cat", "sun cat sun"])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-8)
    # Special tokens and unknown letters are left out; nothing is cut at the window of 256 tokens.
    torch.testing.assert_close(encode(["[CLS] dog ☃ [SEP]"]), found[:1], rtol=1e-5, atol=1e-8)
    long = encode(["cat " * 600 + "sun"])[0]
    torch.testing.assert_close(long, (600 * cat * 0.001 / 0.251 + sun) / 601, rtol=1e-4, atol=1e-7)
