"""What a dashboard shows, as one validated value that fits into a link.

A link carries ``view=`` and base64url of canonical JSON, so that any text survives: "007" and "true" stay
text, and a link that cannot be read is an error to show, never a silent default.
"""

import base64
import binascii
import json
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from workbench.config import Settings, validated
from workbench.errors import WorkbenchError
from workbench.files import canonical_json

LONGEST = 8192  # characters of a link's value; servers and proxies cut longer ones
LONGEST_TEXT = 2000  # characters of one text in it
LONGEST_OWN = 3000  # of pairs of one's own, all together
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]


class ViewError(WorkbenchError):
    """A link that names no view."""


class ConditionsState(Settings):
    """The view of sentences under a condition."""

    version: Literal[1] = 1
    app: Literal["conditions"] = "conditions"
    recipe: Text = ""
    model: Text = ""
    condition: Text = "The colour."
    other: Text = ""
    strength: float = Field(default=1.0, ge=0, le=2)
    blend: float = Field(default=0.0, ge=0, le=1, description="from condition to other")
    attribute: Text = ""
    clicked: int | None = Field(default=None, ge=0)
    query: Text = ""
    own: int = Field(default=0, ge=0, description="texts of somebody's own, which no link holds")


class ZooState(Settings):
    """The view of a zoo's pairs."""

    version: Literal[1] = 1
    app: Literal["zoo"] = "zoo"
    recipe: Text = ""
    model: Text = ""
    against: Text = ""
    text: Text = Field(default="", description="text encoder of the chosen pair; empty for the best pair")
    image: Text = Field(default="", description="image encoder of the chosen pair")


class SimilarityState(Settings):
    """The view of pairs of sentences before and after a condition."""

    version: Literal[1] = 1
    app: Literal["similarity"] = "similarity"
    recipe: Text = ""
    model: Text = ""
    pairs: Literal["bundled", "own", "run"] = Field(default="bundled", description="which pairs are compared")
    own: str = Field(default="", max_length=LONGEST_OWN, description="pairs of one's own, one per line")
    condition: Text = "The colour."
    strength: float = Field(default=1.0, ge=0, le=2)
    attribute: Text = Field(default="", description="of the gold score; empty: the one the condition names")
    chosen: int | None = Field(default=None, ge=0, description="row of a pair")


class WeightsState(Settings):
    """The view of what a hypernetwork generated."""

    version: Literal[1] = 1
    app: Literal["weights"] = "weights"
    recipe: Text = ""
    model: Text = ""
    condition: Text | None = Field(default=None, description="text or class names; null for an example")
    other: Text = ""
    slot: Text = Field(default="", description="what is generated: a slot, or a zoo's text encoder")
    shown: Text = Field(default="", description="whose matrix is drawn; empty: the condition's")
    minus_mean: bool = False
    measure: Literal["", "frobenius", "cosine", "angles"] = Field(
        default="", description="of distances between weights; empty: the first that there is"
    )


class ClassifyState(Settings):
    """The view of a classifier made of class names."""

    version: Literal[1] = 1
    app: Literal["classify"] = "classify"
    recipe: Text = ""
    model: Text = ""
    names: Text = Field(default="circles, squares, triangles, stars", description="commas or lines between")
    pictures: Text = Field(default="", description="where pictures come from; uploads are in no link")
    drawing: int = Field(default=0, ge=0, le=9999, description="seed of the scenes that are drawn")


class FairnessState(Settings):
    """The view of differences between groups: of images, or of words."""

    version: Literal[1] = 1
    app: Literal["fairness"] = "fairness"
    about: Literal["images", "wording", "texts"] = "images"
    recipe: Text = ""
    model: Text = ""
    other_recipe: Text = ""
    other_model: Text = ""
    column: Text = Field(default="", description="of the groups")
    asked: Text = Field(default="", description="class set; empty for all")
    difference: Text = Field(default="", description="what differences are taken to")
    names: Text = Field(default="", description="the class set's names in other words; empty: as they are")
    templates: Text = Field(default="", description="words around a name, one per line; empty: as they are")
    text_recipe: Text = ""
    text_model: Text = ""
    tests: Text = Field(default="", description="bias tests by name; empty: the bundled ones")
    condition: Text = "The profession."
    strength: float = Field(default=1.0, ge=0, le=2)


State = TypeVar("State", bound=Settings)


def pack(state: Settings) -> str:
    """Write a state as the value of a link's ``view``."""
    raw = canonical_json(state.model_dump(mode="json")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unpack(value: str, kind: type[State]) -> State:
    """Read a state from a link.

    Args:
        value: of ``view``; empty for the default state.
        kind: which state the view has.

    Raises:
        ViewError: not such a value, of another version or view, or a key out of range.
    """
    if not value:
        return kind()
    if len(value) > LONGEST:
        raise ViewError(
            f"the link is {len(value):,} characters long, at most {LONGEST:,} are read; shorten its text"
        )
    try:
        raw = base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
        content = json.loads(raw.decode("utf-8"))
    except (binascii.Error, ValueError, RecursionError) as problem:
        raise ViewError(
            f"the link's view cannot be read ({problem}); it was cut or changed on its way"
        ) from None
    if not isinstance(content, dict):
        raise ViewError("the link's view holds no settings; it was cut or changed on its way")
    return validated(kind, content, "the link", ViewError)
