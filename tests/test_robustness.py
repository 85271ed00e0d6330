"""Changed conditions: their texts by hand, the measured changes against arithmetic and scipy, the command."""

import re
import signal
import sys
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from workbench import cli
from workbench.conditions import normalise_condition
from workbench.datasets.pairs import PairData, load_pairs
from workbench.errors import DataError
from workbench.model import HyperCL
from workbench.papers.hyper_cl import ConditionedHead
from workbench.papers.hyper_cl_settings import ModelSettings
from workbench.robustness import OFF_TOPIC, STILL, VARIANTS, measure_robustness, misspelt
from workbench.tables import robustness_table
from workbench.training import seed_everything

# Deadlines would measure the machine, not the code; the database would write into the checkout.
quick = settings(max_examples=100, deadline=None, database=None)
ORDER = ["as written", *VARIANTS]
WORD = re.compile(r"[^\W\d_]+")


# --- the changed texts --------------------------------------------------------------------------------------


def test_a_word_of_four_letters_has_one_place_to_misspell():
    # Only its second and third letter can change places; shorter words and numbers stay.
    assert misspelt("Wide or thin, at 4096 km?") == "Wdie or tihn, at 4096 km?"


@quick
@given(st.text(st.sampled_from("abcdeéßXY ,.-7_")), st.integers(0, 5))
def test_a_misspelt_condition_keeps_its_shape(text, seed):
    found = misspelt(text, seed)
    assert len(found) == len(text)
    assert found == misspelt(text, seed)
    for before, after in zip(WORD.finditer(text), WORD.finditer(found), strict=True):
        one, other = before.group(), after.group()
        assert before.span() == after.span()
        assert (one[0], one[-1], sorted(one)) == (other[0], other[-1], sorted(other))
        if len(one) < 4:
            assert one == other
        places = [place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        assert places in ([], [places[0], places[0] + 1] if places else [])
    assert WORD.sub("", found) == WORD.sub("", text)


def test_another_seed_misspells_at_another_place():
    text = "The manufacturing neighbourhoods"
    assert len({misspelt(text, seed) for seed in range(10)}) > 3
    assert all(misspelt(text, seed) != text for seed in range(10))


def test_variants_of_one_condition():
    found = {name: change("The hue of a car.", 5) for name, change in VARIANTS.items()}
    del found["misspelt"]  # no word but these has four letters
    assert found == {
        "paraphrased": "In terms of the hue of a car.",
        "asked": "Are they alike as to the hue of a car?",
        "capitals": "THE HUE OF A CAR.",
        "negated": "Anything but the hue of a car.",
        "off-topic": OFF_TOPIC[1],  # 5 mod 4
        "empty": " ",
    }
    assert VARIANTS["misspelt"]("The side of a car.", 5) == "The sdie of a car."
    assert len({VARIANTS["off-topic"]("The hue.", row) for row in range(4)}) == 4


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("The size...", "Anything but the size."),
        ("DNA of the dog", "Anything but DNA of the dog."),
        ("A number of dogs. ", "Anything but a number of dogs."),
        ("size", "Anything but size."),
        ("Éclair or tart.", "Anything but éclair or tart."),
    ],
)
def test_the_first_letter_is_small_within_a_sentence_unless_the_word_is_all_capitals(condition, expected):
    assert VARIANTS["negated"](condition, 0) == expected


# --- measured: a model whose cosines are made up ------------------------------------------------------------


class Scripted(HyperCL):
    """Gives every pair the cosine that a function of its first sentence and condition says."""

    def __init__(self, cosine: Callable[[str, str], float]) -> None:
        self.cosine = cosine

    def encode_conditioned(self, texts, conditions, strength=1.0):
        asked = [normalise_condition(condition) for condition in conditions]
        both = zip(texts, asked, strict=True)
        angle = torch.tensor([0.0 if text == "-" else self.cosine(text, one) for text, one in both])
        if "-" in texts:  # the other side of every pair
            return torch.stack([torch.ones(len(texts)), torch.zeros(len(texts))], 1)
        return torch.stack([angle, (1 - angle**2).sqrt()], 1)


