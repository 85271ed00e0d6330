"""Closed-form maps against numpy, scipy and scikit-learn, and on spaces whose map is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes, subspace_angles
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from torch.nn.functional import normalize

from workbench.features import Features, Moments
from workbench.geometry.closed_form import (
    Canonical,
    bilinear,
    canonical,
    factor,
    linear_alignment,
    procrustes,
    ridge,
)

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=40, deadline=None, database=None)
SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # maps are given in single precision


def moments_of(rows: torch.Tensor) -> Moments:
    """Moments as numpy has them, of rows of any norm."""
    return Moments(
        rows.mean(0), torch.from_numpy(np.cov(rows.T, bias=True)).reshape(2 * [rows.shape[1]]), len(rows)
    )


def problem(texts: torch.Tensor, images: torch.Tensor) -> tuple[Moments, Moments, torch.Tensor]:
    cross = (texts - texts.mean(0)).T @ (images - images.mean(0)) / len(texts)
    return moments_of(texts), moments_of(images), cross


def spaces(rows: int = 300, width: int = 5, image_width: int = 7, noise: float = 0.3, seed: int = 0):
    """Unit texts and unit images that are partly a linear map of them, both off the origin."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.double)

    texts = normalize(random(rows, width) + random(width), dim=1)
    images = texts @ random(width, image_width) + noise * random(rows, image_width) + random(image_width)
    return texts, normalize(images, dim=1)


def correlated(
    own: tuple[Moments, Moments, torch.Tensor], strengths: tuple[float, float] = (0.3, 1.0), kept: int = 128
) -> Canonical:
    return canonical(*own, tuple(map(factor, own, strengths)), kept)


def scored(own: tuple[Moments, Moments, torch.Tensor], strengths: tuple[float, float] = (0.3, 1.0)):
    return bilinear(*own, tuple(map(factor, own, strengths)))


def without_mean(weight: np.ndarray, images: torch.Tensor) -> np.ndarray:
    """Take the direction of the mean image out of what a map gives."""
    shared = images.mean(0).numpy() / np.linalg.norm(images.mean(0))
    return weight @ (np.eye(len(shared)) - np.outer(shared, shared))


# --- ridge --------------------------------------------------------------------------------------------------


def test_ridge_by_hand():
    # One text number, -1 and 1 (variance 1); images (0, 2) and (2, 2): covariance with the text (1, 0).
    found = ridge(
        *problem(torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[0.0, 2.0], [2.0, 2.0]]).double()), 1.0
    )
    # (1 + 1)^-1 (1, 0) = (0.5, 0); along the mean image (1, 2) / sqrt 5 that is 0.5 / 5 (1, 2) = (0.1, 0.2).
    torch.testing.assert_close(found.weight, torch.tensor([[0.4, -0.2]]))
    torch.testing.assert_close(found.bias, torch.zeros(2))
    assert found.weight.dtype == torch.float32


@pytest.mark.parametrize("strength", [0.0, 0.1, 3.0])
def test_ridge_is_scikit_learns_but_for_the_mean_direction(strength):
    texts, images = spaces()
    found = ridge(*problem(texts, images), strength)
    # Its penalty is in units of summed squares: rows times strength times the mean variance.
    penalty = len(texts) * strength * texts.var(0, correction=0).mean().item()
    reference = Ridge(alpha=penalty).fit(texts, images)
    expected = without_mean(reference.coef_.T, images)
    np.testing.assert_allclose(found.weight, expected, **SINGLE)
    np.testing.assert_allclose(found.bias, -(texts.mean(0).numpy() @ expected), **SINGLE)


def test_what_is_not_said_is_a_tenth_of_the_mean_variance():
    own = problem(*spaces())
    assert torch.equal(ridge(*own).weight, ridge(*own, 0.1).weight)


