"""The page in a real browser: what can be chosen and what follows, by mouse and by keyboard; its numbers against the statistics."""

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.statistics import accuracy_interval, mcnemar
from stages.experiments.details import of_dense
from stages.experiments.page.content import metric_facts
from stages.experiments.page.writing import html
from stages.experiments.paired import Metric, apart
from tests.experiments import synthetic
from tests.experiments.test_paired import of_parts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")

SECONDS, BYTES = 2.0, 5 * 10**6  # within which the page is open, and below which its size is
GROUPS = [synthetic.group(), synthetic.other_group()]
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
ROWS = "#table tbody tr"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html(GROUPS, []), encoding="utf8")
    return path


def opened(browser: Any, file: Path, **settings: Any) -> Any:
    """A page whose console and requests are kept in `complaints`."""
    context = browser.new_context(viewport=settings.pop("viewport", WIDE), permissions=["clipboard-read", "clipboard-write"], **settings)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url) if request.url.startswith(("http", "ws")) else None)
    page.goto(file.as_uri())
    return page


@pytest.fixture()
def page(browser, file) -> Iterator[Any]:
    """The page; nothing complained when the test ends."""
    made = opened(browser, file)
    yield made
    complaints = made.complaints
    made.context.close()
    assert complaints == []


def names(page: Any) -> list[str]:
    """The experiments of the table in order, the dense model first."""
    return page.eval_on_selector_all(f"{ROWS} th", "cells => cells.map(cell => cell.firstChild.textContent)")


def test_a_search_and_two_selects_filter(page):
    page.fill("#search", "sparsegpt 2:4")
    assert names(page) == ["dense", "sparsegpt-2-4"]
    assert page.inner_text("#shown") == "1 of 21 experiments shown"
    page.fill("#search", "")
    page.select_option("#method", "wanda")
    page.select_option("#pattern", "4:8")
    assert names(page) == ["dense", "wanda-4-8"]


def test_what_is_filtered_out_is_faint_in_the_frontier(page):
    page.locator("#frontier").scroll_into_view_if_needed()
    page.wait_for_selector("#frontier svg")
    page.select_option("#method", "wanda")
    page.wait_for_function("document.querySelectorAll('#frontier .mark-symbol path[opacity=\"0.08\"]').length === 14")


def test_a_heading_sorts_both_ways(page):
    page.click("[data-sort=sparsity]")
    assert names(page)[1].endswith("-40")
    assert page.get_attribute("th:has([data-sort=sparsity])", "aria-sort") == "ascending"
    page.click("[data-sort=sparsity]")
    assert names(page)[1].endswith("-80")
    assert page.get_attribute("th:has([data-sort=sparsity])", "aria-sort") == "descending"
    page.click("[data-sort='mean/tasks/accuracy']")
    assert page.get_attribute("th:has([data-sort='mean/tasks/accuracy'])", "aria-sort") == "descending"  # the best first


def test_the_table_begins_with_the_best_by_the_first_metric(page):
    assert names(page)[:2] == ["dense", "admm-40"]
    assert page.get_attribute("th:has([data-sort='corpus/wikipedia/perplexity'])", "aria-sort") == "ascending"


@pytest.mark.parametrize("baseline", ["dense", "sparsegpt-50"])
def test_differences_to_the_baseline_are_those_of_the_statistics(page, baseline):
    group = GROUPS[0]
    known = {details.name: details.scores for details in group.results} | {"dense": group.dense}
    tasks = [Metric(kind="task", name=task, metric="acc", label="", unit="", better="higher") for task in group.dense.rows]
    for metric in (*group.metrics, *group.columns, *tasks):
        found = page.evaluate(
            """([of, baseline]) => group().experiments.map((one) => {
                const estimate = pairedDifference(group(), of, one, model(baseline), data.quantiles);
                return [one.name, estimate.value, estimate.stderr, estimate.clusters, intervalOf(estimate, data.quantiles)];
            })""",
            [metric_facts(GROUPS[0], metric), baseline],
        )
        for name, value, stderr, clusters, interval in found:
            wanted = apart(metric, known[name], known[baseline])
            assert (value, stderr) == pytest.approx(
                (wanted.value, wanted.stderr), abs=2e-6 * metric.scale
            )  # losses are embedded to six decimals
            assert clusters == wanted.clusters
            assert interval == pytest.approx(wanted.interval, abs=2e-5 * metric.scale)