def rows_of(*rows: tuple[str, str, float, int]) -> pl.DataFrame:
    names = ["sentence1", "condition", "label", "pair"]
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(sentence2=pl.lit("-"))


HAND = rows_of(("a", "The hue.", 1.0, 0), ("a", "The den.", 0.0, 0), ("b", "The hue.", 0.0, 1),
               ("b", "The den.", 1.0, 1))  # fmt: skip
OWN = {("a", "The hue."): 0.9, ("a", "The den."): 0.1, ("b", "The hue."): 0.6, ("b", "The den."): 0.2}


def made_up(text: str, condition: str) -> float:
    """Return other cosines for other conditions; pairs are told apart by their sentence."""
    if (text, condition) in OWN:
        return OWN[text, condition]
    if condition.startswith("In terms"):  # everything a bit lower
        return OWN[text, f"The {condition[-4:-1]}."] - 0.02
    if condition.startswith("Anything"):  # a bit more than that
        return OWN[text, f"The {condition[-4:-1]}."] - 0.025
    if condition in OFF_TOPIC:  # pair a: 0.3 and 0.4, pair b: 0.3 and 0.4
        return 0.3 + 0.1 * OFF_TOPIC.index(condition)
    return OWN[text, f"The {condition[-4:-1].lower()}."] + 0.005


@pytest.fixture(scope="module")
def by_hand() -> dict[str, dict]:
    found = measure_robustness(Scripted(made_up), HAND)
    assert found["variant"].to_list() == ORDER
    assert found["example"].to_list()[1:3] == ["In terms of the hue.", "Are they alike as to the hue?"]
    return {row["variant"]: row for row in found.to_dicts()}


def test_moved_is_the_mean_absolute_change_of_the_cosine(by_hand):
    # Off-topic: |0.3 - 0.9| + |0.4 - 0.1| + |0.3 - 0.6| + |0.4 - 0.2| = 1.4 over four rows.
    expected = {"as written": 0, "paraphrased": 0.02, "asked": 0.005, "capitals": 0.005, "misspelt": 0.0}
    expected |= {"negated": 0.025, "off-topic": 0.35}
    for name, moved in expected.items():
        assert by_hand[name]["moved"] == pytest.approx(moved, abs=1e-6)  # cosines in single precision
        assert by_hand[name]["rows"] == 4


def test_rank_kept_and_pair_order_of_the_hand_case(by_hand):
    # As written, pair a is ordered right (0.9 over 0.1), pair b is not (0.2 under 0.6).
    assert by_hand["as written"]["pair_order"] == 0.5
    # Off-topic, label 1 stands at 0.3 under 0.4 in pair a, and at 0.4 over 0.3 in pair b.
    assert by_hand["off-topic"]["pair_order"] == 0.5
    for name in ("as written", "paraphrased", "negated"):  # shifted as a whole
        assert by_hand[name]["rank_kept"] == pytest.approx(1)
    # Ranks 4 1 3 2 against 1.5 3.5 1.5 3.5: deviations 1.5 -1.5 0.5 -0.5 and -1 1 -1 1 from 2.5 give
    # -4 over the root of 5 times 4.
    assert by_hand["off-topic"]["rank_kept"] == pytest.approx(-4 / 20**0.5)


def test_verdicts_of_the_hand_case(by_hand):
    verdicts = {name: row["verdict"] for name, row in by_hand.items()}
    assert verdicts["as written"] == ""
    assert verdicts["paraphrased"] == "moves"
    assert verdicts["asked"] == verdicts["capitals"] == "hardly moves, as it should"
    # 0.025 is not above 1.5 times 0.02.
    assert verdicts["negated"] == "MOVES LIKE A PARAPHRASE: what is different about it is not read"
    assert verdicts["off-topic"] == "moves, as it should"


def test_the_empty_condition_is_reported_as_refused(by_hand):
    row = by_hand["empty"]
    assert row["verdict"].startswith("refused: the condition is empty or only white space")
    assert [row[name] for name in ("rows", "moved", "rank_kept", "pair_order")] == [None] * 4


