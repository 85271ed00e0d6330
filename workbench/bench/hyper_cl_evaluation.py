"""Evaluation of a C-STS-shaped split from text: ours beside the published way.

Ours encodes each unique text once, sorted by length, generates each condition's weights once per block of
rows, and compares. The reference encodes both sentences and the condition of every row anew, all three padded
to one common length, generates weights per row and per sentence, and forms A B; at batch 2, as published, and
at our own batch. It is timed on the first rows only and scaled to all of them; the rows it scores must agree.
Memory is that of 128 rows with 256 sentences and 64 conditions.

The texts are drawn from this package's own sentences with the counts and lengths of C-STS (18,908 rows,
14,680 distinct sentences, 5,675 distinct conditions, 14.8 and 4.0 words on average).
"""

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.bench.timing import laid_out, median_seconds, peak_mib
from workbench.datasets import bundled
from workbench.encoders import TextEncoder
from workbench.hypernetworks import Rows
from workbench.hypernetworks.generators import standardise
from workbench.papers.hyper_cl import Batch, ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings

ROWS, SENTENCES, CONDITIONS = 18_908, 14_680, 5_675
REFERENCE_ROWS = 256
BATCH = 128


def texts_like_csts(rows: int, sentences: int, conditions: int) -> tuple[list[str], list[str], Tensor]:
    """Draw sentences, conditions and rows (first, second, condition) with the given counts."""
    draw = random.Random(0)
    words = " ".join(bundled.sentences()["sentence"]).lower().replace(".", "").split()

    def some(count: int, low: int, high: int, mode: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            length = round(draw.triangular(low, high, mode))
            found[" ".join(draw.choice(words) for _ in range(length)) + "."] = None
        return list(found)

    table = [
        [draw.randrange(sentences), draw.randrange(sentences), draw.randrange(conditions)]
        for _ in range(rows)
    ]
    return some(sentences, 5, 30, 10), some(conditions, 2, 7, 3), torch.tensor(table)


@torch.inference_mode()
def _ours(encoder: TextEncoder, head: ConditionedHead, data: tuple[list[str], list[str], Tensor]) -> Tensor:
    """Score all rows: unique texts once, unique conditions once per block."""
    sentences, conditions, table = data
    embedded = standardise(encoder.encode(sentences, BATCH)), standardise(encoder.encode(conditions, BATCH))
    device = next(head.parameters()).device
    texts, asked = (part.to(device) for part in embedded)
    order = torch.argsort(table[:, 2])
    scores = torch.empty(len(table))
    for rows in order.split(1024):
        first, second, condition = table[rows].to(device).unbind(1)
        by_sentence, by_condition = Rows.of(torch.cat([first, second])), Rows.of(condition.repeat(2))
        batch = Batch(
            texts[by_sentence.unique], None, None, by_sentence, asked[by_condition.unique], by_condition
        )
        scores[rows] = functional.cosine_similarity(*head(batch).chunk(2)).cpu()
    return scores


@torch.inference_mode()
def _reference(
    encoder: TextEncoder,
    head: ConditionedHead,
    data: tuple[list[str], list[str], Tensor],
    rows: int,
    batch: int,
) -> Tensor:
    """Score the first rows one batch after another, nothing kept from one to the next."""
    sentences, conditions, table = data
    scores = []
    for part in table[:rows].split(batch):
        texts = [sentences[i] for i in part[:, 0]] + [sentences[i] for i in part[:, 1]]
        texts += [conditions[i] for i in part[:, 2]]
        features = encoder.model.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        found = encoder.model({name: tensor.to(encoder.model.device) for name, tensor in features.items()})
        first, second, asked = standardise(found["sentence_embedding"]).chunk(3)
        sides = []
        for side in (first, second):
            weights = head.generator(asked).tensors
            matrix = weights["projection.down"] @ weights["projection.up"]
            sides.append(torch.bmm(side[:, None], matrix)[:, 0])
        scores.append(functional.cosine_similarity(*sides).cpu())
    return torch.cat(scores)


def rows(device: str = "cpu") -> list[dict[str, Any]]:
    """Measure; see :func:`workbench.bench.run_bench` for the columns."""
    encoder = TextEncoder(device=device)
    settings = ModelSettings(name="hyper_k64", kind="hyper", rank=64, start="paper")
    torch.manual_seed(0)
    head = ConditionedHead(settings, encoder.width, encoder.width).to(device).eval()
    data = texts_like_csts(ROWS, SENTENCES, CONDITIONS)
    own = _ours(encoder, head, data)
    compared = min(REFERENCE_ROWS, ROWS)
    theirs = _reference(encoder, head, data, compared, 2)
    torch.testing.assert_close(own[:compared], theirs, rtol=0, atol=1e-3)
    ours = median_seconds(lambda: _ours(encoder, head, data), device, repeats=1, warm=0)

    def bare() -> object:
        return encoder.encode(data[0], BATCH), encoder.encode(data[1], BATCH)

    encoding = median_seconds(bare, device, repeats=1, warm=0)
    part = (data[0][:256], data[1][:64], data[2][:128] % 64)
    ours_mib = peak_mib(lambda: _ours(encoder, head, part), device)
    size = f"evaluation, {ROWS:,} rows from text"
    found = [laid_out(f"{size}, beside encoding its unique texts", ours, encoding, ours_mib, ours_mib)]
    for batch in (2, BATCH):

        def reference(batch: int = batch) -> Tensor:
            return _reference(encoder, head, data, compared, batch)

        seconds = median_seconds(reference, device, repeats=1) * ROWS / compared
        reference_mib = peak_mib(lambda batch=batch: _reference(encoder, head, part, 128, batch), device)
        found.append(
            laid_out(f"{size}, published way, batch {batch}", ours, seconds, ours_mib, reference_mib)
        )
    return found
