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
from shallowdeep.policies import Confidence
from shallowdeep.report.compact import threshold_of
from shallowdeep.report.facts import facts_of
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


def figure(tab: Any, name: str) -> str:
    return str(tab.text_content(f"[data-figure={name}]"))


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
    shoot(tab, f"report-{name}")
    for part in ("tradeoff", "flow", "overthinking", "explorer"):
        tab.evaluate(f"document.getElementById('{part}').scrollIntoView()")
        shoot(tab, f"report-{name}-{part}")
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
    tab.wait_for_function(
        "before => document.querySelector('[data-figure=cost]').textContent !== before", arg=before["cost"]
    )
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
    shoot(tab, "report-desktop-sample")
    tab.keyboard.press("ArrowRight")
    assert tab.text_content("#sample-title") != title or count == 1
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.className").startswith("thumb")

    tab.click("#reset")
    tab.wait_for_function(
        "before => document.querySelector('[data-figure=cost]').textContent === before", arg=before["cost"]
    )
    assert {name: figure(tab, name) for name in before} == before
    assert tab.text_content(".lead") == lead
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


@pytest.mark.parametrize("exits", [2, 3])
def test_hostile_names_stay_text(browser: Any, tmp_path: Path, exits: int) -> None:
    names = ("first", *HOSTILE)[:exits]
    trace = a_trace(samples=150, exits=exits, exit_names=names, full_exit=exits - 1 if exits == 2 else 1)
    trace.logits_ENC[0, :5] = torch.nan
    trace.save(tmp_path / "trace.safetensors")
    policy, bench = tmp_path / "policy.json", tmp_path / "bench.json"
    policy.write_text(json.dumps(to_json(Confidence(threshold=0.7))))
    bench.write_text(json.dumps(a_bench()))
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
