"""Encoders of images and of texts that need no pretrained weights: fitted in seconds, without labels.

They are the plain members of a zoo of encoders, beside the real ones of :mod:`workbench.image_encoders` and
:mod:`workbench.encoders`; ``word_table`` reads the word vectors of the packaged MiniLM, nothing else of it.
All run on the CPU. Rows are not of unit norm, but never zero: centred features of images get a constant as
last column, histograms have a fixed norm, and a text of unknown words only gets the training's mean row.

Shape letters: B batch, N training items, S side in pixels, D width of an encoder, F features before their
reduction, P patches, G cells along a side.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.fft import dctn
from skimage.feature import hog
from skimage.filters import gabor_kernel
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import SparseRandomProjection
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from workbench.encoders import TextEncoder
from workbench.errors import DataError
from workbench.static_encoder import StaticEncoder

FEWEST = 8  # training items
MOST = 5000  # training images looked at: fitting to a seeded draw of more would take minutes
CONSTANT = 0.1  # the last column, where the others have a root mean square norm of 1
ZERO = 1e-6  # what is smaller holds rounding errors only
_TOGETHER = 256  # images described at once: bounds the memory
_WORDS = {"ngram_range": (1, 2), "token_pattern": r"\w+"}  # with "a" and "3", which the default leaves out

Pixels = UInt8[Tensor, "B 3 S S"]
ImageFeatures = Callable[[Pixels], Float[Tensor, "B D"]]
TextFeatures = Callable[[list[str]], Float[Tensor, "B D"]]


def reduction(features: Float[Tensor, "N F"], width: int | None) -> Callable[[Tensor], Tensor]:
    """Fit a centred linear map (B, F) -> (B, D), whose last column is constant.

    The other columns have a root mean square norm of 1 in training; the constant keeps an image like the mean
    from being rounding errors only. With a ``width``, they are principal components, as many as the training
    rows span and at most ``width`` - 1. With None, they are the features divided by their deviations.
    """
    centre = features.mean(0)
    centred = features - centre
    if centred.norm(dim=1).max() <= ZERO * features.norm(dim=1).max().clamp(min=1):
        raise DataError("the training images all look the same to this encoder; give images that differ")
    if width:
        matrix = _principal(centred, width - 1)
    else:
        deviation = centred.square().mean(0).sqrt()
        matrix = torch.diag(1 / (deviation + 1e-3 * deviation.max()))  # the sum: no division by nearly zero
    matrix = matrix / (centred @ matrix).square().sum(1).mean().sqrt()
    return lambda rows: functional.pad((rows - centre) @ matrix, (0, 1), value=CONSTANT)


def _principal(centred: Float[Tensor, "N F"], most: int) -> Float[Tensor, "F D"]:
    """Return principal directions of centred rows: fewer than rows and than features, none that is noise."""
    squares, directions = torch.linalg.eigh(centred.T.double() @ centred.double())  # smallest first
    count = max(1, min(most, *(size - 1 for size in centred.shape)))
    kept = squares[-count:] > 1e-10 * squares[-1]
    return directions[:, -count:][:, kept].flip(1).float()


# --- images -------------------------------------------------------------------------------------------------


def _resized(pixels: Pixels, side: int) -> Float[Tensor, "B 3 side side"]:
    """Bring images to a side, larger ones by averaging; 0 to 255, rounded so that flat areas stay flat."""
    how = {"mode": "area"} if pixels.shape[-1] >= side else {"mode": "bilinear", "align_corners": False}
    return functional.interpolate(pixels.float(), (side, side), **how).round()


def grey(pixels: Pixels, side: int) -> Float[Tensor, "B side side"]:
    """Bring images to a side and to luma, 0 to 1 (ITU-R BT.601)."""
    return torch.einsum("bchw,c->bhw", _resized(pixels, side), torch.tensor([0.299, 0.587, 0.114])) / 255


def root_shares(codes: Int[Tensor, "B S S"], kinds: int, grid: int) -> Float[Tensor, "B G_G_kinds"]:
    """Return the root of the share of each kind of pixel in each cell of a grid; ``grid`` divides S."""
    cell = codes.shape[-1] // grid
    cells = functional.unfold(codes[:, None].float(), cell, stride=cell).transpose(1, 2).long()
    counts = torch.zeros(*cells.shape[:2], kinds).scatter_add_(2, cells, torch.ones(cells.shape))
    return (counts / cell**2).sqrt().flatten(1)


def colour_shares(pixels: Pixels) -> Float[Tensor, "B 320"]:
    """Count 4 x 4 x 4 colours (RGB) in the image and in its quarters."""
    level = _resized(pixels, 48).long() // 64
    codes = 16 * level[:, 0] + 4 * level[:, 1] + level[:, 2]
    return torch.cat([root_shares(codes, 64, 1), root_shares(codes, 64, 2)], 1)


def binary_patterns(pixels: Pixels) -> Float[Tensor, "B 252"]:
    """Count uniform patterns at radius 1 and 2 in 3 x 3 cells (Ojala et al. 2002, equation 9)."""
    images, found = (grey(pixels, 48) * 255).round()[:, None], []
    for points, radius in ((8, 1), (16, 2)):
        turn, place = torch.arange(points) * 2 * torch.pi / points, torch.arange(-radius, radius + 1)
        rows, columns = (1 - (radius * at[:, None] - place).abs() for at in (turn.sin(), turn.cos()))
        ring = (rows.clamp(min=0)[:, :, None] * columns.clamp(min=0)[:, None])[:, None]
        ring[:, :, radius, radius] -= 1
        # The slack: rounding must not decide in flat areas, as it does in scikit-image's function.
        lighter = functional.conv2d(functional.pad(images, (radius,) * 4, mode="replicate"), ring) > -1e-3
        uniform = (lighter != lighter.roll(1, 1)).sum(1) <= 2
        found.append(root_shares(lighter.sum(1).where(uniform, points + 1), points + 2, 3))
    return torch.cat(found, 1)


def oriented_gradients(pixels: Pixels) -> Float[Tensor, "B 1764"]:
    """Return HOG at 64 x 64: 9 orientations, 8 x 8 cells, 7 x 7 blocks (Dalal & Triggs 2005, section 6)."""
    greys = grey(pixels, 64).numpy()
    return torch.from_numpy(np.stack([hog(image, 9, (8, 8), (2, 2), "L2-Hys") for image in greys]))


def cosine_magnitudes(pixels: Pixels) -> Float[Tensor, "B 127"]:
    """Return absolute orthonormal DCT-II coefficients at 32 x 32, by row + column frequency, then by row."""
    rows, columns = torch.tensor(sorted(product(range(32), repeat=2), key=sum)[:127]).T
    spectrum = dctn(grey(pixels, 32).numpy(), axes=(1, 2), norm="ortho")
    return torch.from_numpy(spectrum)[:, rows, columns].abs()


def gabor_bank(wavelength: int) -> Float[Tensor, "8 1 kernel kernel"]:
    """Make the real, then the imaginary parts of 4 filters of one octave, 45 degrees apart; of sum 0."""
    reach, bank = int(1.12 * wavelength), []  # 2 deviations; skimage's own box depends on the orientation
    for turn in range(4):
        kernel = gabor_kernel(1 / wavelength, turn * np.pi / 4, n_stds=3)
        rows, columns = (slice(side // 2 - reach, side // 2 + reach + 1) for side in kernel.shape)
        kernel = kernel[rows, columns]
        bank.append(kernel - np.abs(kernel) * kernel.sum() / np.abs(kernel).sum())
    return torch.from_numpy(np.concatenate([np.real(bank), np.imag(bank)])).float()[:, None]


def gabor_statistics(pixels: Pixels) -> Float[Tensor, "B 216"]:
    """Return mean and deviation of Gabor magnitudes (Manjunath & Ma 1996, section III) in 3 x 3 cells."""
    images, found = grey(pixels, 48)[:, None], []
    for wavelength in (3, 6, 12):
        bank = gabor_bank(wavelength)
        padded = functional.pad(images, (bank.shape[-1] // 2,) * 4, mode="reflect")
        real, imaginary = functional.conv2d(padded, bank).chunk(2, 1)
        power = real.square() + imaginary.square()
        mean = functional.avg_pool2d(power.sqrt(), 16)
        deviation = (functional.avg_pool2d(power, 16) - mean.square()).clamp(min=0).sqrt()
        found += [mean.flatten(1), deviation.flatten(1)]
    return torch.cat(found, 1)


def patches(pixels: Pixels) -> Float[Tensor, "B P 192"]:
    """Cut 13 x 13 patches of 8 x 8 at 32 x 32, each of mean 0 and, unless nearly flat, deviation 1."""
    cut = functional.unfold(_resized(pixels, 32), 8, stride=2).transpose(1, 2)
    cut = cut - cut.mean(2, keepdim=True)
    return cut / (cut.square().mean(2, keepdim=True) + 10).sqrt()


def visual_words(pixels: Pixels, seed: int) -> ImageFeatures:
    """Fit words, centres of whitened patches; count them in quarters (Coates et al. 2011, "triangle")."""
    rng, each = torch.Generator().manual_seed(seed), min(169, -(-20_000 // len(pixels)))
    # Deviation: Coates et al. cut patches of 6 x 6 at every position; of 8 x 8 at every second here.
    drawn = [patches(part)[:, torch.randperm(169, generator=rng)[:each]] for part in pixels.split(_TOGETHER)]
    drawn = torch.cat(drawn).flatten(0, 1)
    centre, (sizes, axes) = drawn.mean(0), torch.linalg.eigh(drawn.T.cov())
    whitening = axes / (sizes.clamp(min=0) + 0.1).sqrt() @ axes.T
    groups = MiniBatchKMeans(256, n_init=1, max_iter=20, random_state=seed)
    with threadpool_limits(1):  # on a busy machine threads wait for each other: 15 s instead of 1.4 s
        words = torch.from_numpy(groups.fit(((drawn - centre) @ whitening).numpy()).cluster_centers_)

    def count(pixels: Pixels) -> Float[Tensor, "B 1024"]:
        white = (patches(pixels) - centre) @ whitening
        distance = torch.cdist(white.flatten(0, 1), words).unflatten(0, white.shape[:2])
        nearer = (distance.mean(2, keepdim=True) - distance).clamp(min=0)
        # 13 is odd: patches in the middle count in the quarters on both sides of them.
        return functional.adaptive_avg_pool2d(nearer.transpose(1, 2).unflatten(2, (13, 13)), 2).flatten(1)

    return count


def random_convolutions(seed: int) -> ImageFeatures:
    """Draw three convolutions (He et al. 2015, equation 10); pool means in quarters, then maxima."""
    rng, layers = torch.Generator().manual_seed(seed), []
    for outputs, inputs, side in ((32, 3, 5), (64, 32, 3), (51, 64, 3)):
        weights = torch.randn(outputs, inputs, side, side, generator=rng) * (2 / (inputs * side**2)) ** 0.5
        layers.append((weights, 0.1 * torch.randn(outputs, generator=rng)))

    def convolve(pixels: Pixels) -> Float[Tensor, "B 255"]:
        maps = _resized(pixels, 32) / 127.5 - 1
        for number, (weights, biases) in enumerate(layers):
            maps = functional.avg_pool2d(maps, 2) if number else maps
            maps = functional.conv2d(maps, weights, biases, padding="same").relu()
        return torch.cat([functional.adaptive_avg_pool2d(maps, 2).flatten(1), maps.amax((2, 3))], 1)

    return convolve


def small_pixels(pixels: Pixels) -> Float[Tensor, "B F"]:
    """The picture itself at a side of 16, 0 to 1."""
    return _resized(pixels, 16).flatten(1) / 255


def _by_parts(features: ImageFeatures, pixels: Pixels) -> Float[Tensor, "B D"]:
    return torch.cat([features(part) for part in pixels.split(_TOGETHER)])


def _reduced(features: ImageFeatures, width: int | None, pixels: Pixels) -> ImageFeatures:
    """Put a reduction behind features, fitted on the same images."""
    reduce = reduction(_by_parts(features, pixels), width)
    return lambda pixels: reduce(features(pixels))


_IMAGES: dict[str, Callable[[Tensor, int], ImageFeatures]] = {
    "pixels_pca": lambda pixels, seed: _reduced(small_pixels, 128, pixels),
    "colour_histogram": lambda pixels, seed: colour_shares,
    "hog": lambda pixels, seed: _reduced(oriented_gradients, 256, pixels),
    "lbp": lambda pixels, seed: binary_patterns,
    "frequencies": lambda pixels, seed: _reduced(cosine_magnitudes, None, pixels),
    "gabor": lambda pixels, seed: _reduced(gabor_statistics, None, pixels),
    "visual_words": lambda pixels, seed: _reduced(visual_words(pixels, seed), 256, pixels),
    "random_convolutions": lambda pixels, seed: _reduced(random_convolutions(seed), None, pixels),
}
IMAGE_NAMES = tuple(_IMAGES)


def fit_image_encoder(name: str, pixels: UInt8[Tensor, "N 3 S S"], seed: int = 0) -> ImageFeatures:
    """Fit an image encoder.

    Args:
        name: one of :data:`IMAGE_NAMES`.
        pixels: training images, RGB, at least 8; of more than :data:`MOST`, that many are drawn.
        seed: of that draw, of random weights and of k-means.

    Returns:
        What encodes images of any side from 32 up; no row is zero. Narrower than usual after few images.

    Raises:
        DataError: unknown name, too few images or all alike; here and when encoding, not (images, 3, S, S).
    """
    _check_order(name, IMAGE_NAMES, len(pixels), "image")
    _check_pixels(pixels)
    if len(pixels) > MOST:
        pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:MOST]]
    features = _IMAGES[name](pixels, seed)
    width = features(pixels[:1]).shape[1]

    def encode(pixels: Pixels) -> Float[Tensor, "B D"]:
        _check_pixels(pixels)
        return _by_parts(features, pixels) if len(pixels) else torch.zeros(0, width)

    return encode


def _check_order(name: str, names: tuple[str, ...], count: int, kind: str) -> None:
    if name not in names:
        raise DataError(f"no classical {kind} encoder named {name[:80]!r}; there are: {', '.join(names)}")
    if count < FEWEST:
        raise DataError(f"{count} training {kind}s are too few to fit {name}; give at least {FEWEST}")


def _check_pixels(pixels: Tensor) -> None:
    shape = tuple(pixels.shape)
    if pixels.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or not shape[2] == shape[3] >= 32:
        raise DataError(f"pixels are {pixels.dtype} {shape}; give uint8 (images, 3, side, side), side >= 32")


# --- texts --------------------------------------------------------------------------------------------------


def _lsa(settings: dict[str, object], texts: list[str], seed: int) -> TextFeatures:
    """Project tf-idf rows of norm 1 on the training's first singular vectors (Deerwester et al. 1990)."""
    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, **settings)
    try:
        rows = counts.fit_transform(texts)
    except ValueError as problem:  # its text names settings that are not the caller's
        raise DataError("no part of a text occurs in two training texts; give more texts") from problem
    count = max(1, min(256, *(size - 1 for size in rows.shape)))
    _, sizes, found = randomized_svd(rows, count, random_state=seed)
    directions = np.ascontiguousarray(found[sizes > 1e-5 * sizes[0]].T, np.float32)  # none that is noise
    return lambda texts: torch.from_numpy(counts.transform(texts) @ directions).float()