def test_groups_that_weigh_their_tasks_alike_are_paired_as_in_the_statistics(page):
    ours, theirs = of_parts([1, 1, 0, 1, 0, 0, 0, 0]), of_parts([0, 1, 0, 0, 1, 1, 0, 1])
    metric = Metric(kind="task", name="g", metric="acc", label="", unit="", better="higher")
    value, stderr, interval = page.evaluate(
        """([group, metric, ours, theirs]) => {
            const estimate = pairedDifference(group, metric, ours, theirs, data.quantiles);
            return [estimate.value, estimate.stderr, intervalOf(estimate, data.quantiles)];
        }""",
        [
            {"clusters": {"g": ours.row_clusters["g"]}, "parts": ours.parts},
            {"kind": "task", "name": "g", "metric": "acc"},
            {"windows": {}, "rows": ours.rows},
            {"windows": {}, "rows": theirs.rows},
        ],
    )
    wanted = apart(metric, ours, theirs)
    assert (value, stderr) == pytest.approx((wanted.value, wanted.stderr))
    assert interval == pytest.approx(wanted.interval)


def test_any_row_becomes_the_baseline(page):
    assert page.inner_text(".baseline th").startswith("dense")
    page.click("[data-pin='sparsegpt-50']")
    assert page.inner_text(".baseline th").startswith("sparsegpt-50")
    assert page.get_attribute("[data-pin='sparsegpt-50']", "aria-pressed") == "true"
    assert page.input_value("#baseline") == "sparsegpt-50"
    assert page.locator(".baseline .delta").count() == 0
    row = page.locator(f"{ROWS}:has([data-pin='admm-50'])")
    assert "better" in row.inner_text()  # in words, not by colour alone
    assert page.inner_text("#verdict").startswith("Against sparsegpt-50, in perplexity on wikipedia, on 18,414 tokens")
    page.select_option("#baseline", "dense")
    assert page.inner_text(".baseline th").startswith("dense")


@pytest.mark.parametrize(
    ("line", "command"), [("run", "dvc exp run -S method=wanda -S pattern.sparsity=0.6"), ("apply", "dvc exp apply wanda-60")]
)
def test_a_line_is_copied(page, line, command):
    page.click(f"button[aria-label='Copy the {line} line of wanda-60']")
    page.wait_for_function("document.getElementById('toast').textContent.startsWith('Copied: dvc exp')")
    assert page.evaluate("navigator.clipboard.readText()").startswith(command)


def test_the_metric_changes_what_is_drawn_and_said(page):
    page.locator("#frontier").scroll_into_view_if_needed()
    page.wait_for_selector("#frontier svg")
    page.select_option("#metric", "corpus/wikipedia/mean_kld")
    page.wait_for_function("document.querySelector('#frontier').textContent.includes('Mean KLD on wikipedia [nats], lower is better')")
    assert page.inner_text("#best-metric") == "Mean KLD on wikipedia"
    assert page.locator(".best:visible li").count() == 7
    assert page.locator(".noise:visible > div").count() == 7


def test_a_point_tells_its_numbers(page):
    page.locator("#frontier").scroll_into_view_if_needed()
    page.wait_for_selector("#frontier svg")
    page.locator("#frontier .mark-symbol.role-mark path").last.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.inner_text("#vg-tooltip-element")
    assert all(words in told for words in ("perplexity on wikipedia", "against dense", "18,414 tokens", "69,672,960", "seconds"))


