"""Reports: every verdict, every floor, and nothing that acts or leaves the page."""

import hashlib
import inspect
import json
import re
import shutil
from html.parser import HTMLParser

import polars as pl
import pytest

from workbench.family_tables import family_table
from workbench.files import canonical_json, sha256_of
from workbench.papers import FAMILIES, READS_TEXT, encoder_is_read, load_recipe, paper_of
from workbench.report import footer_of, write_index, write_run_report
from workbench.runs import Run
from workbench.sections import how_cards, run_sections
from workbench.tables import (
    Table,
    bar_table,
    card_table,
    findings,
    main_metric,
    model_table,
    published_table,
    seed_differences,
    with_interval,
)


@pytest.fixture
def altered(tiny_run, tmp_path):
    """Copy the tiny run into an output folder of its own, with changes to its recipe or its metrics."""

    def make(metrics=None, **changes):
        folder = tmp_path / "out" / "runs" / tiny_run.folder.name
        shutil.copytree(tiny_run.folder, folder)
        settings = {**json.loads((folder / "recipe.json").read_text()), **changes}
        (folder / "recipe.json").write_text(json.dumps(settings))
        if metrics is not None:
            metrics.write_parquet(folder / "metrics.parquet")
        marked = json.loads((folder / "done.json").read_text())["files"]
        (folder / "done.json").write_text(
            canonical_json({"files": {name: sha256_of(folder / name) for name in marked}})
        )
        return Run.open(folder)

    return make


def mean_of(run, model, metric, split="test"):
    rows = run.metrics.filter(pl.col("seed").is_null(), model=model, metric=metric, split=split, group="all")
    return rows["value"].item()


def bar(model, at_least, metric="pair_order", **more):
    return {"model": model, "metric": metric, "split": "test", "group": "all", "at_least": at_least, **more}


def published(value, model="hadamard", metric="spearman", **more):
    about = {"split": "test", "spread": None, "table": "Table 1", "source": "Somebody", "tolerance": 0.02}
    return {**about, "model": model, "metric": metric, "value": value, "comparable": True, "note": "", **more}


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text.append(data)


# --- what is written ----------------------------------------------------------------------------------------


def test_the_index_is_written_as_html_and_markdown_beside_each_runs_page(altered, tmp_path):
    run, out = altered(), tmp_path / "out"
    assert write_index(out) == out / "index.html"
    name = run.recipe["name"]
    assert (out / "html" / f"{run.folder.name}.html").is_file()
    assert f'<a href="html/{run.folder.name}.html">{name}</a>' in (out / "index.html").read_text()
    assert f"| {name} |" in (out / "index.md").read_text()


def test_no_page_loads_anything_from_elsewhere(altered, tmp_path):
    altered()
    write_index(tmp_path / "out")
    pages = [tmp_path / "out" / "index.html", *(tmp_path / "out" / "html").iterdir()]
    assert len(pages) == 2
    for path in pages:
        page = Page(path.read_text())
        for tag, attributes in page.tags:
            assert tag not in {"iframe", "object", "embed", "base", "link", "img"}
            assert "src" not in attributes, (path.name, tag)
            assert not re.match(r"(\w+:)?//", attributes.get("href") or ""), (path.name, tag)
        styles = re.findall(r"<style>(.*?)</style>", path.read_text(), flags=re.S)
        assert styles
        assert not re.search(r"@import|url\(", styles[0])


def test_a_runs_page_shows_its_figures_its_models_and_its_origin(tiny_run):
    text = write_run_report(tiny_run).read_text()
    assert text.count("Plotly.newPlot(") >= 4  # all models, two ways to group them, training
    shown = " ".join(Page(text).text)
    for model in tiny_run.recipe["models"]:
        assert model["name"] in shown
    about = tiny_run.provenance
    for part in (
        tiny_run.folder.name,
        about["commit"],
        about["data_sha256"][:12],
        about["encoder_sha256"][:12],
    ):
        assert part in shown