def test_scores_that_are_all_alike_have_no_rank_correlation():
    found = measure_robustness(Scripted(lambda *_: 0.5), HAND).filter(pl.col("variant") != "empty")
    assert found["rank_kept"].null_count() == 7
    assert found["pair_order"].to_list() == [0.5] * 7
    flagged = [row[0] for row in found.select("variant", "verdict").iter_rows() if "NOTHING" in row[1]]
    assert flagged == ["negated", "off-topic"]


def test_pairs_under_one_condition_each_have_no_pair_order():
    table = rows_of(("a", "The hue.", 1.0, 0), ("b", "The hue.", 0.0, 1))
    found = measure_robustness(Scripted(made_up), table)
    assert found["pair_order"].null_count() == found.height
    assert all(row[5] == "-" for row in robustness_table(found).rows)


def test_a_wording_that_turns_the_order_round_is_not_understood():
    table = rows_of(("a", "The colour.", 1.0, 0), ("a", "The weather.", 0.0, 0))
    known = {"The colour.": 0.9, "The weather.": 0.1}

    def cosine(_: str, condition: str) -> float:
        if condition.startswith("The") and condition not in known:  # letters are swapped, or all are capitals
            return 0.1 if condition[4] == "c" else 0.9
        return next((value for text, value in known.items() if text[4:-1] in condition.lower()), 0.5)

    found = {row["variant"]: row["verdict"] for row in measure_robustness(Scripted(cosine), table).to_dicts()}
    assert found["misspelt"] == "NOT UNDERSTOOD: pair order falls by 1.00"
    assert found["paraphrased"] == "hardly moves, as it should"


@pytest.mark.parametrize(("limit", "rows"), [(1, 2), (2, 4), (3, 4), (5, 5), (1000, 5)])
def test_a_limit_takes_whole_pairs(limit, rows):
    # The first row's pair has its other row in place 2, the second's in place 3.
    table = rows_of(("a", "The hue.", 1.0, 4), ("b", "The hue.", 1.0, 2), ("a", "The den.", 0.0, 4),
                    ("b", "The den.", 0.0, 2), ("a", "The hue.", 0.5, 7))  # fmt: skip
    assert measure_robustness(Scripted(made_up), table, limit)["rows"][0] == rows


def test_an_empty_table_is_refused():
    with pytest.raises(DataError, match="no pairs to measure on; give a table with at least one row"):
        measure_robustness(Scripted(made_up), HAND.clear())


# --- measured: real heads -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> pl.DataFrame:
    """10 bundled pairs, 20 rows."""
    return load_pairs(PairData(source="bundled", name="bundled", limit=10))["test"]


@pytest.fixture(scope="module")
def model_of(encoder):
    def model(**settings) -> HyperCL:
        seed_everything(3)
        return HyperCL(ConditionedHead(ModelSettings(name="own", **settings), 384, 384), encoder)

    return model


def test_a_model_that_ignores_its_condition_is_flagged(model_of, pairs):
    found = measure_robustness(model_of(kind="shared"), pairs)
    verdict = dict(found.select("variant", "verdict").iter_rows())
    for name in ("negated", "off-topic"):
        assert verdict[name].startswith("CHANGES NOTHING")
    moved = found.filter(pl.col("variant") != "empty")
    assert moved["moved"].max() < 1e-6  # the same rows in the same products
    assert moved["rank_kept"].to_numpy() == pytest.approx(1)


def test_a_model_that_reads_its_condition_is_not_flagged(model_of, pairs):
    found = measure_robustness(model_of(kind="hyper", rank=8, start="paper", dropout=0.0), pairs)
    row = found.row(by_predicate=pl.col("variant") == "off-topic", named=True)
    assert row["moved"] > STILL
    assert "NOTHING" not in row["verdict"]


