"""Served by ``panel serve``: what a hypernetwork generated, as matrices, spectra, distances and numbers."""

from workbench.view_state import WeightsState
from workbench.views.page import open_view
from workbench.views.weights import WeightsView

open_view("Weights", WeightsView, WeightsState)
