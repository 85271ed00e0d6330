"""Served by ``panel serve``: class names typed, a classifier for exactly them, and pictures to try it on."""

from workbench.view_state import ClassifyState
from workbench.views.classify import ClassifyView
from workbench.views.page import open_view

open_view("Classify", ClassifyView, ClassifyState)