def test_a_stronger_ridge_is_shorter():
    sizes = [ridge(*problem(*spaces()), strength).weight.norm().item() for strength in (0.0, 0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 5


# --- what all maps share ------------------------------------------------------------------------------------


def maps(texts: torch.Tensor, images: torch.Tensor):
    own = problem(texts, images)
    return {"ridge": ridge(*own), "procrustes": procrustes(*own), "connector": scored(own)}


@pytest.mark.parametrize("name", ["ridge", "procrustes", "connector"])
@pytest.mark.parametrize(("width", "image_width"), [(5, 7), (7, 5), (4, 4)])
def test_the_mean_text_goes_to_nothing_and_nothing_goes_along_the_mean_image(name, width, image_width):
    texts, images = spaces(width=width, image_width=image_width)
    found = maps(texts, images)[name]
    assert found.weight.shape == (width, image_width)
    assert found.weight.norm() > 0.1
    torch.testing.assert_close(
        found(texts.mean(0, keepdim=True).float()), torch.zeros(1, image_width), **SINGLE
    )
    shared = normalize(images.mean(0), dim=0).float()
    torch.testing.assert_close(found.weight @ shared, torch.zeros(width), **SINGLE)


@pytest.mark.parametrize("name", ["ridge", "procrustes", "connector"])
def test_images_about_the_origin_lose_no_direction(name):
    texts, images = spaces()
    images = images - images.mean(0)
    own = problem(texts, images)
    own = own[0], Moments(torch.zeros(7).double(), own[1].covariance, own[1].count), own[2]
    found = {"ridge": ridge, "procrustes": procrustes, "connector": lambda *two: scored(two)}[name](*own)
    assert torch.linalg.matrix_rank(found.weight, rtol=1e-3) == 5


def test_maps_find_every_image_again_from_real_features_in_16_bits():
    # Texts are images seen through an orthogonal map: what connects them is linear and loses nothing.
    _, images = spaces(rows=400, width=6, image_width=6)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double))[
        0
    ]
    stored = [Features("net", rows.numpy().astype(np.float16), "rows") for rows in (images @ turn, images)]
    half, rest = torch.arange(200), torch.arange(200, 260)
    unit = [one.unit(half).double() for one in stored]
    cross = unit[0].T @ unit[1] / 200 - torch.outer(*(one.mean(0) for one in unit))
    own = *(one.moments(half) for one in stored), cross
    # Compared where maps end: about the mean image, without its direction.
    targets = stored[1].unit(rest) - own[1].mean.float()
    targets = torch.from_numpy(without_mean(targets.numpy(), own[1].mean[None])).float()
    for found in (ridge(*own, 1e-6), procrustes(*own)):
        scores = normalize(found(stored[0].unit(rest)), dim=1) @ normalize(targets, dim=1).T
        torch.testing.assert_close(scores.diagonal(), torch.ones(60), rtol=0, atol=1e-3)  # 11 bits
        assert torch.equal(scores.argmax(1), torch.arange(60))


# --- procrustes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "image_width"), [(5, 5), (4, 6), (6, 4)])
def test_procrustes_is_scipys_but_for_the_mean_direction(width, image_width):
    texts, images = spaces(width=width, image_width=image_width)
    one, two = texts - texts.mean(0), images - images.mean(0)
    widest = max(width, image_width)  # scipy wants equal widths: zeros do not change the products

    def padded(rows: torch.Tensor) -> np.ndarray:
        return np.pad(rows.numpy(), ((0, 0), (0, widest - rows.shape[1])))

    if width == image_width:
        expected = orthogonal_procrustes(one.numpy(), two.numpy())[0]
        np.testing.assert_allclose(
            procrustes(*problem(texts, images)).weight, without_mean(expected, images), **SINGLE
        )
    # The trace of W^T C is the sum of the singular values of C, the largest that any such map reaches.
    gained = np.linalg.svd(padded(one).T @ padded(two), compute_uv=False).sum()
    assert orthogonal_procrustes(padded(one), padded(two))[1] == pytest.approx(gained)
    centred = problem(texts, images)
    centred = centred[0], Moments(torch.zeros(image_width).double(), centred[1].covariance, 1), centred[2]
    weight = procrustes(*centred).weight.double()
    assert (weight * centred[2]).sum() == pytest.approx(gained / len(texts), rel=1e-5)
    small = weight @ weight.T if width <= image_width else weight.T @ weight
    torch.testing.assert_close(small, torch.eye(min(width, image_width)).double(), **SINGLE)


@pytest.mark.parametrize("width", [2, 5])
def test_procrustes_and_ridge_recover_a_planted_rotation(width):
    texts, _ = spaces(width=width)
    turn = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    )[0]
    images = texts @ turn
    expected = without_mean(turn.numpy(), images)
    for found in (procrustes(*problem(texts, images)), ridge(*problem(texts, images), 0.0)):
        np.testing.assert_allclose(found.weight, expected, **SINGLE)


# --- canonical correlations ---------------------------------------------------------------------------------

TINY = (1e-9, 1e-9)


