"""Conditioned search: one index of plain embeddings serves every condition.

Every head on pooled vectors is affine in the sentence, y = s W + b, so a document's score under a condition
is an inner product with its *plain* embedding: <s W + b, y_q> = s . (W y_q) + b . y_q. The query carries the
condition, the index never changes, and only the documents' norms under the condition (one number each) are
computed once per condition for the cosine.

A low-rank map without the identity goes further: with the Cholesky factor L of B B^T, s A L has K entries and
the same inner products as s A B, so documents under one condition need K numbers each.

Source: Hyper-CL section 3.2 (the map is linear); the Cholesky form is ours.

Shape letters: N documents, Q queries, D width, K rank or width of the conditioned space.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from workbench.conditions import normalise_condition, normalise_text
from workbench.errors import DataError
from workbench.hypernetworks import GeneratedWeights, Rows
from workbench.model import HyperCL
from workbench.papers.hyper_cl import Batch

BLOCK = 65_536  # documents scored at once
_CONDITIONS_KEPT = 64  # norms of so many conditions are remembered


@dataclass(frozen=True)
class Hits:
    """The best documents of each query, best first.

    Attributes:
        scores: cosine under the condition, -1 to 1.
        rows: which documents.
        texts: their texts.
    """

    scores: Float[Tensor, "Q k"]
    rows: Int[Tensor, "Q k"]
    texts: list[list[str]]


class ConditionedIndex:
    """Documents embedded once, searched under any condition."""

    def __init__(self, model: HyperCL, texts: list[str]) -> None:
        """Embed the documents plainly.

        Args:
            model: a head on pooled vectors.
            texts: the documents, at least one.

        Raises:
            DataError: no documents, or a head that pools tokens anew under each condition.
        """
        settings = model.head.settings
        if settings.pooling != "sentence":
            raise DataError(
                f"model {settings.name} pools tokens under each condition, which no index of plain "
                "embeddings can serve; use a model with pooling: sentence, or model.encode(texts, condition)"
            )
        if not texts:
            raise DataError("the index is empty: give at least one document to search in")
        self.model, self.device = model, model.device
        self.texts = [normalise_text(text, f"document {row}") for row, text in enumerate(texts)]
        self.plain = model.store.embed(self.texts).to(self.device)
        self.head = model.head
        self._generated = lru_cache(maxsize=_CONDITIONS_KEPT)(self._generate)
        self._norms = lru_cache(maxsize=_CONDITIONS_KEPT)(self._norms_under)
        self._approximate: object | None = None

    def __len__(self) -> int:
        """Number of documents N."""
        return len(self.texts)

    @torch.no_grad()
    def _generate(self, condition: str) -> tuple[Float[Tensor, "1 C"], GeneratedWeights | None]:
        """Embed a condition and generate its weights, once however often it is searched under."""
        features = self.model.condition_features([condition]).to(self.device)
        return features, self.head.generator(features) if self.head.generator is not None else None

    def _map(self, plain: Float[Tensor, "N D"], condition: str) -> Float[Tensor, "N D"]:
        """Map plain embeddings under a condition, not normalised."""
        features, weights = self._generated(condition)
        rows = Rows.of(torch.arange(len(plain), device=plain.device))
        one = Rows.of(torch.zeros(len(plain), dtype=torch.long, device=plain.device))
        scaled = self.model.scaled(plain)
        return self.head(Batch(scaled, None, None, rows, features, one), weights)

    @torch.no_grad()
    def _norms_under(self, condition: str) -> Float[Tensor, " N"]:
        """Norm of every document under a condition, in K dimensions where the map allows it."""
        reduced = self.reduced_map(condition)
        if reduced is not None:
            return torch.cat([(part @ reduced).norm(dim=1) for part in self.plain.split(BLOCK)])
        return torch.cat([self._map(part, condition).norm(dim=1) for part in self.plain.split(BLOCK)])

    @torch.no_grad()
    def reduced_map(self, condition: str) -> Float[Tensor, "D K"] | None:
        """Return A L of a low-rank map A B, with L L^T = B B^T: K numbers stand for D.

        Inner products of mapped embeddings are those of s A B, and all conditions have K-dimensional vectors
        of their own. None if the head is no low-rank map, or adds the identity.
        """
        settings = self.head.settings
        if settings.kind != "hyper" or settings.rank is None or settings.identity:
            return None
        weights = self._generated(condition)[1].tensors
        down, up = weights["projection.down"][0].double(), weights["projection.up"][0].double()
        # A hair on the diagonal: rank-deficient factors are no reason to fail.
        gram = up @ up.T
        gram.diagonal().add_(1e-12 * gram.diagonal().mean())
        return (self.model.scaled(down.T).T @ torch.linalg.cholesky(gram)).float().to(self.device)

    @torch.no_grad()
    def carried(
        self, queries: list[str], condition: str
    ) -> tuple[Float[Tensor, "Q D"], Float[Tensor, " Q"], Float[Tensor, " Q"]]:
        """Let queries carry a condition.

        Returns:
            The vectors W y that plain documents are multiplied with, the constants b . y, and the norms of
            the queries under the condition.

        Raises:
            DataError: no queries, an unusable text or condition, or a model that has moved since.
        """
        if self.model.device.type != self.device.type:
            raise DataError(
                f"this index was made before its model moved to {self.model.device}; make it again"
            )
        if not queries:
            raise DataError("no query to search with; give at least one")
        clean = [normalise_text(text, f"query {row}") for row, text in enumerate(queries)]
        asked = self.model.store.embed(clean).to(self.device)
        mapped = self._map(asked, condition)  # before the derivative: a new condition is encoded here
        zero = torch.zeros_like(asked)
        with torch.enable_grad():
            bias, back = torch.func.vjp(lambda plain: self._map(plain, condition), zero)
            (carried,) = back(mapped)  # the map is affine: its derivative is W everywhere
        constant = (bias.detach() * mapped).sum(1)
        return carried.detach(), constant, mapped.norm(dim=1)

    @torch.no_grad()
    def search(
        self, queries: list[str], condition: str, k: int = 10, *, approximate: bool = False, pool: int = 20
    ) -> Hits:
        """Find the documents most alike to each query under a condition.

        Args:
            queries: texts.
            condition: what to look at.
            k: how many documents, 1 to N.
            approximate: ask an approximate index of the plain embeddings for candidates, then score those
                exactly; see :meth:`recall` for what that loses.
            pool: candidates per wanted document when approximate, at least 1.

        Raises:
            DataError: no queries, an unusable text or condition, or k or pool out of range.
        """
        if not 1 <= k <= len(self):
            raise DataError(f"k must lie in 1..{len(self)}, the number of documents, got {k}")
        if pool < 1:
            raise DataError(f"pool must be at least 1 candidate per wanted document, got {pool}")
        condition = normalise_condition(condition)
        carried, constant, own = self.carried(queries, condition)
        norms = self._norms(condition)
        rows = self._candidates(carried, min(len(self), k * pool)) if approximate else None
        # Copies of one text can cut the graph apart; what it does not reach is marked -1.
        if rows is not None and int((rows >= 0).sum(1).min()) >= k:
            dots = torch.einsum("qd,qcd->qc", carried, self.plain[rows]) + constant[:, None]
            scores = dots / (own[:, None] * norms[rows]).clamp_min(1e-12)
            scores, place = scores.masked_fill(rows < 0, float("-inf")).topk(k)
            rows = rows.gather(1, place)
        else:
            scores, rows = self._exact(carried, constant, own, norms, k)
        texts = [[self.texts[row] for row in one] for one in rows.tolist()]
        return Hits(scores.cpu(), rows.cpu(), texts)

    def _exact(
        self, carried: Tensor, constant: Tensor, own: Tensor, norms: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Score all documents in blocks and keep the best k."""
        best = torch.full((len(carried), 0), 0.0, device=self.device)
        rows = torch.zeros((len(carried), 0), dtype=torch.long, device=self.device)
        for start in range(0, len(self), BLOCK):
            part = slice(start, start + BLOCK)
            scores = carried @ self.plain[part].T + constant[:, None]
            scores = scores / (own[:, None] * norms[part]).clamp_min(1e-12)
            top, place = scores.topk(min(k, scores.shape[1]))
            best, rows = torch.cat([best, top], 1), torch.cat([rows, place + start], 1)
            best, place = best.topk(min(k, best.shape[1]))
            rows = rows.gather(1, place)
        return best, rows

    def _candidates(self, carried: Float[Tensor, "Q D"], count: int) -> Int[Tensor, "Q c"]:
        """Ask a graph index (HNSW, built when first asked) of the plain embeddings for candidates."""
        import faiss

        if self._approximate is None:
            index = faiss.IndexHNSWFlat(self.plain.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 80
            index.add(self.plain.cpu().numpy())
            self._approximate = index
        self._approximate.hnsw.efSearch = max(64, count)
        unit = functional.normalize(carried, dim=1).cpu().numpy()
        return torch.from_numpy(self._approximate.search(unit, count)[1]).to(self.device)

    def recall(self, queries: list[str], condition: str, k: int = 10, pool: int = 20) -> float:
        """Share of the exact best k that the approximate search finds; 0 to 1, ideal 1."""
        exact = self.search(queries, condition, k).rows
        found = self.search(queries, condition, k, approximate=True, pool=pool).rows
        return float((exact[:, :, None] == found[:, None]).any(-1).float().mean())
