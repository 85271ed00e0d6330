"""The command line as a person uses it: one clear message and exit code 2, or a run, its folder last."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import yaml
from PIL import Image

from workbench import cli, manifests
from workbench.datasets.images import Fitting
from workbench.errors import ManifestError, RunError
from workbench.runs import Run, finished_runs, run_recipe

MINI = """
paper: hyper_cl
title: Three models on a few invented pairs
seeds: [0]
data: {source: bundled, name: bundled, limit: 4}
training: {epochs: 1, batch_size: 16, learning_rate: 1e-3}
resamples: 100
reference: concat
group_by: [condition_kind, domain]
models:
  - {name: condition_only, kind: condition_only}
  - {name: cosine, kind: cosine}
  - {name: concat, kind: concat, keep_weights: false}
  - {name: hyper, kind: hyper, rank: 2}
"""
FILES = {
    "recipe.json",
    "provenance.json",
    "cards.json",
    "metrics.parquet",
    "scores.parquet",
    "done.json",
    "models",
}
COLUMNS = ["paper", "recipe", "dataset", "split", "model", "group", "metric", "value", "low", "high"]
COLUMNS += ["count", "seed"]


pytestmark = pytest.mark.usefixtures("one_encoder")


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process; return its exit code, output and errors."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["workbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def mini(tmp_path):
    """A recipe of a second's work."""
    (tmp_path / "mini.yaml").write_text(MINI)
    return tmp_path / "mini.yaml"


def rows_of(count, condition=None):
    """Rows of invented pairs, each high under one condition and low under the other."""
    return [
        {
            "sentence1": f"A red kite, number {n}.",
            "sentence2": f"A drum, number {n}.",
            "condition": condition or asked,
            "label": float(label),
        }
        for n in range(count)
        for label, asked in enumerate(("The shape.", "The sound.") if n % 3 else ("The sound.", "The shape."))
    ]


def own(folder, rows, name="own.csv"):
    pl.DataFrame(rows, infer_schema_length=None).write_csv(folder / name)
    return folder / name


def command(*arguments, limit=None):
    """Start the command line as a process of its own, if asked for with a limit on the size of files."""
    code = "from workbench.cli import main; main()"
    if limit:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    arguments = [sys.executable, "-c", code, *map(str, arguments)]
    quiet = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # two processes with two threads each get in each other's way
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet)