def test_a_run_without_losses_has_no_empty_figure_of_them(tiny_run, altered):
    run = altered()
    assert [one.title for one in run_sections(run)].count("Training") == 1
    vars(run)["cards"] = [{**card, "history": []} for card in tiny_run.cards]
    assert "Training" not in [one.title for one in run_sections(run)]


def test_a_report_is_the_same_whenever_it_is_written(tiny_run):
    def text():
        written = write_run_report(tiny_run).read_text()
        return re.sub(
            r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "ID", written
        )  # plotly names its boxes at random

    assert hashlib.sha256(text().encode()).digest() == hashlib.sha256(text().encode()).digest()


# --- verdicts -----------------------------------------------------------------------------------------------


def test_a_bar_is_met_at_its_value_and_missed_just_above(tiny_run, altered):
    value = mean_of(tiny_run, "hadamard", "pair_order")
    run = altered(
        bars=[bar("hadamard", value), bar("hadamard", value + 1e-6), bar("hadamard", 0.1, "nothing")]
    )
    assert [row[-1] for row in bar_table(run).rows] == ["met", "missed", "not measured"]


def test_the_index_counts_bars_and_names_the_missed(altered, tmp_path):
    altered(bars=[bar("hadamard", 0.0), bar("concat", 1.1)])
    write_index(tmp_path / "out")
    for name in ("index.html", "index.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "1 of 2 met" in text
        assert "Bars not met: concat, pair_order (test, all): missed at " in text


def test_published_numbers_get_the_verdict_their_distance_and_comparability_ask_for(tiny_run, altered):
    value = mean_of(tiny_run, "hadamard", "spearman")
    run = altered(
        published=[
            published(value + 0.0199),
            published(value - 0.0199),
            published(value + 0.0201),
            published(value - 0.05, tolerance=0.06),
            published(value, comparable=False),
            published(value, metric="nothing"),
        ]
    )
    table = published_table(run)
    verdicts = [row[table.columns.index("verdict")] for row in table.rows]
    assert verdicts == [
        "reproduced",
        "reproduced",
        "not reproduced",
        "reproduced",
        "not comparable",
        "not measured",
    ]
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert first["ours"] == f"{value:.3f}"
    assert first["difference"] == "-0.020"  # ours minus published
    assert "Table 1, Somebody" in first["where"]


def test_failures_are_shown_as_plainly_as_successes(tiny_run, altered):
    value = mean_of(tiny_run, "hadamard", "spearman")
    run = altered(
        bars=[bar("hadamard", 0.0), bar("hadamard", 1.1)],
        published=[published(value), published(value + 0.5)],
    )
    cells = [attributes for tag, attributes in Page(write_run_report(run).read_text()).tags if tag == "td"]
    classes = [attributes.get("class") for attributes in cells]
    text = write_run_report(run).read_text()
    for word, kind in (
        ("met", "met"),
        ("missed", "missed"),
        ("reproduced", "met"),
        ("not reproduced", "missed"),
    ):
        assert f'<td class="{kind}">{word}</td>' in text
    assert classes.count("missed") >= 2


# --- sentences ----------------------------------------------------------------------------------------------


def test_the_condition_only_floor_is_printed_beside_every_result(tiny_run, altered, tmp_path):
    main = main_metric(tiny_run)
    line = f"never sees the sentences, has {main} {mean_of(tiny_run, 'condition_only', main):.3f}."
    assert any(line in sentence for sentence in findings(tiny_run))
    run = altered()
    write_index(tmp_path / "out")
    for path in (write_run_report(run), tmp_path / "out" / "index.html", tmp_path / "out" / "index.md"):
        assert line in path.read_text()


def test_the_best_model_is_named_with_value_and_interval(tiny_run):
    main = main_metric(tiny_run)
    rows = tiny_run.metrics.filter(pl.col("seed").is_null(), metric=main, split="test", group="all")
    best = rows.sort("value", descending=True).row(0, named=True)
    assert f"{best['model']} with {best['value']:.3f}" in findings(tiny_run)[0]
    assert f"({best['low']:.3f} to {best['high']:.3f})" in findings(tiny_run)[0]


def test_a_simple_baseline_that_wins_is_said_to_win(tiny_run, altered):
    main = main_metric(tiny_run)
    plain = pl.col("metric") == main
    metrics = tiny_run.metrics.with_columns(
        value=pl.when(plain, model="concat").then(0.99).otherwise(pl.col("value")),
        low=pl.when(pl.col("metric") == f"{main}_minus_hadamard", pl.col("model").str.starts_with("hyper"))
        .then(-0.3)
        .otherwise(pl.col("low")),
        high=pl.when(pl.col("metric") == f"{main}_minus_hadamard", pl.col("model").str.starts_with("hyper"))
        .then(-0.1)
        .otherwise(pl.col("high")),
    )
    said = " ".join(findings(altered(metrics=metrics)))
    assert re.search(r"Best of \d+ models by \w+: concat with 0.990", said)
    assert re.search(r"The best head of the paper's own form, hyper_\w+, is below hadamard", said)


def test_who_is_ahead_on_the_rows_but_not_under_every_seed_is_said_to_be_so(tiny_run, altered):
    """Row by row hyper_k16 is ahead by 0.1 to 0.3; by seed it has 0.9 and 0.4, the gate 0.5 and 0.5."""
    main, name = main_metric(tiny_run), "hyper_k16"
    frame, own, seeded = tiny_run.metrics, pl.col("metric") == main, pl.col("seed").is_not_null()
    template = frame.filter(pl.col("seed").is_null(), own, model=name, split="test", group="all")
    by_seed = [
        template.with_columns(model=pl.lit(model), seed=pl.lit(seed, pl.Int64), value=pl.lit(value))
        for model, seed, value in ((name, 0, 0.9), (name, 1, 0.4), ("hadamard", 0, 0.5), ("hadamard", 1, 0.5))
    ]
    frame = pl.concat([frame.filter(~(own & seeded)), *(one.select(frame.columns) for one in by_seed)])
    versus = (pl.col("metric") == f"{main}_minus_hadamard") & (pl.col("model") == name)
    best = own & pl.col("seed").is_null() & (pl.col("model") == name)
    frame = frame.with_columns(
        value=pl.when(versus).then(0.2).when(best).then(0.99).otherwise("value"),
        low=pl.when(versus).then(0.1).otherwise("low"), high=pl.when(versus).then(0.3).otherwise("high"),
    )  # fmt: skip
    run = altered(metrics=frame)
    run.provenance["seeds"] = [0, 1]
    assert seed_differences(run, name, "hadamard") == pytest.approx([0.4, -0.1])
    told = "+0.200 (+0.100 to +0.300); by seed +0.400, -0.100."
    expected = f"{name}, is above hadamard, on these rows but not under every seed: {told}"
    assert expected in " ".join(findings(run))


def test_a_matched_model_is_called_so_whether_it_was_trained_or_not(tiny_family_run):
    against = {one["name"]: one["against"] for one in tiny_family_run.recipe["models"] if one["against"]}
    assert against
    said = " ".join(findings(tiny_family_run))
    for name, matched in against.items():
        assert re.search(rf"{name} is (above|below|not \w+ from) {matched}, its matched model: [+-]\d", said)


def test_a_head_that_is_the_reference_itself_is_not_compared_with_itself(tiny_run, altered):
    main = main_metric(tiny_run)
    metrics = tiny_run.metrics.with_columns(pl.col("metric").str.replace(f"{main}_minus_hadamard", "other"))
    assert findings(altered(metrics=metrics, reference="hyper_k16"))


def test_a_model_without_the_ranking_metric_comes_last_with_a_dash(tiny_run, altered):
    main = main_metric(tiny_run)
    gone = (pl.col("model") == "condition_only") & pl.col("metric").str.starts_with(main)
    run = altered(metrics=tiny_run.metrics.filter(~gone))
    frame = model_table(run).sort(main, descending=True, nulls_last=True)
    assert frame["model"][-1] == "condition_only"
    assert any("undefined (it scores all rows alike)" in line for line in findings(run))
    assert "<td>condition_only</td>" in write_run_report(run).read_text()


def test_where_test_labels_are_withheld_the_validation_split_is_reported(tiny_run, altered):
    run = altered(metrics=tiny_run.metrics.filter(split="valid"))
    frame = model_table(run)
    row = frame.filter(model="hadamard").row(0, named=True)
    assert row["spearman"] == mean_of(tiny_run, "hadamard", "spearman", "valid")
    assert "valid split, all" in write_run_report(run).read_text()


# --- inert --------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> | {{7*7}} & "q" \n| a | b |'


def test_markup_in_a_title_or_a_note_comes_out_as_text(tiny_run, altered, tmp_path):
    data = {**tiny_run.recipe["data"], "name": HOSTILE}
    notes = [published(0.5, note=HOSTILE, source=HOSTILE)]
    run = altered(title=HOSTILE, published=notes, data=data)
    write_index(tmp_path / "out")
    for path in (write_run_report(run), tmp_path / "out" / "index.html"):
        text = path.read_text()
        page = Page(text)
        assert "<script>alert(1)" not in text
        assert "img" not in {tag for tag, _ in page.tags}
        assert "{{7*7}}" in "".join(page.text)
        assert "<script>alert(1)</script>" in "".join(page.text)


def test_no_text_breaks_out_of_a_markdown_table(tiny_run, altered, tmp_path):
    data = {**tiny_run.recipe["data"], "name": HOSTILE}
    altered(title=HOSTILE, published=[published(0.5, note=HOSTILE)], data=data)
    write_index(tmp_path / "out")
    text = (tmp_path / "out" / "index.md").read_text()
    assert "<script" not in text
    assert "<img" not in text
    counts = []
    for block in re.split(r"\n\n", text):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            counts.append({len(re.findall(r"(?<!\\)\|", line)) for line in lines})
    assert len(counts) >= 3
    assert all(len(found) == 1 for found in counts)  # every line has as many cells as its header


def test_a_table_escapes_what_markdown_reads_as_cells_or_tags():
    table = Table(["a", "b"], [["x|y\nz", {"text": "<b>", "href": "page.html"}]])
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x\\|y z | &lt;b> |"


# --- a zoo of encoders --------------------------------------------------------------------------------------


def test_a_zoos_page_has_its_maps_and_tables_and_no_section_for_every_pair(tiny_zoo_run):
    text = write_run_report(tiny_zoo_run).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    for heading in (
        "Cost and quality",
        "Pairs: ape",
        "Agreement with the full grid",
        "Scale",
        "Image encoders",
    ):
        assert heading in headings
    assert not [
        heading for heading in headings if heading.startswith(("pair:", "image:", "By pair", "By image"))
    ]
    assert "text: lsa_words" in headings
    assert len(headings) < 30
    shown = " ".join(Page(text).text)
    assert "of ape's operations a pair; R@10 minus ape:" in shown
    assert "ape_large (all-MiniLM-L6-v2 only)" in shown  # not lost, though it misses pairs


def test_what_a_zoo_costs_stands_in_the_index(tiny_zoo_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny_zoo_run.folder, out / "runs" / tiny_zoo_run.folder.name)
    write_index(out)
    for name in ("index.html", "index.md"):
        assert "operations a pair" in (out / name).read_text()


def test_the_index_holds_families_against_claims_and_bars_before_their_own_sections(
    tiny_family_run, tiny_run, tmp_path
):
    out = tmp_path / "out"
    for run in (tiny_family_run, tiny_run):
        shutil.copytree(run.folder, out / "runs" / run.folder.name)
    write_index(out)
    name = tiny_family_run.recipe["name"]
    page, text = (out / "index.html").read_text(), (out / "index.md").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == re.findall(r"^## (.*)$", text, flags=re.M)
    assert headings[:4] == ["Runs", "Families: claim, bar, control", name, f"{name}: cost and health"]
    assert "cost and health" not in " ".join(headings[4:])  # of families only
    table, shown = family_table([tiny_family_run]), " ".join(Page(page).text)
    cards = card_table(tiny_family_run)
    for part in (*table.columns, *map(str, table.rows[0]), *cards.columns, *map(str, cards.rows[-1])):
        assert part in shown
    assert table.markdown() in text
    assert cards.markdown() in text


def test_a_footer_names_the_encoder_where_it_is_read(tiny_run, tiny_family_run):
    assert "encoder all-MiniLM-L6-v2 (" in " ".join(footer_of(tiny_run))
    assert "encoder" not in " ".join(footer_of(tiny_family_run))
    # A family reads texts if its file says so.
    reads = {name for name in FAMILIES if "recipe.encoder" in inspect.getsource(paper_of(name))}
    assert reads == set(READS_TEXT)
    digits, captions = (load_recipe(name).model_dump(mode="json")
                        for name in ("family_objectives", "family_objectives_captions"))  # fmt: skip
    assert not encoder_is_read(digits)
    assert encoder_is_read(captions)


def test_an_index_without_families_has_no_table_of_them(altered, tmp_path):
    altered()
    write_index(tmp_path / "out")
    assert "Families" not in (tmp_path / "out" / "index.md").read_text()


def test_cards_tell_how_embeddings_lie_where_that_was_measured(tiny_run, tiny_zoo_run, tiny_family_run):
    table = card_table(tiny_run)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    card = next(card for card in tiny_run.cards if card["model"] == "hadamard")
    assert rows["hadamard"]["alignment"] == f"{card['geometry']['alignment']:.3f}"
    assert rows["hadamard"]["uniformity"] == f"{card['geometry']['uniformity']:.3f}"
    assert "perfectly aligned" in write_run_report(tiny_run).read_text()
    assert "alignment" in card_table(tiny_zoo_run).columns
    assert "alignment" not in card_table(tiny_family_run).columns


def test_cards_tell_what_is_added_beside_the_own_weights_where_that_was_measured(tiny_run, altered):
    run = altered()
    of = [card for card in run.cards if "health" in card and card["seed"] is not None]
    assert len({card["model"] for card in of}) > 1
    # A run from before this was measured.
    for card in of:
        card["health"].pop("over_own", None)
    told = "the norm of what is added to a layer"
    assert "generated / own" not in card_table(run).columns
    assert told not in " ".join(how_cards(run))
    of[0]["health"]["over_own"] = 0.3125
    table = card_table(run)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows[of[0]["model"]]["generated / own"] == "0.312"
    others = {row["generated / own"] for name, row in rows.items() if name != of[0]["model"]}
    assert others == {"-"}
    assert rows[of[0]["model"]]["generator"] == of[0]["health"]["verdict"]
    assert told in " ".join(how_cards(run))


def test_cards_tell_operations_where_they_were_counted(tiny_run, tiny_zoo_run):
    assert "operations" not in card_table(tiny_run).columns
    table = card_table(tiny_zoo_run)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    card = next(card for card in tiny_zoo_run.cards if card["model"] == "ape" and card["seed"] is not None)
    assert rows["ape"]["operations"] == f"{card['flops'] / 1e9:.3g} GFLOP"
    assert rows["ape"]["generator"] == "-"
    assert "chance" not in rows


@pytest.mark.parametrize("none", [None, float("nan")])
def test_a_value_without_an_interval_says_so(none):
    assert with_interval(0.5, none, none) == "0.500 (no interval)"
    assert with_interval(0.5, 0.4, 0.6, "+") == "+0.500 (+0.400 to +0.600)"
    assert with_interval(None, none, none) == "-"