def test_canonical_correlation_by_hand():
    # Texts 1, -1, 1, -1 and images 1, -1, -1, -1 about their means 0 and -0.5: covariance 0.5, variances 1
    # and 0.75, correlation 0.5 / sqrt 0.75. The text goes to its own score times the correlation.
    texts = torch.tensor([[1.0], [-1], [1], [-1]]).double()
    images = torch.tensor([[1.0], [-1], [-1], [-1]]).double()
    found = correlated(problem(texts, images), TINY)
    torch.testing.assert_close(found.correlations, torch.tensor([0.5 / 0.75**0.5]))
    torch.testing.assert_close(found.of_text.weight.abs(), torch.tensor([[0.5 / 0.75**0.5]]))
    torch.testing.assert_close(found.of_image.weight.abs(), torch.tensor([[1 / 0.75**0.5]]))
    # Strengths 1 and 3 double and quadruple the variances: 0.5 / sqrt(2 * 3).
    strong = correlated(problem(texts, images), (1.0, 3.0))
    torch.testing.assert_close(strong.correlations, torch.tensor([0.5 / 6**0.5]))


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_correlations_are_those_of_numpy_and_of_the_found_directions(noise):
    texts, images = spaces(noise=noise)
    found = correlated(problem(texts, images), TINY)
    # The cosines of the angles between the centred column spaces.
    angles = subspace_angles((texts - texts.mean(0)).numpy(), (images - images.mean(0)).numpy())
    np.testing.assert_allclose(found.correlations, np.sort(np.cos(angles))[::-1], **SINGLE)
    one, two = found.of_text(texts.float()).numpy(), found.of_image(images.float()).numpy()
    for place in range(5):
        assert np.corrcoef(one[:, place], two[:, place])[0, 1] == pytest.approx(
            float(found.correlations[place]), abs=1e-4
        )
    np.testing.assert_allclose(np.cov(two.T, bias=True), np.eye(5), atol=1e-3)
    np.testing.assert_allclose(np.cov(one.T, bias=True), np.diag(found.correlations**2), atol=1e-3)
    np.testing.assert_allclose([one.mean(0), two.mean(0)], np.zeros((2, 5)), atol=1e-4)


def test_the_first_direction_is_scikit_learns():
    texts, images = spaces(noise=0.2)
    found = correlated(problem(texts, images), TINY)
    reference = CCA(n_components=1, max_iter=5000, tol=1e-12).fit(texts, images)
    for ours, theirs in zip(
        (found.of_text(texts.float())[:, 0], found.of_image(images.float())[:, 0]),
        reference.transform(texts, images),
        strict=True,
    ):
        # An iteration against a decomposition; the sign is free.
        assert abs(np.corrcoef(ours, theirs[:, 0])[0, 1]) == pytest.approx(1, abs=1e-4)


@quick
@given(seed=st.integers(0, 10**6), strengths=st.tuples(st.floats(1e-6, 5), st.floats(1e-6, 5)))
def test_correlations_lie_between_0_and_1_fall_and_shrink_with_strength(seed, strengths):
    own = problem(*spaces(rows=40, seed=seed))
    plain, loaded = correlated(own, TINY).correlations, correlated(own, strengths).correlations
    for one in (plain, loaded):
        assert (one >= 0).all()
        assert (one <= 1 + 1e-5).all()
        assert (one.diff() <= 1e-6).all()
    assert (loaded <= plain + 1e-5).all()


def test_correlations_do_not_see_invertible_maps_of_either_space():
    texts, images = spaces()
    draw = torch.Generator().manual_seed(5)
    moved = (
        texts @ torch.randn(5, 5, generator=draw, dtype=torch.double),
        images @ torch.diag(torch.arange(1, 8).double()),
    )
    one, two = correlated(problem(texts, images), TINY), correlated(problem(*moved), TINY)
    torch.testing.assert_close(one.correlations, two.correlations, **SINGLE)


def test_fewer_directions_are_the_first_of_all():
    own = problem(*spaces())
    whole, some = correlated(own), correlated(own, kept=2)
    assert (len(whole.correlations), len(some.correlations)) == (5, 2)
    assert torch.equal(some.correlations, whole.correlations[:2])
    assert torch.equal(some.of_text.weight, whole.of_text.weight[:, :2])
    assert torch.equal(some.of_image.weight, whole.of_image.weight[:, :2])


def test_no_more_directions_are_kept_than_there_are_and_128_if_nothing_is_said():
    own = problem(*spaces())
    assert len(correlated(own, kept=6).correlations) == correlated(own, kept=6).of_text.weight.shape[1] == 5
    wide = problem(*spaces(rows=300, width=131, image_width=130))
    found = canonical(*wide, tuple(map(factor, wide, (0.3, 1.0))))
    assert (found.of_text.weight.shape, found.of_image.weight.shape) == ((131, 128), (130, 128))