def test_numbers_are_those_of_scipy_on_scores_row_by_row(model_of, pairs):
    model = model_of(kind="hyper", rank=8)
    found = {row["variant"]: row for row in measure_robustness(model, pairs).to_dicts()}

    def scores(conditions: list[str]) -> np.ndarray:
        sides = zip(pairs["sentence1"], pairs["sentence2"], conditions, strict=True)
        return np.array([model.similarity([one], [other], asked).item() for one, other, asked in sides])

    own = pairs["condition"].to_list()
    numbers = {text: row for row, text in enumerate(dict.fromkeys(own))}
    before = scores(own)
    for name in ("misspelt", "off-topic"):
        after = scores([VARIANTS[name](text, numbers[text]) for text in own])
        # Single precision, one row at a time instead of all in one product.
        assert found[name]["moved"] == pytest.approx(np.abs(after - before).mean(), abs=1e-5)
        assert found[name]["rank_kept"] == pytest.approx(spearmanr(before, after).statistic, abs=1e-3)
        order = [
            (np.sign(after[i] - after[j]) + 1) / 2  # two conditions may get the same off-topic one
            for i in range(len(own)) for j in range(len(own))
            if pairs["pair"][i] == pairs["pair"][j] and pairs["label"][i] > pairs["label"][j]
        ]  # fmt: skip
        assert found[name]["pair_order"] == pytest.approx(np.mean(order))


# --- the table and the command ------------------------------------------------------------------------------


def test_the_table_has_a_row_per_variant(by_hand):
    table = robustness_table(pl.DataFrame(list(by_hand.values()), infer_schema_length=None))
    assert [row[0] for row in table.rows] == ORDER
    assert {len(row) for row in table.rows} == {len(table.columns)} == {7}
    assert table.rows[ORDER.index("off-topic")][3:] == ["0.350", "-0.894", "0.500", "moves, as it should"]
    assert table.rows[ORDER.index("empty")][1:6] == [" ", "-", "-", "-", "-"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Call ``workbench robustness`` in this process; return its exit code, output and errors."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["workbench", "robustness", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_command_measures_a_finished_run_on_the_pairs_of_its_recipe(call, tiny_run, tmp_path):
    # The same name, given by a path, and fewer pairs: every text is read by the real encoder.
    file = tmp_path / "hyper_cl_bundled_tiny.yaml"
    file.write_text("extends: hyper_cl_bundled\ndata: {limit: 6}\n")
    code, printed, err = call(file, "hyper_k16", "--out", tiny_run.folder.parent.parent)
    assert code == 0, err
    assert [line.split(" | ")[0].lstrip("| ") for line in printed.splitlines()[2:]] == ORDER
    table = load_pairs(PairData(source="bundled", name="bundled", limit=6))["test"]
    expected = robustness_table(measure_robustness(tiny_run.model("hyper_k16"), table)).markdown()
    assert printed == f"{expected}\n"


def test_the_command_measures_own_pairs(call, tiny_run, tmp_path):
    known = load_pairs(PairData(source="bundled", name="bundled", limit=20))["test"]
    columns = known.select("sentence1", "sentence2", "condition", "label")
    # Another condition for all rows, so that the table shows which pairs it is about.
    columns.with_columns(condition=pl.lit("The mood.")).unique().write_csv(tmp_path / "own.csv")
    out = tiny_run.folder.parent.parent
    code, printed, err = call("hyper_cl_bundled_tiny", "concat", "--out", out, "--data", tmp_path / "own.csv")
    assert code == 0, err
    assert re.search(r"\| as written \| The mood. \| \d+ \| 0.000 \|", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hyper_cl_bundled_tiny", "absent"], "kept no model 'absent'; it has: concat, hadamard, hyper_k16"),
        (["hyper_cl_bundled", "concat"], "no finished run of hyper_cl_bundled under"),
        (["hyper_cl_wn18rr_tiny", "hyper_k8"], "robustness is measured on pairs under conditions"),
        (["absent", "concat"], "no recipe named 'absent'"),
    ],
)
def test_what_cannot_be_measured_ends_with_code_2_and_one_line(call, tiny_run, arguments, message):
    code, printed, err = call(*arguments, "--out", tiny_run.folder.parent.parent)
    assert (code, printed, err.count("\n")) == (2, "", 1), err
    assert message in err
