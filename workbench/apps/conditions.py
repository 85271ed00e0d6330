"""Served by ``panel serve``: type what to look at, and sentences move; your own texts, too."""

from workbench.view_state import ConditionsState
from workbench.views.conditions import ConditionsView
from workbench.views.page import open_view

open_view("Conditions", ConditionsView, ConditionsState)