def test_counts_stand_in_the_text_of_the_table(page):
    """Neither a mouse nor a screen is needed to read them."""
    head = page.inner_text("#table thead")
    assert head.count("on 18,414 tokens in 7 documents, the first 18 of 301 windows") == 2
    assert "on 9 tasks, 60 rows each, the first of 3,270" in head
    assert "of 69,672,960 weights" in head
    assert page.locator("#table [title]").count() == 0
    assert ", on 18,414 tokens in 7 documents, the first 18 of 301 windows: " in page.inner_text("#verdict")
    assert page.text_content("#references").startswith("Lines, on 18,414 tokens in 7 documents")


def test_the_table_of_tasks_has_intervals_flips_and_mcnemars_test(page):
    page.click("summary:has-text('Numbers of this plot')")
    page.wait_for_selector("#task-table tbody tr", state="visible")
    cells = [cell.split("\t") for cell in page.inner_text("#task-table tbody").splitlines()]
    task, rows, experiment, baseline, accuracy, _, lost, gained, p_value, _ = cells[0]
    assert (task, rows) == ("boolq", "first 60 of 3,270 rows")
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", baseline) and "[" in accuracy
    details = next(details for details in GROUPS[0].results if experiment.startswith(f"{details.name}:"))
    pairs = list(zip(details.scores.rows["boolq"]["acc"], GROUPS[0].dense.rows["boolq"]["acc"], strict=True))
    assert (int(lost), int(gained)) == (sum(here < there for here, there in pairs), sum(here > there for here, there in pairs))
    assert float(p_value) == pytest.approx(mcnemar(int(lost), int(gained)), rel=0.05)
    for flips in ((0, 0), (3, 3), (1, 9), (40, 900)):
        assert page.evaluate("([lost, gained]) => mcnemar(lost, gained)", flips) == pytest.approx(mcnemar(*flips), rel=1e-6, abs=1e-300)


def test_without_an_interval_a_difference_is_unknown(browser, tmp_path):
    group = GROUPS[1]
    alone = {"wikipedia": [0] * synthetic.WINDOWS}
    members = [replace(details, scores=replace(details.scores, window_clusters=alone)) for details in group.results]
    path = tmp_path / "index.html"
    path.write_text(html([replace(group, results=members, dense=replace(group.dense, window_clusters=alone))], []), encoding="utf8")
    page = opened(browser, path)
    assert "(no interval: 1 document) unknown" in page.inner_text(f"{ROWS}:has([data-pin='wanda-bos'])")
    assert "2 (wanda-bos, sparsegpt-bos) unknown without an interval." in page.inner_text("#verdict")
    assert "Of 1 of 1 pair it is unknown" in page.inner_text(".noise:visible")
    page.context.close()


def test_other_protocols_have_axes_and_tables_of_their_own(page):
    page.select_option("#group", "1")
    assert sorted(names(page)) == ["dense", "sparsegpt-bos", "wanda-bos"]
    assert "bos: 1, there absent" in page.inner_text(".note:visible")
    assert page.locator("#baseline option").count() == 3


def test_experiments_are_chosen_for_the_sections_below(page):
    assert page.locator("[data-choose]:checked").count() == 6
    page.locator("[data-choose='wanda-50']").click()
    assert not page.is_checked("[data-choose='wanda-50']")
    assert page.inner_text("#toast").startswith("At most 6 experiments")
    page.uncheck("[data-choose='admm-40']")
    page.check("[data-choose='wanda-50']")
    assert "wanda-50" in page.inner_text("#configuration thead")
    assert "wanda-50: wanda, unstructured 50%" in page.inner_text("#generations")
    assert "not through the chat template: the template wants" in page.inner_text("#generations")
    page.click("summary:has-text('Numbers of this plot')")
    page.wait_for_selector("#task-table tbody tr", state="visible")
    assert "wanda-50: wanda, unstructured 50%" in page.inner_text("#task-table")


def test_degeneration_stands_beside_the_generations(page):
    rows = [row.split("\t") for row in page.inner_text("#degeneration-table tbody").splitlines()]
    assert len(rows) == 6 * 2 * 4  # experiments, forms, measures
    found = next(row for row in rows if row[:2] == ["raw", "share of empty answers"] and row[2].startswith("admm-50:"))
    low, high = accuracy_interval([0.0] * 3, range(3))
    assert found[3:] == ["3", "0.000", f"0.000 [{low:.3f}, {high:.3f}]", found[6]]
    assert re.fullmatch(r"\+0\.000 \[−[01]\.\d{3}, \+[01]\.\d{3}\]", found[6])
    assert any(row[1] == "distinct-1" and row[6].endswith(" (no interval)") for row in rows)
    page.select_option("#group", "1")
    assert page.locator("#degeneration-table tbody tr").count() == 8 * page.locator("[data-choose]:checked").count()


def test_drift_by_style_is_shown_where_styles_were_asked(browser, tmp_path):
    facts = {"style": "chat", "metric": "acc", "better": "higher", "raw": -0.25, "styled": -0.75, "drift": -0.5, "stderr": 0.25}
    rows = [
        {**facts, "task": "boolq", "count": 20, "counted": "rows", "low": -0.9, "high": -0.1},
        {**facts, "task": None, "count": 1, "counted": "tasks", "low": None, "high": None},
    ]
    first, second = GROUPS[1].results
    path = tmp_path / "index.html"
    path.write_text(html([replace(GROUPS[1], results=[replace(first, sensitivity=rows), second])], []), encoding="utf8")
    page = opened(browser, path)
    for name in ("wanda-bos", "sparsegpt-bos"):
        page.check(f"[data-choose='{name}']")
    found = [row.split("\t") for row in page.inner_text("#styles-table tbody").splitlines()]
    title = "wanda-bos: wanda, unstructured 50%"
    assert found == [
        ["chat", "boolq", title, "20 rows", "−0.250", "−0.750", "−0.500 [−0.900, −0.100]", "worse"],
        ["chat", "mean, every task alike", title, "1 task", "−0.250", "−0.750", "−0.500 (no interval)", "unknown"],
    ]
    page.uncheck("[data-choose='wanda-bos']")
    assert page.is_hidden("#styles")
    page.context.close()


def test_sizes_and_speed_are_shown_and_no_speed_up_is_claimed(page):
    rows = [row.split("\t") for row in page.inner_text("#size-table tbody").splitlines()]
    found = next(row for row in rows if row[0].startswith("admm-50:"))
    assert found[1:6] == ["210", "139.3 MB", "8.7 MB (6.3%)", "8.8 MB (6.4%)", "78.4 MB (56.3%)"]
    assert found[6:] == [f"{pace} (240 tokens, 3 prompts, AMD EPYC, 2 threads, at most 0.75 GiB)" for pace in ("12.50", "12.00")]
    assert "no speed-up was measured or is claimed" in " ".join(page.inner_text("#size").split())


def test_only_parameters_that_differ_are_shown_until_all_are_asked(page):
    few = page.locator("#configuration tbody tr").count()
    assert "calibration.windows" not in page.inner_text("#configuration")
    page.uncheck("#differing")
    assert page.locator("#configuration tbody tr").count() > few
    assert "calibration.windows" in page.inner_text("#configuration")


def test_two_recipes_are_told_apart_in_text(page):
    page.select_option("#recipe-from", "wanda-50")
    page.select_option("#recipe-to", "admm-2-4")
    lines = page.inner_text("#recipe").splitlines()
    assert {"- method.name: wanda", "+ method.name: admm_short", "- pattern.sparsity: 0.5", "+ pattern.kept: 2"} <= set(lines)
    page.click("#recipe-copy")
    page.wait_for_function("document.getElementById('toast').textContent !== ''")
    assert page.evaluate("navigator.clipboard.readText()").splitlines() == lines
    page.select_option("#recipe-to", "wanda-50")
    assert page.inner_text("#recipe").strip() == "The recipes are equal."


def test_blocks_are_shown_of_any_experiment(page):
    page.select_option("#inspected", "wanda-60")
    assert page.inner_text("#matrices-about").startswith("wanda-60: wanda, unstructured 60%: 69,672,960 weights in 210 matrices, each")
    page.locator("#relative_error").scroll_into_view_if_needed()
    page.wait_for_selector("#relative_error svg .mark-rect path")
    about = "each calibrated on 16,384 tokens. Errors are measured on about 256 of these, and on as many of the windows held out."
    assert about in page.inner_text("#matrices-about")
    page.locator("#relative_error_held_out").scroll_into_view_if_needed()
    page.wait_for_selector("#relative_error_held_out svg .mark-rect path")
    assert page.is_hidden("#sparsity")  # one value in all, which is said
    page.click("summary:has-text('Numbers of these plots')")
    assert page.locator("#matrix-table tbody tr").count() == 210


def test_the_cost_is_shown_of_one_pattern_or_of_all(page):
    page.locator("#seconds").scroll_into_view_if_needed()
    page.wait_for_selector("#seconds svg")
    page.select_option("#cell", "2:4")
    page.wait_for_function("document.querySelectorAll('#seconds .mark-symbol.role-mark path').length === 3")
    assert page.inner_text("#devices") == "3 experiments, one run each, on AMD EPYC, 2 threads."


def test_all_can_be_done_by_keyboard(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table"
    page.focus("[data-sort=name]")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.sort") == "name"
    assert names(page)[1] == "admm-2-4"
    page.focus("[data-pin='admm-40']")
    page.keyboard.press("Space")
    assert page.inner_text(".baseline th").startswith("admm-40")
    assert page.evaluate("document.activeElement.dataset.pin") == "admm-40"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.focus("#table tbody button[aria-label^='Copy the run']")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('toast').textContent.startsWith('Copied')")


def test_every_control_has_a_name_and_every_table_a_caption(page):
    nameless = """() => [...document.querySelectorAll('button, select, input, [role=region], [role=img]')].filter((one) =>
        !one.textContent.trim() && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby') && !(one.labels || []).length
    ).map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.eval_on_selector_all("table", "tables => tables.filter((table) => !table.caption).length") == 0
    assert page.eval_on_selector_all("h1, h2, h3", "all => all.filter((one) => !one.textContent.trim()).length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(browser, file, scheme):
    page = opened(browser, file, color_scheme=scheme)
    colours = page.evaluate(
        """() => ['ink', 'quiet', 'better', 'worse', 'noise', 'accent'].map((name) => {
            const probe = document.body.appendChild(Object.assign(document.createElement('i'), { style: `color: var(--${name})` }));
            return [getComputedStyle(probe).color, getComputedStyle(document.body).backgroundColor];
        })"""
    )
    assert all(contrast(*map(rgb, pair)) >= 4.5 for pair in colours)
    assert (rgb(colours[0][1])[0] > 128) == (scheme == "light")
    page.context.close()


def rgb(colour: str) -> list[int]:
    return [int(number) for number in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def contrast(first: list[int], second: list[int]) -> float:
    """The ratio of luminances by WCAG 2."""
    linear = [[c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (first, second)]
    bright, dim = sorted((0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_plots_follow_the_scheme(page):
    page.locator("#frontier").scroll_into_view_if_needed()
    page.wait_for_selector("#frontier svg")
    light = page.eval_on_selector("#frontier .mark-symbol path", "mark => mark.getAttribute('fill')")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("(light) => document.querySelector('#frontier .mark-symbol path')?.getAttribute('fill') !== light", arg=light)


def test_a_narrow_screen_scrolls_in_one_direction(browser, file):
    page = opened(browser, file, viewport=NARROW)
    for part in ("#frontier", "#tasks", "#seconds", "#relative_error"):
        page.locator(part).scroll_into_view_if_needed()
        page.wait_for_selector(f"{part} svg")
        assert page.eval_on_selector(f"{part} svg", "drawing => drawing.getBoundingClientRect().width") <= 390
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.complaints == []
    page.context.close()


@pytest.mark.parametrize(("rows", "corpora"), [(60, ("wikipedia",)), (1000, ("wikipedia", "wikipedia_long", "chat"))])
def test_two_hundred_experiments_are_small_and_open_soon(browser, tmp_path, rows, corpora):
    dense = synthetic.dense_scores(rows=rows, corpora=corpora)
    methods = list(synthetic.METHODS)
    results = [
        synthetic.details(f"run-{number}", methods[number % 6], "unstructured", dense, sparsity=0.4 + number % 40 / 100, seed=number)
        for number in range(200)
    ]
    path = tmp_path / "index.html"
    path.write_text(html([replace(GROUPS[0], results=results, dense=of_dense(dense))], []), encoding="utf8")
    assert path.stat().st_size < BYTES
    seconds = []
    for _ in range(3):  # the fastest counts: other work of the machine only slows it down
        page = opened(browser, path)
        page.wait_for_selector("#frontier svg", state="attached")
        timing = json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
        seconds.append(timing["loadEventEnd"] / 1000)
        assert page.locator(f"{ROWS}.measured").count() == 200
        assert page.complaints == []
        page.context.close()
    assert min(seconds) < SECONDS


def test_repeats_by_seed_are_told_apart_and_their_spread_is_said(browser, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(html([synthetic.repeated_group(), GROUPS[1]], []), encoding="utf8")
    page = opened(browser, path)
    page.click("[data-sort=seed]")
    page.click("[data-sort=seed]")
    assert page.inner_text(f"{ROWS}:nth-child(2) td:nth-child(6)") == "2"
    assert page.locator(".repeats:visible tbody tr").count() == 3
    assert "wanda, unstructured 50%, seed 1" in page.inner_text("#baseline")
    page.select_option("#metric", "mean/tasks/accuracy")
    assert page.inner_text("#repeats h3:visible") == "Which differences exceed the spread between seeds, in mean accuracy"
    assert "2 of 3 pairs: too few seeds" in page.inner_text(".seeds:visible")
    page.select_option("#group", "1")
    assert page.locator(".repeats:visible").count() == page.locator(".seeds:visible").count() == 0
    assert "Every setting has one seed" in page.inner_text("#repeats")
    assert page.locator("[data-sort=seed]").count() == 0
    assert page.complaints == []
    page.context.close()


def test_measurements_without_plots_are_columns_that_can_be_shown(page):
    heading = "[data-sort='corpus/wikipedia/same_top_p']"
    assert page.locator(heading).count() == 0
    page.click("summary:has-text('More columns')")
    page.check("[data-column='corpus/wikipedia/same_top_p']")
    page.check("[data-column='corpus/wikipedia/perplexity_ln_ratio']")
    page.click(heading)
    assert page.get_attribute(f"th:has({heading})", "aria-sort") == "descending"
    assert "100, by definition" in page.inner_text(f"{ROWS}:has([data-pin=dense])")
    assert "0, by definition" in page.inner_text(f"{ROWS}:has([data-pin=dense])")
    page.uncheck("[data-column='corpus/wikipedia/same_top_p']")
    assert page.locator(heading).count() == 0


@pytest.mark.parametrize(("name", "settings"), [("wide", {}), ("narrow", {"viewport": NARROW}), ("dark", {"color_scheme": "dark"})])
def test_a_picture_of_the_page_and_of_each_plot_is_not_blank(browser, file, tmp_path, name, settings):
    page = opened(browser, file, **settings)
    for part in ("#frontier", "#tasks", "#seconds", "#relative_error", "#relative_error_held_out"):
        page.locator(part).scroll_into_view_if_needed()
        page.wait_for_selector(f"{part} svg .mark-symbol path, {part} svg .mark-rect path")
        picture = tmp_path / f"{name}{part}.png"
        page.locator(part).screenshot(path=picture)
        assert shades(picture) > 50, picture
    page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
    assert shades(tmp_path / f"{name}.png") > 50
    page.goto("about:blank")
    page.screenshot(path=tmp_path / "blank.png")
    assert shades(tmp_path / "blank.png") < 5
    page.context.close()


def shades(picture: Path) -> int:
    """How many different bytes the image data of a PNG have."""
    content, position, data = picture.read_bytes(), 8, b""
    while position < len(content):
        length = int.from_bytes(content[position : position + 4])
        if content[position + 4 : position + 8] == b"IDAT":
            data += content[position + 8 : position + 8 + length]
        position += 12 + length  # length, kind, data, checksum
    return len(set(zlib.decompress(data)))
