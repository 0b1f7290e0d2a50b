"""The report in a real browser: no error, no request, the slider, the filters and the keyboard; screenshots on demand.

Debian's chromium, driven by playwright: ``apt-get install chromium`` and ``pip install playwright`` (no browser of its
own). ``SCREENSHOTS=docs/images`` keeps the pictures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowdeep.calibration import evaluate
from shallowdeep.policies import Confidence, Ensemble
from shallowdeep.report.compact import threshold_of
from shallowdeep.report.facts import Facts, facts_of
from shallowdeep.report.numbers import by_class
from shallowdeep.report.words import percent
from shallowdeep.report_verbs import report_verb
from shallowdeep.spelling import from_json, to_json
from shallowdeep.types import Trace
from shallowdeep.verbs import DataChoice
from test_report import HOSTILE, a_bench, a_trace, write_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

RESULTS = Path(__file__).resolve().parents[1] / "results" / "demo-cifar10"
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
WIDE, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def cifar_report(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The page of the committed CIFAR-10 run, with the real images where they are at hand and noise elsewhere."""
    folder = tmp_path_factory.mktemp("report")
    try:
        images = DataChoice(source=str(request.getfixturevalue("cifar10")), split="test")
    except pytest.skip.Exception:
        labels = Trace.load(RESULTS / "trace.safetensors").labels_N.numpy()
        noise = np.random.default_rng(0).integers(0, 255, (len(labels), 8, 8, 3), np.uint8)
        np.savez(folder / "noise.npz", images=noise, labels=labels)
        images = DataChoice(source=str(folder / "noise.npz"))
    bench = [RESULTS] if (RESULTS / "bench.json").is_file() else []
    out = folder / "report.html"
    title = "ResNet-56 on CIFAR-10"
    report_verb([RESULTS], out, policies=[RESULTS], benches=bench, images=images, title=title)
    return out


def opened(browser: Any, page: Path, size: tuple[int, int]) -> tuple[Any, list[str]]:
    """The page once its charts are drawn, and what went wrong: console, errors, requests beyond the file."""
    tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
    wrong: list[str] = []
    tab.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    inside = (page.as_uri(), "blob:null/")
    tab.on("request", lambda asked: None if asked.url.startswith(inside) else wrong.append(asked.url))
    tab.goto(page.as_uri())
    tab.evaluate("report.ready")
    return tab, wrong


