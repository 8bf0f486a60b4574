"""The status page: what it says, that hostile names stay text, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from edgesolve.device import http as web
from edgesolve.device import page, reasons

TESTS = Path(__file__).resolve().parent
HOSTILE = '<script>document.title="owned"</script>"\'><img src=x onerror=alert(1)>&amp;'


def _fakes():
    spec = spec_from_file_location("serving_fakes", TESTS / "serving_fakes.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fakes = _fakes()


class Reader(HTMLParser):
    """Elements, attributes and text of a page; checks that what is opened is closed."""

    VOID = ("meta", "input", "link", "br", "rect", "path")
    OPTIONAL = ("th", "tr", "td")

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text, self.style = [], [], "", ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID and tag != "th":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag != "th":
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data + " "

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def buttons(self):
        return [button["value"] for button in self.all("button")]


def read(status, may_command=True, message=""):
    return Reader(page.render(status, may_command=may_command, message=message))


@pytest.mark.parametrize("state", fakes.STATES)
def test_no_script_and_nothing_from_elsewhere(state):
    found = read(fakes.STATES[state]())
    assert found.style == page.STYLE
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in found.elements}
    for tag, attributes in found.elements:
        assert "style" not in attributes, tag  # the policy forbids it
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert attributes.get(name, "/").startswith(("/", "data:image/svg+xml"))


@pytest.mark.parametrize("state", fakes.STATES)
def test_buttons_only_for_who_may_command(state):
    status = fakes.STATES[state]()
    assert not read(status, False).buttons and not read(status, False).all("form")
    expected = {
        "fresh": ["recalibrate", "freeze"],
        "proposal": ["approve", "reject", "rollback", "recalibrate", "freeze"],
        "probation": ["rollback", "recalibrate", "freeze"],
    }
    assert read(status).buttons == expected[state]
    assert set(read(status).buttons) <= set(web.COMMANDS)
    assert "unfreeze" in read(status | {"frozen": True}).buttons


def test_the_page_waits_while_a_proposal_waits():
    def refreshes(status):
        return any(meta.get("http-equiv") == "refresh" for meta in read(status).all("meta"))

    assert refreshes(fakes.fresh()) and refreshes(fakes.probation())
    assert not refreshes(fakes.proposal())


def test_what_is_not_known_is_not_zero():
    text = read(fakes.fresh()).text
    assert "n/a, needs 64" in text and "n/a, needs 662" in text
    assert text.count("not measured") == 2 and "Not measured" in text
    nothing = {key: None for key in fakes.fresh()}
    text = read(nothing).text
    assert not re.search(r"\b0\b", re.sub(r"every 10 s", "", text))
    assert "nan" not in read(fakes.fresh() | {"soc_temp_c": float("nan")}).text
    assert read({}).text


def test_a_proposal_shows_what_it_changes():
    found = read(fakes.proposal())
    for part in ("12 %", "71 → 93 %", "98 → 97 %", "8.1e-07", "14.8 % → 9.3 %", "−5.5", "+3.9"):
        assert part in found.text, part
    bars = [r for r in found.all("rect") if r["class"] in ("fill gain", "fill loss")]
    change = np.array(fakes.AFTER) - fakes.BEFORE
    change = np.sort(change)[::-1]
    drawn = [float(r["width"]) * (1 if "gain" in r["class"] else -1) for r in bars]
    np.testing.assert_allclose(drawn, 50 * change / abs(change).max(), atol=0.01)
    for bar in bars:
        edge = float(bar["x"]) + (0 if "gain" in bar["class"] else float(bar["width"]))
        assert edge == pytest.approx(50, abs=0.02)


def test_many_classes_show_the_largest_changes():
    status = fakes.proposal()
    status["candidate"]["classes"] = [
        {"class": f"c{i}", "before": 0.01, "after": 0.01 + (i - 50) / 1e4} for i in range(100)
    ]
    text = read(status).text
    assert "c0 " in text and "c99 " in text and "c52 " not in text and "more" not in text
    assert re.search(r"and \d\d classes that change less", text)
    for item in status["candidate"]["classes"]:
        item["after"] = None
    assert "No class gains or loses answers." in read(status).text


def test_drift_is_drawn_against_its_threshold():
    for score, alarm in ((0.41, False), (2.74, True)):
        drift = fakes.proposal()["drift"] | {"score": score, "alarm": alarm}
        found = read(fakes.fresh() | {"drift": drift})
        mark = next(float(r["x"]) for r in found.all("rect") if r["class"] == "mark")
        fill = next(float(r["width"]) for r in found.all("rect") if "fill" in r["class"])
        assert fill / mark == pytest.approx(score, rel=0.01) and fill <= 100
    assert "one window in 1\u2009000 would alarm" in found.text
    assert "The sensor or its light has changed" in found.text


def test_probation_says_what_is_left():
    text = read(fakes.probation()).text
    assert "10 min and 120 answers" in text and "On probation" in text
    assert "Rolled back" in text and reasons.SENTENCES["probation_latency"] in text


def hostile(value):
    """Every text in a status, keys of `skipped` too, replaced."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("state", fakes.STATES)
def test_hostile_names_stay_text(state):
    status = hostile(fakes.STATES[state]())
    status |= {"skipped": {HOSTILE: 3}, "throttled": [HOSTILE]}
    status["adapting"] = {"step": HOSTILE, "seconds": 1.0, "paused": False}
    plain = read(fakes.STATES[state]())
    found = read(status, message=HOSTILE)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in plain.elements} | {"b"}
    assert not any(name.startswith("on") for _, given in found.elements for name in given)
    assert HOSTILE in found.text


