"""Served by ``panel serve``: the pairs of a zoo of encoders."""

from workbench.view_state import ZooState
from workbench.views.page import open_view
from workbench.views.zoo import ZooView

open_view("Zoo", ZooView, ZooState)