def test_without_noise_all_correlations_are_one_and_more_strength_lowers_them():
    texts, _ = spaces()
    own = problem(texts, texts @ torch.diag(torch.arange(1, 6).double()))
    torch.testing.assert_close(correlated(own, TINY).correlations, torch.ones(5), **SINGLE)
    assert (correlated(own).correlations < 0.95).all()


def test_a_connector_ranks_images_of_like_norm_as_the_two_sided_score_does():
    texts, images = spaces(rows=500)
    texts_moments, images_moments, cross = problem(texts, images)
    images_moments = Moments(torch.zeros(7).double(), images_moments.covariance, 500)  # nothing is left out
    own = texts_moments, images_moments, cross
    found, connector = correlated(own), scored(own)
    # Images of equal norm in the shared space of all five directions, and of equal norm in their own.
    draw = torch.Generator().manual_seed(2)
    shared = normalize(torch.randn(40, 5, generator=draw, dtype=torch.double), dim=1)
    candidates = shared @ torch.linalg.pinv(found.of_image.weight.double())
    outside = torch.linalg.svd(found.of_image.weight.double().T)[2][5:]
    missing = (10 + candidates.norm(dim=1).max() - candidates.square().sum(1)).sqrt()
    candidates = candidates + missing[:, None] * outside[0]
    mapped, turned = found.of_text(texts.float()), found.of_image(candidates.float())
    two_sided = normalize(mapped, dim=1) @ normalize(turned, dim=1).T
    one_sided = normalize(connector(texts.float()), dim=1) @ normalize(candidates.float(), dim=1).T
    assert turned.norm(dim=1).std() < 1e-4
    assert candidates.norm(dim=1).std() < 1e-4
    # Each text scores all images up to a factor of its own.
    factor = one_sided.norm(dim=1, keepdim=True) / two_sided.norm(dim=1, keepdim=True)
    torch.testing.assert_close(one_sided, factor * two_sided, rtol=1e-3, atol=1e-4)


def test_a_connector_is_the_product_of_both_sides():
    texts, images = spaces()
    found = correlated(problem(texts, images))
    expected = without_mean((found.of_text.weight @ found.of_image.weight.T).numpy(), images.float())
    np.testing.assert_allclose(scored(problem(texts, images)).weight, expected, **SINGLE)


# --- alignment ----------------------------------------------------------------------------------------------


def test_alignment_by_hand():
    # Texts (1, 0), (-1, 0), (0, 1), (0, -1), images 1, -1, 0, 0: C_xx = I / 2, C_zz = 1 / 2, C_xz = (1/2, 0).
    # (1/2)^2 over |I / 2| = sqrt(1/2) times 1/2.
    texts = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).double()
    images = torch.tensor([[1.0], [-1], [0], [0]]).double()
    assert linear_alignment(*problem(texts, images)) == pytest.approx(0.25 / (0.5**0.5 * 0.5))


def kernel_alignment(texts: torch.Tensor, images: torch.Tensor) -> float:
    """The definition: inner product of the two centred kernels over their norms."""
    kernels = []
    for rows in (texts, images):
        centred = (rows - rows.mean(0)).numpy()
        kernels.append(centred @ centred.T)
    one, two = kernels
    return float((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))


@quick
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(3, 40),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_alignment_is_that_of_centred_kernels_between_0_and_1_and_symmetric(seed, rows, widths):
    texts, images = spaces(rows, *widths, seed=seed)
    images[:, 0] += torch.linspace(0, 1, rows)  # width 1 at norm 1 may be constant
    texts[:, 0] += torch.linspace(0, 1, rows) ** 2
    found = linear_alignment(*problem(texts, images))
    assert -1e-12 <= found <= 1 + 1e-12
    assert found == pytest.approx(kernel_alignment(texts, images), abs=1e-9)
    one, two, cross = problem(texts, images)
    assert linear_alignment(two, one, cross.T) == pytest.approx(found)


def test_alignment_is_one_for_a_turned_and_scaled_copy_and_does_not_see_turns():
    texts, images = spaces(width=6, image_width=6)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double))[
        0
    ]
    assert linear_alignment(*problem(texts, 3 * texts @ turn)) == pytest.approx(1)
    plain = linear_alignment(*problem(texts, images))
    assert plain < 0.9
    assert linear_alignment(*problem(texts @ turn, images)) == pytest.approx(plain)
    assert linear_alignment(*problem(texts, images @ turn)) == pytest.approx(plain)
    stretched = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]).double())
    assert linear_alignment(*problem(texts @ stretched, images)) != pytest.approx(plain, abs=0.02)