def _hashed_words(texts: list[str], seed: int) -> TextFeatures:
    """Project hashed tf-idf rows at random (Achlioptas 2003, theorem 1.1); only rarities are fitted."""
    counts = HashingVectorizer(n_features=2**14, alternate_sign=False, norm=None, **_WORDS)
    # At scikit-learn's own density, 1 / 128, 13 % of the words would be projected to zero.
    project = SparseRandomProjection(256, density=1 / 16, random_state=seed, dense_output=True)
    chained = make_pipeline(counts, TfidfTransformer(sublinear_tf=True), project).fit(texts)
    return lambda texts: torch.from_numpy(chained.transform(texts)).float()


def _word_table(texts: list[str], seed: int, a: float = 1e-3) -> TextFeatures:
    """Average MiniLM's input word vectors, each times a / (a + p) (Arora et al. 2017, algorithm 1, line 2).

    p is a token's share of training tokens. Special tokens, the one for unknown letters too, are left out.
    """
    # Deviation: Arora et al. then remove the common component of all texts; it stays here.
    model = TextEncoder().model
    vectors = model[0].auto_model.get_input_embeddings().weight.detach()
    words = StaticEncoder(model.tokenizer.backend_tokenizer, vectors)
    seen = torch.bincount(words.tokens(texts)[0], minlength=len(vectors))
    words.table = vectors * (a / (a + seen / seen.sum().clamp(min=1)))[:, None]
    return words.average


