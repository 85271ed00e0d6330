"""Served by ``panel serve``: sentences under a typed condition."""

from workbench.view_state import ConditionsState
from workbench.views.conditions import ConditionsView
from workbench.views.page import open_view

open_view("Conditions", ConditionsView, ConditionsState)
