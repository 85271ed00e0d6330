"""Recipes: the only place for settings, read strictly and named by the hash of what they say.

A recipe is a YAML file whose every key is a field of a pydantic model. ``extends`` names one other recipe
whose keys it starts from; an unknown key, a wrong type or a value out of range is refused with the key's full
name.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workbench.errors import RecipeError
from workbench.files import canonical_json, digest

RECIPE_FOLDER = Path(__file__).parent / "recipes"
_OWN = {"name", "sets", "bars", "published", "reading"}  # describe one recipe, never taken over
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Settings(BaseModel):
    """Base of all settings: immutable, strict, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Published(Settings):
    """One number of a paper that a run is held against.

    ``tolerance`` is the largest absolute difference still called reproduced; 0.02 when the paper gives none.
    ``comparable: false`` marks a number shown for orientation only (another encoder, split or protocol).
    """

    model: str
    metric: str
    split: Literal["train", "valid", "test", "all"]
    value: float
    spread: float | None = None
    table: str
    source: str
    tolerance: float = Field(default=0.02, gt=0)
    comparable: bool = True
    note: str = ""


class Bar(Settings):
    """A value the project set itself, measured on the mean over seeds; one of the two limits."""

    model: str
    metric: str
    split: Literal["train", "valid", "test"]
    group: str = "all"
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "Bar":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"bar of {self.model}: give one of at_least and at_most")
        return self

    @property
    def text(self) -> str:
        """The limit in print."""
        return f"<= {self.at_most:g}" if self.at_least is None else f">= {self.at_least:g}"

    def met(self, value: float) -> bool:
        """Tell whether a value holds the limit."""
        return value <= self.at_most if self.at_least is None else value >= self.at_least


class Recipe(Settings):
    """What every paper's recipe has; each paper adds its own settings in a subclass."""

    name: str = Field(pattern=f"^{_NAME.pattern}$", description="also names the run's folder")
    paper: str
    title: str
    sets: tuple[Literal["embedded", "families", "neighbours", "tiny", "benchmark", "paper"], ...] = ()
    notebooks: tuple[str, ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1)
    published: tuple[Published, ...] = ()
    bars: tuple[Bar, ...] = ()
    reading: str = Field(default="", description="how to read the results: the authors' words, not a setting")

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"every seed once, got {list(seeds)}")
        return seeds

    @property
    def hash(self) -> str:
        """Hexadecimal sha256 of the settings that can change a number.

        Name, title, sets, notebooks, what was claimed and the numbers compared against are left out: they
        change no result.
        """
        apart = {"name", "title", "sets", "notebooks", "published", "bars", "claim", "reading"}
        return digest(canonical_json(self.model_dump(mode="json", exclude=apart)))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.MarkedYAMLError(
                problem=f"key given twice: {', '.join(twice)}", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ValueError: of the given class, if the file is missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"cannot read {path}: {problem}") from problem
    except (yaml.YAMLError, RecursionError) as problem:
        raise error(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], content: dict[str, Any], name: str, error: type[ValueError]) -> Model:
    """Check settings against their model.

    Raises:
        ValueError: of the given class; its message lists every wrong key with what is allowed there.
    """
    try:
        # JSON mode is strict about types and still takes YAML's lists for tuples.
        return model.model_validate_json(canonical_json(content))
    except ValidationError as problem:
        lines = [_explain(model, item) for item in problem.errors()]
        raise error(f"{name}: " + "; ".join(lines)) from problem
    except (TypeError, ValueError, RecursionError) as problem:
        raise error(f"{name}: {problem}; use numbers, text, lists and mappings only") from problem


def _explain(model: type[BaseModel], item: Any) -> str:
    """Say in one clause what is wrong at one key of a settings file."""
    where = ".".join(str(part) for part in item["loc"]) or "top level"
    if item["type"] == "extra_forbidden":
        holder: Any = model
        for part in item["loc"][:-1]:
            holder = _field_type(holder, part)
        known = ", ".join(sorted(holder.model_fields)) if hasattr(holder, "model_fields") else "none"
        return f"unknown key '{where}' (allowed here: {known})"
    if item["type"] == "missing":
        return f"key '{where}' is missing"
    return f"key '{where}' is {str(item['input'])[:80]!r}: {item['msg']}"


def _field_type(holder: Any, part: str | int) -> Any:
    """Return the settings class behind one step of an error's path, or the holder itself."""
    if isinstance(part, int) or not hasattr(holder, "model_fields") or part not in holder.model_fields:
        return holder
    annotation = holder.model_fields[part].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return holder


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def _path_of(name: str) -> Path:
    """Find a recipe by its name, or by the path of a YAML file of the user's own."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if not _NAME.fullmatch(name) or not (RECIPE_FOLDER / f"{name}.yaml").is_file():
        known = recipe_names()
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        more = f" and {len(known) - 8} more (workbench list)" if len(known) > 8 else ""
        raise RecipeError(
            f"no recipe named {name[:80]!r}; {meant}there are: {', '.join(known[:8])}{more}. "
            "A file of your own is given by its path, ending in .yaml"
        )
    return RECIPE_FOLDER / f"{name}.yaml"


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe's keys, those of the one recipe it extends included.

    Mappings are merged key by key; every other value, lists included, replaces the extended one. ``sets``,
    ``bars`` and ``published`` describe one recipe only and are never taken over.

    Raises:
        RecipeError: no such recipe, not valid YAML, or it extends a recipe that itself extends one.
    """
    path = _path_of(name)
    content = {"name": path.stem, **read_yaml(path, RecipeError)}
    parent_name = content.pop("extends", None)
    if parent_name is None:
        return content
    parent = read_yaml(_path_of(str(parent_name)), RecipeError)
    if "extends" in parent:
        raise RecipeError(
            f"recipe {path.stem} extends {parent_name}, which extends another; one step is allowed"
        )
    inherited = {
        key: value
        for key, value in parent.items()
        if key not in {"name", "sets", "bars", "published", "reading"}
    }
    return _merged(inherited, content)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, key by key."""
    both = base.keys() & over.keys()
    deep = {
        key: _merged(base[key], over[key])
        for key in both
        if isinstance(base[key], dict) and isinstance(over[key], dict)
    }
    return {**base, **over, **deep}
