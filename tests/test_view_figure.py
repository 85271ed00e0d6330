"""A place for a figure: it costs nothing while it is empty, and keeps who listens to it."""

import panel as pn
import plotly.graph_objects as go

from workbench.views.figure import FigurePlace
from workbench.views.saved import saved_page

FIGURE = go.Figure(go.Bar(x=["one"], y=[1]), {"height": 240})


def test_an_empty_place_holds_no_figure_and_a_shown_one_is_hidden_and_not_taken_away():
    place = FigurePlace(min_width="200px")
    assert place.styles == {"min-width": "200px"}
    assert not place.visible
    assert place.select(pn.pane.Plotly) == []
    place.show(FIGURE)
    [pane] = place.select(pn.pane.Plotly)
    assert (place.figure, place.visible, pane.height) == (FIGURE, True, 240)
    place.show(other := go.Figure())
    assert place.select(pn.pane.Plotly) == [pane]
    assert (place.figure, pane.height) == (other, None)
    place.show(None)
    assert (place.figure, place.visible) == (None, False)
    place.show(FIGURE)
    assert place.select(pn.pane.Plotly) == [pane]
    assert (place.figure, place.visible, pane.height) == (FIGURE, True, 240)


def test_room_is_kept_for_a_first_figure_that_is_on_its_way():
    place = FigurePlace()
    place.expect(240)
    assert (place.visible, place.min_height, place.figure) == (True, 240, None)
    assert "seen" in saved_page("one", pn.Column(place, pn.pane.Str("seen"))).getvalue()
    place.show(None)
    assert not place.visible
    place.show(FIGURE)
    place.show(None)
    place.expect(240)
    assert not place.visible  # one that is there already comes back by itself


def test_clicks_are_told_for_every_figure_that_comes():
    told = []
    place = FigurePlace(told.append)
    for row in (3, 4):
        place.show(FIGURE)
        place[0].click_data = {"points": [{"customdata": row}]}
        place.show(None)
    assert [event.new["points"][0]["customdata"] for event in told] == [3, 4]


def test_what_stands_in_a_hidden_part_is_not_saved():
    hidden = pn.Column(pn.pane.Str("not seen"), visible=False)
    page = saved_page("one", pn.Column(hidden, pn.pane.Str("seen"))).getvalue()
    assert ">seen" in page or "seen\n" in page
    assert "not seen" not in page
