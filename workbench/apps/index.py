"""Served by ``panel serve``: every dashboard, and what there is to show in it."""

from workbench.views.index import open_index

open_index()