def shoot(tab: Any, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        tab.wait_for_timeout(400)
        tab.screenshot(path=str(Path(folder) / f"{name}.jpg"), type="jpeg", quality=82)


def wait_until(tab: Any, condition: str) -> None:
    """Playwright's own way looks again by ``eval``, which the page's security policy forbids."""
    for _ in range(500):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(20)
    pytest.fail(f"not after ten seconds: {condition}")


def figure(tab: Any, name: str) -> str:
    return str(tab.text_content(f"[data-figure={name}]"))


def cut_off(tab: Any) -> list[str]:
    """Words of charts that lie beyond their picture's edge."""
    found: list[str] = tab.evaluate("""() => [...document.querySelectorAll(".chart svg")].flatMap((svg) => {
        const all = svg.getBoundingClientRect(), words = [...svg.querySelectorAll("text")].filter((one) =>
            one.getAttribute("opacity") !== "0" && one.getBoundingClientRect().width);
        return words.filter((one) => { const its = one.getBoundingClientRect();
            return its.left < all.left - 2 || its.right > all.right + 2; }).map((one) => one.textContent);
    })""")
    return found


@pytest.mark.parametrize(("size", "name"), [(WIDE, "desktop"), (PHONE, "phone")])
def test_the_real_report_opens_quietly_and_fits(
    browser: Any, cifar_report: Path, size: tuple[int, int], name: str
) -> None:
    tab, wrong = opened(browser, cifar_report, size)
    assert tab.evaluate("document.documentElement.scrollWidth") == size[0]
    charts = tab.locator(".chart svg")
    assert charts.count() == tab.locator(".chart").count() >= 11
    widest = tab.evaluate(
        "Math.max(...[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right))"
    )
    assert widest <= size[0]
    spoken = tab.evaluate("[...document.querySelectorAll('.chart')].map(c => [c.getAttribute('role'), c.ariaLabel])")
    assert len({label for _, label in spoken}) == len(spoken)
    assert {role for role, _ in spoken} == {"img"}
    assert not [label for _, label in spoken if "Vega" in label]
    assert not cut_off(tab)
    shoot(tab, f"report-{name}")
    tab.evaluate("document.getElementById('explorer').scrollIntoView()")
    shoot(tab, f"report-{name}-gallery")
    tab.select_option("#by-kind", "destructive")
    tab.click("#gallery button")
    shoot(tab, f"report-{name}-sample")
    tab.keyboard.press("Escape")
    gap = "document.getElementById('flow').getBoundingClientRect().top - document.getElementById('bar').offsetHeight"
    tab.evaluate("document.getElementById('flow').scrollIntoView()")
    assert abs(tab.evaluate(gap)) < 2
    tab.focus("#threshold")
    for _ in range(40):
        tab.keyboard.press("ArrowLeft")
    tab.wait_for_selector("body.moved")
    tab.evaluate("document.getElementById('tradeoff').scrollIntoView()")
    shoot(tab, f"report-{name}-slider")
    assert tab.is_visible("#rule")
    assert "by hand on these very rows" in tab.text_content(".rows")
    tab.emulate_media(media="print")
    tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    tab.set_viewport_size({"width": 700, "height": 900})
    cut = """[...document.querySelectorAll(".scroll")].filter(
        (one) => one.scrollWidth > one.clientWidth || getComputedStyle(one).maxHeight !== "none").length"""
    assert tab.evaluate(cut) == 0
    assert not wrong
    tab.close()


def test_slider_filter_and_keyboard(browser: Any, cifar_report: Path) -> None:
    tab, wrong = opened(browser, cifar_report, WIDE)
    policy = from_json(json.loads((RESULTS / "policy.json").read_text()))
    facts = facts_of(Trace.load(RESULTS / "trace.safetensors"), policy)
    before = {name: figure(tab, name) for name in ("accuracy", "drop", "cost", "early")}
    lead, flow = tab.text_content(".lead"), tab.inner_html("[data-live=flow] svg")

    tab.focus("#threshold")
    for _ in range(40):
        tab.keyboard.press("ArrowLeft")
    wait_until(tab, f"document.querySelector('[data-figure=cost]').textContent !== {before['cost']!r}")
    level = tab.evaluate("report.levelAt(Number(document.getElementById('threshold').value))")
    found = evaluate(Confidence(threshold=threshold_of(level)), facts.trace)
    # In the page's float64 as in Python: not a row differs.
    ours = tab.evaluate(
        """(level) => {
            const trace = report.traces[0], { cost, accuracy, left } = report.figures(trace, report.walk(trace, level));
            return [cost, accuracy, [...left]];
        }""",
        level,
    )
    assert ours[0] == pytest.approx(found.mean_cost, abs=1e-9)
    assert ours[1] == pytest.approx(found.accuracy_early_exit, abs=1e-9)
    assert ours[2] == pytest.approx((found.share_E * found.samples).tolist())
    assert figure(tab, "accuracy") == f"{100 * found.accuracy_early_exit:.1f}\u202f%"
    assert f"{round(100 * (1 - found.mean_cost))}\u202f%" in tab.text_content(".lead")
    assert "plain confidence rule" in tab.text_content("#rule")
    assert tab.inner_html("[data-live=flow] svg") != flow
    assert_tables_follow(tab, found.accuracy_early_exit, outcome_errors(facts, threshold_of(level)))
    tab.keyboard.press("Home")
    wait_until(tab, "document.querySelector('[data-figure=early]').textContent.startsWith('100')")
    lowest = "report.views.find((one) => one.live === 'now').view"
    below = tab.evaluate(f"[{lowest}.data('now')[0].accuracy, {lowest}.scale('y').domain()[0]]")
    assert below[0] == below[1] > 0.7, "the triangle stays at the edge of the picture"
    tab.click("#reset")

    tab.select_option("#by-kind", "confused")
    assert 250 <= int(tab.text_content("#count").split(" of ")[0]) < 260, "a twentieth of all rows, not of those shown"
    tab.select_option("#by-kind", "destructive")
    tab.select_option("#by-answer", "wrong")
    count = int(tab.text_content("#count").split(" of ")[0])
    stopped = tab.evaluate("report.now().right.length")
    assert 0 < count < stopped
    assert "✗" in tab.text_content("#gallery button")
    tab.focus("#gallery button")
    at = "[...document.getElementById('gallery').children].indexOf(document.activeElement)"
    for key, place in {
        "ArrowRight": 1,
        "ArrowLeft": 0,
        "End": count - 1,
        "Home": 0,
        "ArrowDown": None,
        "Enter": None,
    }.items():
        tab.keyboard.press(key)
        assert place is None or tab.evaluate(at) == place
    assert tab.evaluate("document.getElementById('sample').open")
    assert tab.locator("#depth li").count() == 10
    assert tab.locator("#depth li.here").count() == 1
    title = tab.text_content("#sample-title")
    tab.keyboard.press("ArrowRight")
    assert tab.text_content("#sample-title") != title or count == 1
    row = tab.text_content("#about dd")
    tab.focus("#threshold-here")
    tab.keyboard.press("End")
    wait_until(tab, "document.getElementById('sample-title').textContent.includes('the full network')")
    tab.keyboard.press("ArrowLeft")
    assert tab.text_content("#about dd") == row, "the slider moves the threshold, not the sample"
    assert tab.evaluate("document.getElementById('threshold').value") == "399"
    tab.click("#reset-here")
    tab.wait_for_selector("body:not(.moved)")
    tab.keyboard.press("ArrowRight")  # the slider has the focus back
    tab.wait_for_selector("body.moved")
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.className").startswith("thumb")

    tab.click("#reset")
    tab.wait_for_selector("body:not(.moved)")
    assert {name: figure(tab, name) for name in before} == before
    assert tab.text_content(".lead") == lead
    assert not wrong
    tab.close()


def outcome_errors(facts: Facts, threshold: float) -> list[str]:
    """Per class, in the order of labels, how many of its rows one threshold gets wrong."""
    found = facts_of(facts.trace, Confidence(threshold=threshold))
    return [percent(row["policy_errors"]) for row in by_class(found)]


def assert_tables_follow(tab: Any, accuracy: float, errors: list[str]) -> None:
    """The last columns of the tables of risks and of classes speak of the threshold that the slider shows."""
    last = (
        "[...document.querySelectorAll('table[data-table={}] tbody tr')].map((row) => row.lastElementChild.textContent)"
    )
    assert tab.evaluate(last.format("risk"))[-1] == percent(1 - accuracy, 2)
    assert tab.evaluate(last.format("class")) == errors


def test_an_answer_of_several_exits_has_a_row_of_its_own(browser: Any, tmp_path: Path) -> None:
    trace = a_trace(samples=80)
    trace.save(tmp_path / "trace.safetensors")
    ensemble = Ensemble(weight_EE=((), (), (), (1.0, 1.0, 1.0, 0.0)))
    policy = Confidence(threshold=0.999, ensemble=ensemble)
    (tmp_path / "policy.json").write_text(json.dumps(to_json(policy)))
    out, images = tmp_path / "report.html", DataChoice(source=str(write_rows(tmp_path, trace)))
    report_verb([tmp_path], out, policies=[tmp_path], images=images)
    tab, wrong = opened(browser, out, WIDE)
    facts = facts_of(trace, policy, class_names=(*HOSTILE, "dog"))
    differ = (facts.outcome.labels_N != facts.said_EN[-1]) & (facts.outcome.exit_N == 3)
    n = int(differ.nonzero()[0])
    tab.evaluate(f"document.querySelectorAll('#gallery button')[{n}].click()")
    answered = facts.class_names[int(facts.outcome.labels_N[n])]
    assert f"answered “{answered}”" in tab.text_content("#sample-title")
    assert tab.locator("#depth li").count() == 5
    together = tab.locator("#depth li.here").nth(1)
    assert "together" in together.locator(".exit").text_content()
    assert together.locator(".who").text_content() == answered
    assert together.locator(".share").text_content() == percent(float(facts.outcome.confidence_N[n]))
    tab.focus("#threshold-here")
    tab.keyboard.press("End")
    tab.wait_for_selector("body.moved")
    wait_until(tab, "document.querySelectorAll('#depth li').length === 4")
    assert not wrong
    tab.close()


def test_two_thousand_thumbnails_stay_fluid(browser: Any, cifar_report: Path) -> None:
    tab, wrong = opened(browser, cifar_report, WIDE)
    assert tab.text_content("#count").startswith("2,000 of 2,000")
    tab.evaluate("document.getElementById('explorer').scrollIntoView()")
    tab.focus("#gallery button")
    tab.keyboard.press("End")
    assert tab.locator("#gallery button").count() == 2000
    assert tab.locator("#gallery button:not([aria-label*='Row'])").count() == 0
    slow = tab.evaluate(
        """() => new Promise((done) => {
            const gallery = document.getElementById("gallery"), waits = [];
            let last = performance.now(), n = 0;
            const next = (now) => {
                waits.push(now - last); last = now; gallery.scrollTop = gallery.scrollHeight * (n % 40) / 40;
                if (++n < 60) requestAnimationFrame(next); else done(waits.sort((a, b) => a - b)[45]);
            };
            requestAnimationFrame(next);
        })"""
    )
    assert slow < 150, "three frames of four while scrolling through all, without a GPU and on a busy machine"
    assert not wrong
    tab.close()


@pytest.mark.parametrize("exits", [1, 4])
def test_few_rows_and_endless_names_fit(browser: Any, tmp_path: Path, exits: int) -> None:
    trace = a_trace(samples=60, exits=exits)
    trace.save(tmp_path / "trace.safetensors")
    out, images = tmp_path / "report.html", DataChoice(source=str(write_rows(tmp_path, trace)))
    names = ["n" * 300, "word " * 60, "c", "d", "e"]
    report_verb([tmp_path], out, images=images, class_names=names, title="T" * 300)
    tab, wrong = opened(browser, out, PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert tab.evaluate("document.documentElement.scrollHeight") < 20_000
    assert not cut_off(tab)
    assert not wrong
    tab.close()


@pytest.mark.parametrize("exits", [2, 3])
def test_hostile_names_stay_text(browser: Any, tmp_path: Path, exits: int) -> None:
    names = ("first", *HOSTILE)[:exits]
    trace = a_trace(samples=150, exits=exits, exit_names=names, full_exit=exits - 1 if exits == 2 else 1)
    trace.logits_ENC[0, :5] = torch.nan
    trace.save(tmp_path / "trace.safetensors")
    policy, bench = tmp_path / "policy.json", tmp_path / "bench.json"
    policy.write_text(json.dumps(to_json(Confidence(threshold=0.8))))
    bench.write_text(json.dumps(a_bench(*names)))
    out = tmp_path / "report.html"
    paths = {"policies": [policy], "benches": [bench], "names": [HOSTILE[0]], "title": HOSTILE[1]}
    report_verb([tmp_path], out, images=DataChoice(source=str(write_rows(tmp_path, trace))), **paths)
    tab, wrong = opened(browser, out, PHONE)
    assert tab.text_content("h1") == HOSTILE[1]
    assert tab.locator("h1 img").count() == 0
    assert HOSTILE[0] in tab.locator("#by-class option").all_text_contents()
    tab.focus("#threshold")
    tab.keyboard.press("End")
    tab.click("#gallery button")
    assert tab.locator("#depth li").count() == exits
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert not wrong
    tab.close()