def test_values_of_any_type_never_break_the_page():
    shapes = ("text", "", 0, -1, 1e300, float("inf"), True, [], {}, None)
    status = fakes.proposal() | {"probation": fakes.probation()["probation"]}
    simple = [k for k, v in status.items() if not isinstance(v, (dict, list))]
    for value in shapes:
        read(status | dict.fromkeys(simple, value) | {"candidate": None, "drift": None})
        for key in ("candidate", "drift", "probation", "latency_ms", "window"):
            given = status[key] or {}
            parts = {k: value for k, v in given.items() if not isinstance(v, (dict, list))}
            read(status | {key: given | parts})
        entry = dict.fromkeys(fakes.entry(0, "kept", "busy", 1), value)
        read(
            status
            | {"history": [entry], "generations": [dict.fromkeys(status["generations"][0], value)]}
        )


def test_every_reason_of_the_contract_has_its_sentence():
    words = """gate_passed dry_run awaiting_approval too_few_samples too_few_classes bad_input source_lost no_drift
    unknown_content mode_off mode_observe frozen busy min_interval daily_limit cooldown too_hot throttled under_voltage
    low_battery low_memory low_disk write_budget deadline_missed out_of_time memory_bound not_finite gap_too_large
    ill_conditioned cancelled solver_crashed anchor_agreement anchor_logits heldout_worse confidence_collapse
    marginal_shift move_too_large parity_failed write_failed checksum_failed probation_errors probation_latency
    probation_confidence probation_drift crash_loop operator vendor_update corrupt_state""".split()
    assert set(words) <= set(reasons.SENTENCES)
    for text in reasons.SENTENCES.values():
        assert text.endswith(".") and text[0].isupper() and "_" not in text
    assert reasons.sentence("brand_new") == "Brand new" and reasons.sentence(None) == ""


# -- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("chromium")


def chromium(profile, url, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", *options, url]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()


def luminance(rgb):
    """Relative luminance of sRGB pixels (..., 3) in 0..255 (WCAG 2)."""
    c = rgb[..., :3] / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return c @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_schemes_under_its_own_policy(tmp_path, profile, scheme):
    """From a live server, logged in: a style that the Content-Security-Policy refused would be seen here."""
    Image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "shot.png"
    with web.serve("127.0.0.1:0", fakes.FakeControl(fakes.proposal()), token="abc") as server:
        chromium(
            profile,
            f"{server.url}/login?token=abc",
            f"--blink-settings=preferredColorScheme={dict(dark=0, light=1)[scheme]}",
            "--window-size=800,1200",
            f"--screenshot={shot}",
        )
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    seen = luminance(pixels)
    np.testing.assert_array_equal(pixels[2, 2], colours(scheme)["page"])
    for part, least in ((seen[20:60, 10:200], 12.0), (seen[60:90, 10:300], 4.5)):
        assert (part.max() + 0.05) / (part.min() + 0.05) > least
    # Logged in by the cookie, the page has its main button: a wide area of the accent.
    assert (pixels == colours(scheme)["accent"]).all(axis=2).sum() > 2000


def colours(scheme):
    """The style's colours by name, (3,) in 0..255."""
    light, dark = page.STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    found = re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark)
    return {k: np.array([int(v[i : i + 2], 16) for i in (1, 3, 5)], float) for k, v in found}


def contrast_of(scheme, ink, paper):
    known = colours(scheme)
    low, high = sorted((luminance(known[ink]), luminance(known[paper])))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_pair_of_colours_is_readable(scheme):
    """WCAG AA: 4.5 for text, 3 for bars against their track."""
    pairs = [("ink", "page"), ("ink", "card"), ("dim", "page"), ("dim", "card"), ("dim", "soft")]
    pairs += [("accent", "card"), ("accent", "notice"), ("on-accent", "accent"), ("ink", "notice")]
    pairs += [(k, f"{k}-soft") for k in ("good", "warn", "bad")]
    for ink, paper in pairs:
        assert contrast_of(scheme, ink, paper) >= 4.5, (ink, paper)
    for bar in ("accent", "warn", "bad"):
        assert contrast_of(scheme, bar, "soft") >= 3, bar


@pytest.mark.slow
@in_browser
def test_in_a_browser_hostile_names_do_nothing_and_a_phone_is_wide_enough(tmp_path, profile):
    """A frame of 390 px measures the page, which has no script of its own."""
    status = fakes.proposal([HOSTILE, *fakes.CLASSES[1:]]) | {"device": HOSTILE}
    for name, found in (("hostile", status), ("plain", fakes.proposal())):
        (tmp_path / f"{name}.html").write_text(page.render(found, may_command=True))
    frames = "".join(
        f"<iframe id={name} src={name}.html width=390 height=800></iframe>"
        for name in ("hostile", "plain")
    )
    outer = f"""<!doctype html>{frames}<p id=w></p><script>onload = () => {{ w.textContent = JSON.stringify(
    [hostile, plain].map(f => f.contentDocument).map(
    d => [d.documentElement.scrollWidth, d.title.includes("script"), d.querySelectorAll("script, img").length]))
    }}</script>"""
    (tmp_path / "outer.html").write_text(outer)
    url = (tmp_path / "outer.html").as_uri()
    dom = chromium(profile, url, "--allow-file-access-from-files", "--dump-dom")
    text = re.search(r'<p id="w">(.*?)</p>', dom)[1]
    assert json.loads(text) == [[390, True, 0], [390, False, 0]]