_TEXTS: dict[str, Callable[[list[str], int], TextFeatures]] = {
    "lsa_words": partial(_lsa, _WORDS),
    "lsa_letters": partial(_lsa, {"ngram_range": (3, 5), "analyzer": "char_wb"}),
    "hashed_words": _hashed_words,
    "word_table": _word_table,
}
TEXT_NAMES = tuple(_TEXTS)


def fit_text_encoder(name: str, texts: list[str], seed: int = 0) -> TextFeatures:
    """Fit a text encoder.

    Args:
        name: one of :data:`TEXT_NAMES`.
        texts: training texts, at least 8.
        seed: of the search for singular vectors, and of random projections.

    Returns:
        What encodes texts; one of unknown words only gets the mean row. Narrower than usual after few texts.

    Raises:
        DataError: unknown name, too few texts, or texts in which this encoder finds nothing.
    """
    _check_order(name, TEXT_NAMES, len(texts), "text")
    features = _TEXTS[name](texts, seed)
    rows = features(texts)
    mean = rows[rows.norm(dim=1) > ZERO].mean(0)
    if mean.isnan().any():
        raise DataError(f"{name} knows no word of the training texts; give texts in words")

    def encode(texts: list[str]) -> Float[Tensor, "B D"]:
        found = features(texts) if texts else torch.zeros(0, len(mean))
        return torch.where(found.norm(dim=1, keepdim=True) > ZERO, found, mean)

    return encode
