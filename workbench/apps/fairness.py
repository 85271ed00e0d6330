"""Served by ``panel serve``: accuracy by group with counts, and bias tests of words under a condition."""

from workbench.view_state import FairnessState
from workbench.views.fairness import FairnessView
from workbench.views.page import open_view

open_view("Fairness", FairnessView, FairnessState)