# --- one clear message --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent"], "no recipe named 'absent'; there are: family_approaches, "),
        (["run", "../x"], "no recipe named '../x'"),
        (["run", "absent.yaml"], "cannot read absent.yaml"),
        (["run", "hyper_cl_bundled_tiny", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["run", "hyper_cl_bundled_tiny", "--device", "gpu"], "use --device cpu"),
        (["run", "hyper_cl_bundled_tiny", "--seed", "-1"], "key 'seeds.0' is '-1'"),
        (["run", "hyper_cl_bundled_tiny", "--data", "absent.csv"], "absent.csv: no such file or folder"),
        (
            ["run", "hyper_cl_bundled_tiny", "--label-range", "5", "1"],
            "label_range must be [lowest, highest]",
        ),
        (["run", "hyper_cl_csts"], "csts is not shipped with the workbench; give your own copy with --data"),
        (["run", "hyper_cl_e2e"], "data set e2e-cond is not on this machine (searched: "),
        (
            ["reproduce", "--set", "all"],
            "no set named 'all'; there are: embedded, families, neighbours, tiny, benchmark, paper",
        ),
        (["reproduce", "absent"], "no recipe named 'absent'"),
        (["data", "show", "absent"], "no manifest named 'absent'; there are: "),
        (["data", "verify", "absent"], "no manifest named 'absent'"),
        (["data", "verify", "../x"], "no manifest named '../x'"),
        (["data", "verify", "e2e-cond"], "Set WORKBENCH_DATA to the folder that holds e2e-cond/"),
        (["data", "prepare", "e2e-cond", "--source", "."], "e2e-cond as its manifest describes it: "),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("workbench: ")
    assert message in err
    assert not list(tmp_path.rglob("*"))  # nothing was left, not even a folder


def test_an_unknown_key_ends_with_code_2_and_lists_the_allowed_ones(call, mini, tmp_path):
    mini.write_text(MINI.replace("epochs", "epoch"))
    code, out, err = call("run", mini, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "unknown key 'training.epoch' (allowed here: batch_size, betas, clip, epochs" in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_ends_with_code_2(call):
    code, _, err = call("run", "hyper_cl_bundled_tiny", "--seeed", "1")
    assert code == 2
    assert "--seeed" in err


def test_an_output_folder_below_a_file_ends_with_code_2(call, mini, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = call("run", mini, "--out", tmp_path / "file")
    assert (code, err.count("\n")) == (2, 1)
    assert "a file stands where a folder is needed. Choose a folder you can write to with --out" in err
    assert (tmp_path / "file").read_text() == "mine"


# --- list, doctor, data -------------------------------------------------------------------------------------


def test_list_names_every_recipe_and_data_set(call):
    code, out, _ = call("list")
    assert code == 0
    for name in ("hyper_cl_bundled ", "hyper_cl_bundled_tiny", "hyper_cl_e2e", "hyper_cl_csts", "e2e-cond"):
        assert f"  {name}" in out


def test_doctor_finds_everything_that_is_needed(call):
    code, out, _ = call("doctor")
    assert "MISS" not in out
    assert code == 0
    assert "weights as published, width 384" in out


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A prepared set of one file with its manifest."""
    from hashlib import sha256

    folder = tmp_path / "data" / "kites"
    folder.mkdir(parents=True)
    pl.DataFrame(rows_of(4)).write_parquet(folder / "train.parquet")
    raw = (folder / "train.parquet").read_bytes()
    about = {"sha256": sha256(raw).hexdigest(), "size": len(raw), "rows": 8, "columns": list(rows_of(1)[0])}
    words = ("title", "description", "licence", "citation", "intended_use", "prepared_by")
    card = {"name": "kites", "redistribute": True, "files": {"train.parquet": about}}
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "kites.yaml").write_text(
        yaml.safe_dump({**card, **{word: word for word in words}})
    )
    monkeypatch.setattr(manifests, "manifest_folder", lambda: tmp_path / "manifests")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return folder


def test_data_sets_are_listed_shown_and_verified(call, prepared):
    assert call("data", "list")[:2] == (0, f"{'kites':16} {'found':8} {'licence':18} title\n")
    code, out, _ = call("data", "show", "kites")
    assert code == 0
    assert "intended_use: intended_use\n" in out
    assert call("data", "verify")[:2] == (0, "kites: ok\n")
    assert call("data", "verify", "kites")[:2] == (0, "kites: ok\n")


def test_a_data_set_that_differs_ends_with_code_3_and_says_in_what(call, prepared):
    (prepared / "train.parquet").write_bytes(b"PAR1")
    code, out, _ = call("data", "verify")
    assert code == 3
    assert out.startswith("kites: differs\n")
    assert "train.parquet: cut short or changed; expected " in out


def test_a_prepared_data_set_is_taken_into_the_cache(call, prepared, tmp_path, monkeypatch):
    code, out, _ = call("data", "prepare", "kites", "--source", prepared)
    assert (code, out) == (0, f"kites: {tmp_path / 'cache' / 'data' / 'kites'}\n")
    monkeypatch.delenv("WORKBENCH_DATA")
    assert call("data", "verify")[:2] == (0, "kites: ok\n")


# --- run ----------------------------------------------------------------------------------------------------


def test_the_same_command_finds_the_finished_run_and_prints_its_folder_last(call, tiny_run):
    out = tiny_run.folder.parent.parent
    code, printed, err = call("run", "hyper_cl_bundled_tiny", "--out", out)
    assert code == 0, err
    page = out / "html" / f"{tiny_run.folder.name}.html"
    assert printed == f"report: {page}\nrun: {tiny_run.folder}\n"
    assert page.is_file()


def test_a_run_holds_the_documented_files_and_columns(tiny_run):
    assert {path.name for path in tiny_run.folder.iterdir()} == FILES
    assert tiny_run.metrics.columns == COLUMNS
    assert set(tiny_run.metrics["split"]) == {"valid", "test"}
    assert {"spearman", "pearson", "pair_order"} <= set(tiny_run.metrics["metric"])
    assert {"all", "condition_kind=unseen", "domain=animals"} <= set(tiny_run.metrics["group"])
    assert set(tiny_run.metrics["model"]) == {model["name"] for model in tiny_run.recipe["models"]}
    assert (tiny_run.metrics["low"] <= tiny_run.metrics["high"]).all()
    assert tiny_run.metrics.drop("seed").null_count().sum_horizontal().item() == 0


def test_own_pairs_run_from_a_file_to_a_report(call, mini, tmp_path):
    data = own(tmp_path, rows_of(30), "my pairs.csv")
    code, out, err = call("run", mini, "--data", data, "--out", tmp_path / "out", "--seed", 3, "--seed", 4)
    assert code == 0, err
    folder = Path(out.splitlines()[-1].removeprefix("run: "))
    run = Run.open(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert run.metrics.columns == COLUMNS
    assert run.metrics["dataset"].unique().to_list() == ["my pairs"]
    assert set(run.metrics["seed"].drop_nulls()) == {3, 4}
    assert run.provenance["seeds"] == [3, 4]
    assert (tmp_path / "out" / "html" / f"{folder.name}.html").is_file()


def test_labels_on_another_scale_run_with_their_range(call, mini, tmp_path):
    data = own(tmp_path, [{**row, "label": 1 + 4 * row["label"]} for row in rows_of(30)])
    code, _, err = call("run", mini, "--data", data, "--out", tmp_path / "out")
    assert code == 2
    assert "is outside 0..1; give the range of your labels with --label-range LOW HIGH" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call("run", mini, "--data", data, "--out", tmp_path / "out", "--label-range", 1, 5)
    assert code == 0, err
    assert set(finished_runs(tmp_path / "out")[0].scores["label"]) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: [{"sentence1": row["sentence1"], "label": 1} for row in rows],
            "missing column sentence2, cond",
        ),
        (
            lambda rows: [{**rows[0], "label": None}, *rows[1:]],
            "column label is empty in 1 rows, first in row 0",
        ),
        (
            lambda rows: [*rows[:9], {**rows[9], "condition": " "}],
            "condition in row 9 is empty or only white space",
        ),
        (lambda rows: rows[:1], "1 sentence pairs; at least 20 pairs are needed"),
        (lambda rows: [{**row, "label": row["label"] * 9} for row in rows], "is outside 0..1"),
    ],
)
def test_bad_pairs_end_with_code_2_and_leave_nothing_behind(call, mini, tmp_path, spoil, message):
    data = own(tmp_path, spoil(rows_of(30)))
    code, out, err = call("run", mini, "--data", data, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini.yaml", "own.csv"]


def test_where_the_floor_is_constant_the_others_are_still_measured(call, mini, tmp_path):
    # One condition: what never sees the sentences scores all rows alike and has no rank correlation.
    rows = [{**row, "label": [0.25, 0.5, 1.0][n % 3]} for n, row in enumerate(rows_of(30, "The shape.")[::2])]
    code, out, err = call("run", mini, "--data", own(tmp_path, rows), "--out", tmp_path / "out")
    assert code == 0, err
    metrics = Run.open(Path(out.splitlines()[-1].removeprefix("run: "))).metrics
    known = metrics.filter(split="test", metric="spearman", group="all")["model"].unique()
    assert set(known) == {"cosine", "concat", "hyper"}
    page = next((tmp_path / "out" / "html").iterdir()).read_text()
    assert "The floor condition_only, which never sees the sentences, has spearman undefined" in page


def test_a_grouping_column_with_gaps_and_markup_is_no_obstacle(call, mini, tmp_path):
    domains = ["toys", None, "</script><script>alert(1)</script>"]
    rows = [{**row, "domain": domains[n // 2 % 3]} for n, row in enumerate(rows_of(60))]
    code, out, err = call("run", mini, "--data", own(tmp_path, rows), "--out", tmp_path / "out")
    assert code == 0, err
    metrics = Run.open(Path(out.splitlines()[-1].removeprefix("run: "))).metrics
    assert set(metrics.filter(split="test")["group"]) == {
        "all",
        *(f"domain={name}" for name in domains if name),
    }
    assert "<script>alert(1)" not in next((tmp_path / "out" / "html").iterdir()).read_text()


def test_reproduce_reuses_what_is_done_and_ends_with_the_report(call, tiny_run):
    out = tiny_run.folder.parent.parent
    code, printed, err = call("reproduce", "hyper_cl_bundled_tiny", "--no-notebooks", "--out", out)
    assert code == 0, err
    assert printed == f"report: {out / 'index.html'}\n"
    assert (out / "index.html").is_file()
    assert [run.folder for run in finished_runs(out)] == [tiny_run.folder]


def test_a_report_over_nothing_says_how_to_start(call, tmp_path):
    code, out, _ = call("report", "--out", tmp_path)
    assert (code, out) == (0, f"report: {tmp_path / 'index.html'}\n")
    assert "No finished run yet; start with: workbench reproduce" in (tmp_path / "index.md").read_text()


# --- run: a zoo of encoders ---------------------------------------------------------------------------------

ALIGN = """
paper: hyper_align
title: Two pairs on a few scenes
seeds: [0]
data: {source: scenes, name: scenes, size: 32, train: 100, test: 50}
zoo: {images: [colour_histogram, frequencies], texts: [lsa_words]}
training: {epochs: 1, batch_size: 50, learning_rate: 1e-2}
resamples: 100
models:
  - {name: chance, kind: chance}
  - {name: ape, kind: ape, keep_weights: true}
  - {name: ridge, kind: ridge}
published:
  - {model: ape, metric: recall_at_10, split: test, value: 0.5, table: T, source: S}
"""


@pytest.fixture
def align(tmp_path):
    """A recipe of a second's work that connects encoders."""
    (tmp_path / "align.yaml").write_text(ALIGN)
    return tmp_path / "align.yaml"


@pytest.fixture
def arrays(tmp_path):
    """Features that were computed elsewhere: sixty images with a caption each."""
    folder, draw = tmp_path / "my zoo", np.random.default_rng(0)
    split = ["train"] * 40 + ["valid"] * 10 + ["test"] * 10
    for name, width in (("texts/words", 6), ("images/small", 5), ("images/large", 8)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", draw.normal(size=(60, width)).astype(np.float32))
    pl.DataFrame({"image": range(60), "split": split}).write_csv(folder / "pairs.csv")
    return folder


def test_features_of_ones_own_run_from_a_folder_to_a_report(call, align, arrays, tmp_path):
    code, out, err = call("run", align, "--data", arrays, "--out", tmp_path / "out")
    assert code == 0, err
    folder = Path(out.splitlines()[-1].removeprefix("run: "))
    run = Run.open(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert run.metrics.columns == COLUMNS
    assert run.metrics["dataset"].unique().to_list() == ["my zoo"]
    assert {"image=small", "image=large", "pair=words -> small"} <= set(run.metrics["group"])
    assert run.model("ape").pairs() == [("words", "large"), ("words", "small")]
    # Not the recipe's data: its published numbers do not apply.
    assert run.recipe["title"] == "Two pairs on a few scenes, on own data: my zoo"
    assert run.recipe["published"] == []
    assert run.recipe["data"]["path"] == "my zoo"
    assert run.provenance["data"] == {
        "train": {"images": 40},
        "valid": {"images": 10},
        "test": {"images": 10},
    }
    assert (tmp_path / "out" / "html" / f"{folder.name}.html").is_file()
    # Another division of the same arrays is another run.
    table = pl.read_csv(arrays / "pairs.csv")
    table.with_columns(split=table["split"].reverse()).write_csv(arrays / "pairs.csv")
    code, out, err = call("run", align, "--data", arrays, "--out", tmp_path / "out")
    assert code == 0, err
    assert Path(out.splitlines()[-1].removeprefix("run: ")) != folder


@pytest.fixture
def pictures(tmp_path):
    """Captioned pictures of one's own: sixty squares of one colour each."""
    (tmp_path / "mine").mkdir()
    rows = []
    for row in range(60):
        levels = np.full((40, 48, 3), (4 * row, 255 - 4 * row, row % 7 * 30), np.uint8)
        Image.fromarray(levels).save(tmp_path / "mine" / f"{row}.png")
        split = "train" if row % 3 else "valid" if row % 2 else "test"
        rows.append({"image": f"{row}.png", "caption": f"number {row}, shade {row // 10}", "split": split})
    return rows


def test_captioned_pictures_of_ones_own_run_from_a_table(call, align, pictures, tmp_path):
    data = own(tmp_path / "mine", pictures, "captions.csv")
    code, out, err = call("run", align, "--data", data, "--out", tmp_path / "out")
    assert code == 0, err
    run = Run.open(Path(out.splitlines()[-1].removeprefix("run: ")))
    assert run.provenance["data"] == {
        "train": {"images": 40},
        "valid": {"images": 10},
        "test": {"images": 10},
    }
    assert run.recipe["data"]["source"] == "table"
    assert run.recipe["zoo"]["images"] == ["colour_histogram", "frequencies"]
    written = [path.read_text() for path in run.folder.glob("*.json")]
    assert not [text for text in written if str(tmp_path) in text or "shade 3" in text]


def test_a_recipe_for_tables_keeps_what_it_says_when_it_is_given_its_table(align):
    align.write_text(
        ALIGN.replace("source: scenes, name: scenes", "source: table, name: own, path: chat.json, limit: 100")
    )
    changes = cli._changes(str(align), None, Path("mine/chat.json"), None)
    assert changes["data"] == {
        **changes["data"], "source": "table", "name": "chat", "path": "mine/chat.json", "limit": 100
    }  # fmt: skip
    assert changes.keys() == {"data"}  # title and published numbers stay


def features_with(row, value):
    def spoil(arrays):
        table = np.load(arrays / "images/small.npy")
        table[row] = value
        np.save(arrays / "images/small.npy", table)

    return spoil


def as_parquet(arrays, name, ids):
    table = np.load(arrays / f"{name}.npy")
    (arrays / f"{name}.npy").unlink()
    pl.DataFrame({"id": ids, "feature": table.tolist()}).write_parquet(arrays / f"{name}.parquet")


def said_again(arrays):
    """One caption more, of an image of another split."""
    table = pl.read_csv(arrays / "pairs.csv")
    pl.concat([table, pl.DataFrame({"image": [0], "split": ["test"]})]).write_csv(arrays / "pairs.csv")
    np.save(arrays / "texts/words.npy", np.ones((61, 5), np.float32))


def said_of_others(arrays):
    table = pl.read_csv(arrays / "pairs.csv")
    table.with_columns(image=pl.Series([0, 0, *range(2, 60)])).write_csv(arrays / "pairs.csv")


def in_another_order(arrays):
    as_parquet(arrays, "images/small", range(60))
    as_parquet(arrays, "images/large", [1, 0, *range(2, 60)])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda arrays: np.save(arrays / "images/small.npy", np.ones((59, 5), np.float32)),
            "large has 60 rows and small has 59; every encoder of a zoo needs one row for the same item",
        ),
        (
            lambda arrays: np.save(arrays / "texts/words.npy", np.ones((61, 5), np.float32)),
            "texts/words has 61 rows, the table of pairs has 60",
        ),
        (in_another_order, "the rows of large and small are in different order; sort both by one id"),
        (features_with(7, np.nan), "images/small.npy, row 7: the features are NaN"),
        (features_with(8, 0), "images/small.npy, row 8: the features are all zeros in 16 bits"),
        (lambda arrays: (arrays / "texts/words.npy").unlink(), "texts holds no .npy or .parquet file"),
        (lambda arrays: (arrays / "images/large.npy").unlink(), "one pair only (words with small)"),
        (said_again, "image 0: its captions are in test and train"),
        (said_of_others, "image 1: no caption in the table of pairs; add one or remove the image"),
        (lambda arrays: (arrays / "pairs.csv").unlink(), "has no pairs.csv or pairs.parquet"),
    ],
)  # fmt: skip
def test_features_that_cannot_be_used_end_with_code_2_and_leave_nothing(
    call, align, arrays, tmp_path, spoil, message
):
    spoil(arrays)
    code, out, err = call("run", align, "--data", arrays, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def zoo_with(**keys):
    """Replace encoders in the small recipe."""
    content = yaml.safe_load(ALIGN)
    content["zoo"] |= keys
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("zoo", "message"),
    [
        ({"images": ["colour_histogram"]}, "one pair only (lsa_words with colour_histogram)"),
        ({"images": ["resnet50", "lbp"]}, "no image encoder 'resnet50'; there are: mobilenet_v1_025"),
        (
            {"images": ["cifar_resnet20", "lbp"]},
            "data set encoders-cifar-resnet is not on this machine (searched: ",
        ),
        (
            {"images": ["timm:test_vit.r160_in1k", "lbp"]},
            "or give local-dir:FOLDER after timm: or open_clip:",
        ),
        (
            {"controls": [{"kind": "duplicate", "of": "hog"}]},
            "control 'hog, duplicate': no encoder 'hog'; there are: colour_histogram, frequencies",
        ),
        ({"images": ["lbp", "lbp"]}, "every encoder and control once"),
    ],
)
def test_encoders_that_cannot_be_used_end_with_code_2(call, align, tmp_path, zoo, message, monkeypatch):
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    align.write_text(zoo_with(**zoo))
    code, out, err = call("run", align, "--out", tmp_path / "out")
    assert (code, out) == (2, ""), err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert finished_runs(tmp_path / "out") == []


def test_a_wrongly_prepared_encoder_ends_with_code_2(call, align, tmp_path, monkeypatch):
    def refused(name):
        raise ManifestError(f"{name} has top-1 accuracy 0.1, its manifest says 0.9 +- 0.02")

    made = SimpleNamespace(fingerprint="x", side=32, parameters=1, fitting=Fitting(), on=None)
    opened = functools.lru_cache(lambda name: made)
    monkeypatch.setattr("workbench.zoo.open_pretrained", opened)
    monkeypatch.setattr("workbench.zoo.check_encoder", refused)
    align.write_text(zoo_with(images=["cifar_resnet20", "lbp"]))
    code, out, err = call("run", align, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "workbench: cifar_resnet20 has top-1 accuracy 0.1, its manifest says 0.9" in err
    assert finished_runs(tmp_path / "out") == []


# --- stopped ------------------------------------------------------------------------------------------------


def started(*arguments):
    """Start a command and wait until it trains."""
    process = command(*arguments)
    seen = b""
    while b"concat-seed0" not in seen:
        part = os.read(process.stderr.fileno(), 65536)
        assert part, seen.decode()
        seen += part
    return process


def test_a_stopped_run_says_so_shows_nothing_and_goes_on_with_the_same_command(mini, tmp_path):
    data = own(tmp_path, rows_of(30))
    settings = MINI.replace(
        "source: bundled, name: bundled, limit: 4", f"source: files, name: own, path: {data}"
    )
    mini.write_text(settings.replace("epochs: 1", "epochs: 40").rsplit("\n", 2)[0])  # without the last model
    arguments = ("run", mini, "--out", tmp_path / "out")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = started(*arguments)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunError, match="is being computed by another process"):
            run_recipe(str(mini), out=tmp_path / "out")
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err.decode().endswith("workbench: stopped; the same command goes on from here\n")
        assert b"Traceback" not in err
        assert out == b""
        assert finished_runs(tmp_path / "out") == []
    run = run_recipe(str(mini), out=tmp_path / "out")
    assert len(run.cards[2]["history"]) == 40
    assert not list((tmp_path / "out" / "runs").glob(".*.partial"))


def test_a_full_disk_keeps_finished_models_and_the_same_command_finishes(mini, tmp_path):
    data = own(tmp_path, rows_of(30))
    mini.write_text(
        MINI.replace("source: bundled, name: bundled, limit: 4", f"source: files, name: own, path: {data}")
    )
    # The head of "hyper" has 384 x 4 x 384 weights, 2.4 MB; nothing else needs half a megabyte.
    process = command("run", mini, "--out", tmp_path / "out", limit=500_000)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert out == b""
    last = err.decode().splitlines()[-1]
    assert "workbench: cannot write " in last
    assert "file size limit. Free some space or choose another place with --out" in last
    assert b"Traceback" not in err
    assert finished_runs(tmp_path / "out") == []
    [card] = (tmp_path / "out" / "runs").glob(".mini-*.partial/training/*/card.json")
    before = yaml.safe_load(card.read_text())
    run = run_recipe(str(mini), out=tmp_path / "out")
    assert before["model"] == "concat"
    assert before in run.cards  # its seconds too: it was not trained again
