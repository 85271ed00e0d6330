"""Served by ``panel serve``: pairs of sentences, plain and under a typed condition."""

from workbench.view_state import SimilarityState
from workbench.views.page import open_view
from workbench.views.similarity import PairsView

open_view("Similarity change", PairsView, SimilarityState)
