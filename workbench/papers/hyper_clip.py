"""HyperCLIP: the set of texts that an image may be compared with generates norms of the image encoder.

Akinwande et al. (2024), "HyperCLIP: Adapting Vision-Language models with Hypernetworks", arXiv 2412.16777.

    (1)  y_j = G(text_j) / |G(text_j)|                      unit text embeddings
    (2)  theta' = H({y_1 .. y_T})                           scales and shifts of all norms, for the batch
    (3)  x_i = F(image_i; theta, theta') / |...|            unit image embeddings of the adapted encoder
    (4)  L = -(1/B) sum_ij log sigmoid(z_ij (t x_i y_j + b))   SigLIP's loss

    G text tower, F image tower with weights theta, H hypernetwork, t and b learned scale and bias, z_ij = 1
    where text j is true of image i and -1 elsewhere.

At test the class names of a task are the texts: W = y of the classes, and F is adapted once per task.

Deviations, since neither sizes nor data of the paper are known to us: sizes of H; a start at the identity; a
text that is true of several images of a batch is no negative of them; a batch can be like a task, for every
model alike unless its settings say otherwise: of some kinds of caption, or of a few classes, with several
captions of an image.

With several processes the texts of all of them are compared with every image; the text set that (2) reads is
that of all processes ("gathered") or a process's own ("local").

Shape letters: B images, T texts, S side in pixels, D joint width, K prompts of a class, N classes.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.datasets.class_sets import Captioned
from workbench.datasets.shards import Tokens
from workbench.errors import RecipeError, RunError
from workbench.hypernetworks import Affines, GeneratedWeights, SetGenerator
from workbench.hypernetworks.generators import standardise
from workbench.hypernetworks.overrides import Overrides
from workbench.objectives import sigmoid_contrastive
from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower
from workbench.processes import gathered, own_part, weighed

START_SCALE, LARGEST_SCALE = 10.0, 100.0  # of the logits, as SigLIP starts and open_clip bounds it


class SentenceTower(nn.Module):
    """Text tower over a frozen sentence encoder: only this projection is trained."""

    context_length, vocab_size = 0, 0  # open_clip asks every text tower

    def __init__(self, width: int, hidden: int, embed_dim: int) -> None:
        """Build it for sentence embeddings of a width."""
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))

    def forward(self, text: Float[Tensor, "T W"]) -> Float[Tensor, "T D"]:
        """Project sentence embeddings of unit norm."""
        return self.projection(standardise(text))


def build_clip(
    image: ImageTower, text: TextTower, embed_dim: int, bias: float, text_width: int
) -> CustomTextCLIP:
    """Build an open_clip model.

    Args:
        image: the image tower.
        text: the text tower.
        embed_dim: D.
        bias: start of the logit bias.
        text_width: of the frozen sentence embeddings.

    Raises:
        RecipeError: timm has no such tower, or it takes no images of that size.
    """
    # timm's own classifier is the projection: open_clip's has the wrong width for MobileNetV3 and V4.
    vision = {"timm_model_name": image.timm_model_name, "timm_pool": "avg", "timm_proj": None}
    words = {"context_length": text.context, "width": text.width, "layers": text.layers, "heads": text.heads}
    if text.kind == "sentences":  # open_clip builds no such tower: a small one is built and replaced
        words = {"context_length": 4, "vocab_size": 8, "width": 8, "layers": 1, "heads": 1}
    if image.encoder is not None:
        vision = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 16, "image_size": 16}
    try:
        clip = CustomTextCLIP(
            embed_dim, {**vision, "image_size": image.image_size}, words, init_logit_bias=bias,
            init_logit_scale=torch.tensor(START_SCALE).log().item(),
        )  # fmt: skip
    except (RuntimeError, ValueError, AssertionError, TypeError) as problem:
        raise RecipeError(f"image tower {image.timm_model_name}: {problem}") from problem
    if text.kind == "sentences":
        clip.text = SentenceTower(text_width, text.hidden, embed_dim)
    if image.encoder is not None:
        from workbench.papers.hyper_clip_towers import pretrained_tower

        clip.visual = pretrained_tower(image.encoder, embed_dim)
    clip.visual.to(memory_format=torch.channels_last)
    if image.checkpointing:
        clip.visual.set_grad_checkpointing()
    return clip


class HyperCLIP(nn.Module):
    """An open_clip model whose image tower can be adapted to a set of texts."""

    def __init__(self, settings: ClipModelSettings, clip: CustomTextCLIP, embed_dim: int) -> None:
        """Build a model.

        Args:
            settings: which of the models of a comparison.
            clip: both towers.
            embed_dim: D.
        """
        super().__init__()
        self.settings, self.clip = settings, clip
        self.generator: SetGenerator | None = None
        self.adapter: nn.Module | None = None
        self.target: Affines | Overrides | None = None
        self.adapted = False
        self.register_buffer("calibration", torch.empty(0, 3, 1, 1, dtype=torch.uint8))
        if settings.kind == "siglip":
            return
        kind = settings.generates
        self.target = Affines.wrap(clip.visual) if kind == "norms" else Overrides.wrap(clip.visual, kind)
        # Weights that are wholly generated have no trained ones beside them; kernels always are added to.
        self.target.train_own(settings.mode == "residual" or kind != "norms")
        self.generator = SetGenerator(
            embed_dim,
            self.target.spec(),
            width=settings.width,
            layers=settings.layers,
            bottleneck=settings.bottleneck,
            tokens=settings.tokens if settings.kind == "token_control" else 0,
        )
        if settings.kind == "adapter":
            count = sum(parameter.numel() for parameter in self.generator.parameters())
            hidden = max(1, round((count - embed_dim) / (2 * embed_dim + 1)))
            self.adapter = nn.Sequential(
                nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim)
            )
            nn.init.zeros_(self.adapter[2].weight)
            nn.init.zeros_(self.adapter[2].bias)
            self.target.train_own(True)
            self.generator = None

    @property
    def replaces(self) -> bool:
        """Whether no image encoder exists until weights are generated."""
        return self.generator is not None and self.settings.mode == "replace"

    def embed_texts(self, inputs: Tensor) -> Float[Tensor, "T D"]:
        """Equation (1): unit text embeddings, from sentence embeddings or tokens ``[T, ...]``."""
        return self.clip.encode_text(inputs, normalize=True)

    def generate(self, texts: Float[Tensor, "*U T D"]) -> GeneratedWeights | None:
        """Equation (2): the weights for a set of unit text embeddings, or for U sets of equal size."""
        if self.generator is None:
            return None
        sets = texts.detach() if self.settings.detach_texts else texts
        return self.generator(standardise(sets if sets.dim() == 3 else sets[None]))

    def use(self, weights: GeneratedWeights | None, rows: Int[Tensor, " B"] | None = None) -> None:
        """Adapt the image tower until the next call; None takes it back to its neutral state.

        Args:
            weights: of one text set, or of several with ``rows``.
            rows: which set each image of the coming batch belongs to.
        """
        self.adapted = weights is not None
        if self.target is None or self.generator is None:
            return
        if weights is None:
            self.target.reset()
        else:
            self.target.use(weights, rows)

    @torch.no_grad()
    def calibrate(self, weights: GeneratedWeights) -> GeneratedWeights:
        """Fit generated norms to BatchNorm statistics of their own, on the model's calibration images.

        BatchNorm's running mean and variance are averages over the text sets of all batches, while a task has
        one text set. Here they are estimated anew under the task's scales, on training images and without
        labels, and what changes is taken up into the scales and shifts, so that the towers' statistics stay:

            g' = g sqrt((v + e) / (v_task + e)),   b' = b + g (m - m_task) / sqrt(v_task + e)

        Args:
            weights: of one text set.

        Returns:
            Weights to use instead; the same ones for towers without BatchNorm or without calibration images.
        """
        norms = self.target.norms if isinstance(self.target, Affines) else {}
        layers = {name: norm for name, norm in norms.items() if isinstance(norm.norm, _BatchNorm)}
        if not layers or not len(self.calibration):
            return weights
        self.use(weights)
        kept = {}
        for name, norm in layers.items():
            batch = norm.norm
            kept[name] = batch.running_mean.clone(), batch.running_var.clone(), batch.momentum
            batch.train()
            batch.momentum = 1.0  # one block: its statistics alone
        self.embed_images(self.calibration)
        tensors = dict(weights.tensors)
        for name, norm in layers.items():
            batch, (mean, variance, momentum) = norm.norm, kept[name]
            scale, shift = norm.scale + tensors[f"{name}.scale"], norm.shift + tensors[f"{name}.shift"]
            deviation = (batch.running_var + batch.eps).sqrt()
            tensors[f"{name}.shift"] = shift + scale * (mean - batch.running_mean) / deviation - norm.shift
            tensors[f"{name}.scale"] = scale * (variance + batch.eps).sqrt() / deviation - norm.scale
            batch.running_mean.copy_(mean)
            batch.running_var.copy_(variance)
            batch.num_batches_tracked -= 1
            batch.momentum = momentum
            batch.eval()
        self.use(None)
        return GeneratedWeights(weights.spec, tensors)

    def embed_images(self, pixels: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Equation (3): unit image embeddings of the encoder as it is adapted now.

        Args:
            pixels: RGB, 0 to 255.

        Raises:
            RunError: all norms are generated, and no text set has been given yet.
        """
        if self.replaces and not self.adapted:
            raise RunError(
                f"model {self.settings.name} generates its norms from class names and has no encoder without "
                "them: call adapt(class_names) first, or use a model with mode: residual"
            )
        # Channels last: convolutions of small towers are 1.3 to 2 times as fast on a CPU.
        images = pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        images = self.clip.encode_image(images)
        if self.adapter is not None:
            images = images + self.adapter(images)
        return functional.normalize(images, dim=-1)

    def class_weights(self, prompts: Tensor, count: int) -> Float[Tensor, "N D"]:
        """Average each class's prompts into one unit direction, as CLIP_benchmark does.

        Args:
            prompts: text inputs, all prompts of class 0, then of class 1, and so on.
            count: number of classes N.
        """
        embedded = self.embed_texts(prompts).unflatten(0, (count, -1))
        return functional.normalize(embedded.mean(1), dim=-1)

    @torch.no_grad()
    def centre(self, pixels: UInt8[Tensor, "B 3 S S"], inputs: Tensor) -> None:
        """Move the biases of both towers' last layers so that images, and texts, have mean zero at the start.

        An untrained small tower maps all images to nearly one direction, and hundreds of steps pass before
        the loss moves. A text transformer ends in a projection without a bias and stays as it is.

        Args:
            pixels: some training images.
            inputs: some training texts.
        """
        self.eval()
        if self.generator is not None:
            self.use(self.generate(self.embed_texts(inputs[:64])))
        images = pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        towers = [(self.clip.visual, images)]
        if isinstance(self.clip.text, SentenceTower):
            towers.append((self.clip.text, inputs))
        for tower, values in towers:
            last = [
                layer for layer in tower.modules() if isinstance(layer, nn.Linear) and layer.bias is not None
            ]
            mean = tower(values).mean(0)
            if last and last[-1].bias.shape == mean.shape:
                last[-1].bias -= mean
        self.use(None)

    def scale_and_bias(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """T and b of equation (4)."""
        return self.clip.logit_scale.exp().clamp(max=LARGEST_SCALE), self.clip.logit_bias


class ClipLoss(nn.Module):
    """Equation (4) on batches of captioned images; called with the rows of a batch."""

    def __init__(
        self,
        model: HyperCLIP,
        data: Captioned,
        inputs: Tensor | Tokens,
        kinds_at_once: int = 1,
        half: bool = False,
        captions_at_once: int = 1,
        classes_at_once: int | None = None,
    ) -> None:
        """Hold what a training needs.

        Args:
            model: trained.
            data: the images and captions; on the model's device.
            inputs: of the text tower, one row per text of the data.
            kinds_at_once: largest number of kinds of caption in a batch; each batch draws 1 to that many.
            half: compute both towers in bfloat16; weights and loss stay in single precision.
            captions_at_once: captions that a batch draws of each image; all are compared with all images.
            classes_at_once: largest number of classes that the images of a batch are of, as in a task: the
                class of its first image and some drawn ones. Images of one class say the same in their first
                captions; those that are alone in theirs make batches of their own. None: any images.
        """
        super().__init__()
        self.model, self.half, self.captions_at_once = model, half, captions_at_once
        self.kinds_at_once = min(kinds_at_once, len(data.kinds.unique()))
        self.rest: dict[str, Any] = {"data": data, "inputs": inputs}  # no part of the checkpoint
        self.columns = [(data.kinds == kind).nonzero()[:, 0] for kind in data.kinds.unique()]
        self.classes_at_once = classes_at_once
        self.members, self.own_class = _by_class(data) if classes_at_once else ([], None)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.rest["data"])

    def forward(self, items: Int[Tensor, " B"]) -> Float[Tensor, ""]:
        """Draw kinds of caption for the batch and captions of them for every image, and compare."""
        data, inputs = self.rest["data"], self.rest["inputs"]
        model, settings = self.model, self.model.settings
        if self.classes_at_once:
            items = self._of_few_classes(items)
        some = torch.randperm(len(self.columns))[: int(torch.randint(1, self.kinds_at_once + 1, ()))]
        columns = torch.cat([self.columns[kind] for kind in some.tolist()])
        drawn = columns[torch.randint(len(columns), (len(items), self.captions_at_once))]
        texts = data.choices[items[:, None], drawn].unique()  # each text is encoded once
        towers = torch.autocast(items.device.type, torch.bfloat16, enabled=self.half)
        with towers:
            embedded = gathered(texts, lambda rows: model.embed_texts(inputs[rows]).float())
        part = own_part(len(items))
        mine = items[part]
        # True of an image is whatever one of its captions says, of any kind.
        true = data.meaning[data.choices[mine]]
        match = (true[:, :, None] == data.meaning[texts]).any(1)
        chosen = embedded
        if settings.text_set == "local":
            chosen = embedded[torch.searchsorted(texts, data.choices[mine[:, None], drawn[part]].unique())]
        if settings.most_texts and len(chosen) > settings.most_texts:
            size = int(torch.randint(2, settings.most_texts + 1, ()))
            chosen = chosen[torch.randperm(len(chosen))[:size].to(chosen.device)]
        plain = settings.neutral > 0 and float(torch.rand(())) < settings.neutral
        model.use(None if plain else model.generate(chosen))
        scale, bias = model.scale_and_bias()
        with towers:
            images = model.embed_images(data.pixels[mine]).float()
        return weighed(sigmoid_contrastive(images, embedded, match, scale, bias), len(mine), len(items))

    def _of_few_classes(self, items: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Draw as many images as are given, of the first one's class and of some others."""
        own = int(self.own_class[items[0]])
        if own < 0:  # alone in its class
            pool = self.members[-1]
        else:
            count = int(torch.randint(1, self.classes_at_once, ()))
            others = torch.randperm(len(self.members) - 1)[:count].tolist()
            pool = torch.cat([self.members[place] for place in {own, *others}])
        return pool[torch.randint(len(pool), (len(items),))]


def _by_class(data: Captioned) -> tuple[list[Int[Tensor, " M"]], Int[Tensor, " N"]]:
    """Return the images of every class, those that are alone in theirs last; and each image's class or -1."""
    said = data.meaning[data.choices[:, 0]]
    _, own, counts = said.unique(return_inverse=True, return_counts=True)
    alone = counts[own] == 1
    _, numbers = own[~alone].unique(return_inverse=True)
    found = own.new_full((len(own),), -1).masked_scatter(~alone, numbers)
    members = [(found == one).nonzero()[:, 0] for one in range(int(found.max()) + 1)]
    return [*members, alone.nonzero()[:, 0]], found
