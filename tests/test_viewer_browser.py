"""The neuron browser in a real one: every page, sort and search, live text, steering, the export from disk.

No console error, and no serious finding of axe-core, in both themes. With `SCREENSHOTS=FOLDER` the
pages of `RUN` (a run directory) are kept as pictures: those in `docs/`.
"""

import contextlib
import os
import re
import socket
import threading
from pathlib import Path

import pytest
from viewer_runs import small_run

from cratelm.results.views import LayerQuery
from cratelm.viewer.run_reader import Library
from cratelm.viewer.security import Rate
from cratelm.viewer.static_site import export

pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `viewer` is not installed")


ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
SERIOUS = {"serious", "critical"}
TEXT = "river <script>alert(1)</script> import stone"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    given = os.environ.get("RUN")
    return Path(given) if given else small_run(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def library(run) -> Library:
    library = Library([run])
    library.index_of(library.keys[0]).build()
    return library


@pytest.fixture(scope="module")
def address(library):
    """Of the real server, in a thread."""
    from cratelm.viewer import server
    from cratelm.viewer.live import Live
    from cratelm.viewer.live_endpoints import router

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    live = Live(library)
    app = server.application(library, live=router(live), rate=Rate(1e9, 1e9))
    serving = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    serving.should_exit = True
    thread.join()
    live.close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        path = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists()), None)  # fmt: skip
        if path is None:
            pytest.fail("no chromium found: `make test-browser` installs it")
        browser = p.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page that fails the test on an error in the console, or a request elsewhere."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    page, problems = context.new_page(), []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") and "responded with a status of 4" not in m.text else None)  # fmt: skip
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not re.match(r"(http://127\.0\.0\.1|file:|data:|blob:)", r.url) else None)  # fmt: skip
    page.on("dialog", lambda d: problems.append(d.message))
    yield page
    context.close()
    assert problems == []


def serious_findings(page):
    """Of axe-core: rule, element and why."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"preload": False}).response["violations"]
    return [
        (v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:300])
        for v in found
        if v["impact"] in SERIOUS
    ]


def names(library):
    """Key of the run, a model, and the best explained neuron of layer 1 that is neither first nor last."""
    key = library.keys[0]
    found = library.layer(key, "crate-2l", 1, LayerQuery())
    inner = [r for r in found.rows if r.explanation and 0 < r.index < found.n_neurons - 1]
    return key, "crate-2l", inner[0].index


def addresses(library):
    key, model, index = names(library)
    return {
        "overview": "/",
        "layer": f"/r/{key}/layer/{model}/1",
        "neuron": f"/r/{key}/neuron/{model}/1/{index}",
        "search": f"/r/{key}/search?q=fires",
        "compare": f"/r/{key}/compare?left={model}/1/{index}",
        "compare-layers": f"/r/{key}/compare?left={model}/1",
        "live": f"/r/{key}/live?model={model}",
        "error": f"/r/{key}/neuron/{model}/1/99999",
    }


PAGES = ("overview", "layer", "neuron", "search", "compare", "compare-layers", "live", "error")


def until(page, expression, arg=None):
    """Waits for it to be true: the pages' policy forbids what playwright waits with."""
    for _ in range(100):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"never true: {expression}")


def settled(page, name):
    if name == "live":
        until(page, "document.querySelectorAll('#chances tr').length > 0")
        until(page, "document.querySelectorAll('#costs tr').length > 0 || !document.querySelector('#missing').hidden")  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_pages_are_accessible(page, address, library, name, theme):
    page.emulate_media(color_scheme=theme)
    page.goto(address + addresses(library)[name])
    settled(page, name)
    assert serious_findings(page) == []
    if os.environ.get("SCREENSHOTS") and name not in ("error", "compare-layers", "search"):
        suffix = "" if theme == "light" else "-dark"
        folder = Path(os.environ["SCREENSHOTS"])
        page.screenshot(path=folder / f"view-{name}{suffix}.png")
        if name == "layer":
            page.locator("svg.map").scroll_into_view_if_needed()
            _, x, y = point(page, 5)
            page.mouse.move(x, y)
            until(page, "document.querySelector('#map-neuron .text') !== null")
            page.locator("#mapbox").screenshot(path=folder / f"view-map{suffix}.png")


@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_a_phone(page, address, library, name):
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto(address + addresses(library)[name])
    settled(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_nothing_of_the_corpus_acts(page, address, library):
    key, model, _ = names(library)
    for index in range(12):
        page.goto(f"{address}/r/{key}/neuron/{model}/1/{index}?all=1")
    assert page.evaluate("document.querySelectorAll('main img, main iframe').length") == 0


def test_sorting_and_filtering_a_layer(page, address, library):
    key, model, _ = names(library)
    page.goto(f"{address}/r/{key}/layer/{model}/1")
    page.get_by_role("link", name="maximum").click()
    values = page.eval_on_selector_all("tbody tr td:last-child", "cells => cells.map(c => Number(c.dataset.value))")  # fmt: skip
    assert values == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("maximum")
    page.get_by_role("link", name="maximum").click()
    values = page.eval_on_selector_all("tbody tr td:last-child", "cells => cells.map(c => Number(c.dataset.value))")  # fmt: skip
    assert values == sorted(values)
    page.get_by_label("show").select_option("explained")
    page.get_by_role("button", name="filter").click()
    assert "only=explained" in page.url
    assert page.locator("tbody tr").count() > 0
    page.locator("svg.map a").first.press("Enter")
    page.wait_for_url("**/neuron/**")


def open_map(page, address, library):
    key, model, _ = names(library)
    page.goto(f"{address}/r/{key}/layer/{model}/1")
    page.locator("svg.map").scroll_into_view_if_needed()
    return page.locator("#map-neuron")


def view_box(page):
    return [float(v) for v in page.locator("svg.map").get_attribute("viewBox").split()]


def point(page, number):
    """Of the map: index, middle on the screen."""
    node = page.locator("svg.map .n").nth(number)
    box = node.locator("circle").bounding_box()
    index = int(node.get_attribute("aria-label").split()[1])
    return index, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_hovering_a_map_shows_the_neuron(page, address, library):
    key, model, _ = names(library)
    panel = open_map(page, address, library)
    index, x, y = point(page, 5)
    page.mouse.move(x + 1, y)
    until(page, "document.querySelector('#map-neuron .line') !== null")
    details = library.map_details(key, model, 1)
    assert panel.locator(".head").inner_text().startswith(f"neuron {index}")
    assert panel.locator(".line span").count() == len(details["excerpts"][5])
    assert panel.locator(".line .peak").count() == 1
    assert panel.locator(".line .peak.l10").count() == 1
    assert "".join(details["words"][w] for w in details["excerpts"][5]) in panel.locator(".line").text_content()  # fmt: skip
    assert panel.locator(".text").text_content() == (details["text"][5] or "not explained")
    assert page.locator("svg.map title").count() == 0  # no second, native tooltip
    page.mouse.click(x, y)
    page.wait_for_url(f"**/neuron/{model}/1/{index}")


def test_a_map_by_keyboard(page, address, library):
    panel = open_map(page, address, library)
    page.locator(".legend button").last.focus()
    stops = page.locator("svg.map [tabindex='0']")
    assert stops.count() == 1
    stops.focus()
    first = panel.locator(".head").inner_text()
    until(page, "document.querySelector('#map-neuron .text') !== null")
    seen = {first}
    for key in ("ArrowRight", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
        seen.add(panel.locator(".head").inner_text())
    assert len(seen) > 3
    assert page.locator("svg.map [tabindex='0']").count() == 1
    whole = view_box(page)
    page.keyboard.press("+")
    zoomed = view_box(page)
    assert zoomed[2] == pytest.approx(whole[2] / 1.5)
    x, _, width, _ = zoomed
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Shift+ArrowLeft")
    assert view_box(page)[0] <= x
    for _ in range(12):  # the point in focus stays in view
        page.keyboard.press("+")
        page.keyboard.press("ArrowDown")
    x, y, width, height = view_box(page)
    inside = page.evaluate("(() => { const c = document.activeElement.querySelector('circle'); return [c.cx.baseVal.value, c.cy.baseVal.value]; })()")  # fmt: skip
    assert x <= inside[0] <= x + width
    assert y <= inside[1] <= y + height
    assert width == pytest.approx(whole[2] / 12)
    page.keyboard.press("0")
    assert view_box(page) == whole
    page.keyboard.press("Enter")
    page.wait_for_url("**/neuron/**")


def test_a_map_is_zoomed_and_dragged(page, address, library):
    open_map(page, address, library)
    whole = view_box(page)
    box = page.locator("svg.map").bounding_box()
    x, y = box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"]
    page.mouse.move(x, y)
    page.mouse.wheel(0, -200)  # scrolls the page: the map is not in use
    page.wait_for_timeout(100)
    assert view_box(page) == whole
    assert "hold Ctrl" in page.locator("#map-hint").inner_text()
    page.get_by_role("button", name="zoom in").click()
    page.get_by_role("button", name="zoom in").click()
    zoomed = view_box(page)
    assert zoomed[2] == pytest.approx(whole[2] / 2.56)
    radius = page.locator("svg.map circle").first.bounding_box()["width"]
    assert radius < 20  # points do not grow with the map
    page.locator("svg.map").scroll_into_view_if_needed()
    box = page.locator("svg.map").bounding_box()
    x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 60, y - 30, steps=4)
    page.mouse.up()
    moved = view_box(page)
    assert moved[0] > zoomed[0]
    assert moved[1] > zoomed[1]
    assert "/layer/" in page.url  # a drag opens no neuron
    page.mouse.wheel(0, -300)
    until(page, "width => document.querySelector('svg.map').viewBox.baseVal.width < width", arg=moved[2] - 1)  # fmt: skip
    page.get_by_role("button", name="whole map").click()
    assert view_box(page) == whole


def test_one_group_of_a_map(page, address, library):
    open_map(page, address, library)
    button = page.locator(".legend button").first
    number = int(button.locator(".faint").inner_text())
    button.click()
    page.mouse.move(2, 2)
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator("svg.map.filtered .n.on").count() == number
    assert serious_findings(page) == []
    button.click()
    button.evaluate("b => b.blur()")
    page.mouse.move(2, 2)
    assert page.locator("svg.map.filtered").count() == 0


def test_searching_by_keyboard(page, address, library):
    page.goto(address)
    page.keyboard.press("/")
    page.keyboard.type("fires")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?q=fires")
    key, model, index = names(library)
    tokens = library.neuron(key, model, 1, index, "fit").tokens
    token = next(t.text for t in tokens if t.text.isalnum() and t.count > 1)
    assert page.locator("tbody tr").count() > 0
    page.get_by_label("fires on the token").fill(token)
    page.get_by_label("explanation contains").fill("")
    page.get_by_role("button", name="find").click()
    page.wait_for_url("**/search?token=*")
    assert page.locator("tbody tr").count() > 0
    page.locator("tbody a").first.click()
    assert "/neuron/" in page.url


def test_a_neuron_by_keyboard(page, address, library):
    key, model, index = names(library)
    page.goto(f"{address}/r/{key}/neuron/{model}/1/{index}")
    line = page.locator(".excerpt").first
    assert line.locator(".line.true").is_visible()
    assert not line.locator(".line.simulated").is_visible()
    page.keyboard.press("t")
    assert line.locator(".line.simulated").is_visible()
    assert not line.locator(".line.true").is_visible()
    page.keyboard.press("t")
    assert line.locator(".line.simulated").is_visible()
    assert line.locator(".line.true").is_visible()
    page.locator(".line.true .peak").first.click()
    assert float(page.locator("#tip").inner_text()) > 0
    page.keyboard.press("j")
    page.wait_for_url(f"**/{index + 1}")
    page.keyboard.press("k")
    page.wait_for_url(f"**/{index}")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.locator("#keys").wait_for(state="hidden")
    page.keyboard.press("u")
    page.wait_for_url(f"**/layer/{model}/1")


def test_taking_a_neuron_along(chromium, page, address, library):
    key, model, index = names(library)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page.goto(f"{address}/r/{key}/neuron/{model}/1/{index}")
    page.get_by_role("button", name="copy JSON").click()
    page.get_by_text("copied").wait_for()
    assert f'"index": {index}' in page.evaluate("navigator.clipboard.readText()")
    page.get_by_role("button", name="copy LaTeX").click()
    until(page, "navigator.clipboard.readText().then(t => t.includes('begin{figure}'))")
    with page.expect_download() as download:
        page.get_by_role("button", name="save PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as download:
        page.get_by_role("link", name="SVG card").click()
    assert Path(download.value.path()).read_text().startswith("<svg")


def test_the_theme_is_remembered(page, address):
    page.goto(address)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="dark theme").click()
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after


def test_typing_a_text(page, address, library):
    key, model, index = names(library)
    page.goto(f"{address}/r/{key}/live?model={model}&layer=1&neuron={index}")
    settled(page, "live")
    page.get_by_label("Text").fill(TEXT)
    until(page, "document.querySelector('#tokens').textContent.includes('stone')")
    assert "<script>" in page.locator("#tokens").inner_text()
    until(
        page,
        "document.querySelector('#at').textContent === [...document.querySelectorAll('#tokens [role=button]')].pop().textContent",
    )
    token = page.locator("#tokens [role=button]").nth(1)
    token.focus()
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#strongest tr').length > 3")
    until(page, "document.querySelectorAll('#tokens [role=button]')[1].className.includes('peak')")
    until(
        page,
        "document.querySelector('#at').textContent === document.querySelectorAll('#tokens [role=button]')[1].textContent",
    )
    before = page.locator("#tokens [role=button]").evaluate_all("all => all.map(t => t.title)")
    page.get_by_label("neuron").first.fill(str(index + 1))
    until(page, "before => JSON.stringify([...document.querySelectorAll('#tokens [role=button]')].map(t => t.title)) !== JSON.stringify(before)", arg=before)  # fmt: skip
    assert f"neuron={index + 1}" in page.url
    page.reload()
    settled(page, "live")
    assert page.get_by_label("Text").input_value() == TEXT
    until(page, "document.querySelectorAll('#strongest tr').length > 3")
    chosen = page.locator("#strongest tr").nth(2).locator("td")
    layer, neuron = (chosen.nth(n).inner_text() for n in (0, 1))
    neuron = neuron.split()[0]  # then the button's name
    page.locator("#strongest tr").nth(2).get_by_role("button").click()
    until(page, "n => location.search.includes(n)", arg=f"layer={layer}&neuron={neuron}&")
    until(page, "n => document.querySelector('#page').href.endsWith(n)", arg=f"/{layer}/{neuron}")


def test_without_a_neuron_the_strongest_at_the_last_token_is_taken(page, address, library):
    key, model, index = names(library)
    page.goto(f"{address}/r/{key}/live?model={model}")
    settled(page, "live")
    first = page.locator("#strongest tr").first.locator("td")
    place = [first.nth(0).inner_text(), first.nth(1).inner_text().split()[0]]
    assert [page.locator(f"#{name}").input_value() for name in ("layer", "neuron")] == place
    shaded = page.locator("#tokens [role=button]").last
    assert float(shaded.get_attribute("title")) == pytest.approx(float(first.nth(3).inner_text()))
    page.goto(f"{address}/r/{key}/live?model={model}&layer=1&neuron={index}")
    settled(page, "live")
    assert page.locator("#neuron").input_value() == str(index)


def test_steering_with_the_slider(page, address, library):
    key, model, index = names(library)
    page.goto(f"{address}/r/{key}/live?model={model}&layer=1&neuron={index}")
    settled(page, "live")
    page.get_by_label("Text").fill("river stone import")
    kl = page.locator("#kl")
    page.get_by_label("operation").select_option("add")
    page.wait_for_timeout(600)
    page.get_by_label("value").evaluate("s => { s.value = s.max; s.dispatchEvent(new Event('input', {bubbles: true})); }")  # fmt: skip
    page.wait_for_timeout(600)
    strong = float(re.search(r"by ([\d.e+-]+) nats", kl.inner_text()).group(1))
    page.get_by_label("operation").select_option("scale")
    page.get_by_label("value").evaluate("s => { s.value = 1; s.dispatchEvent(new Event('input', {bubbles: true})); }")  # fmt: skip
    until(page, "document.querySelector('#kl').textContent.includes('by 0.00 nats')")
    assert strong > 0
    assert page.locator("#plain").inner_text() == page.locator("#steered").inner_text()


def test_a_model_next_to_itself_on_explanations(page, address, library):
    key, model, _ = names(library)
    page.goto(f"{address}/r/{key}/live?model={model}")
    settled(page, "live")
    page.get_by_label("Text").fill(TEXT)
    until(page, "document.querySelector('#losses').textContent.includes('stone')")
    tokens = page.locator("#losses [role=button]")
    differences = [float(re.search(r"[+−][\d.]+", t.get_attribute("title"))[0].replace("−", "-")) for t in tokens.all()[:-1]]  # fmt: skip
    until(page, "document.querySelectorAll('#losses .peak').length === 1")
    chosen = tokens.evaluate_all("all => all.findIndex(t => t.classList.contains('peak'))")
    assert differences[chosen] == max(differences)  # at first the token at which most is lost
    for number in (2, tokens.count() - 1):
        tokens.nth(number).focus()
        page.keyboard.press("Enter")
        until(page, "n => document.querySelectorAll('#losses [role=button]')[n].className.includes('peak')", arg=number)  # fmt: skip
        until(page, "document.querySelector('#target').textContent === document.querySelector('#losses .peak').textContent")  # fmt: skip
        assert page.evaluate("document.activeElement === document.querySelector('#losses .peak')")
    assert page.locator("#target").inner_text() == "…"
    assert "the model's first choice" in page.locator("#both").inner_text()
    tokens.nth(2).click()
    until(page, "document.querySelectorAll('#losses [role=button]')[2].className.includes('peak')")
    until(page, "document.querySelector('#target').textContent === document.querySelector('#losses .peak').textContent")  # fmt: skip
    assert page.locator("#predictions tr.actual").count() == 1
    cost = float(re.search(r"\(([+−][\d.]+)\)", page.locator("#both").inner_text())[1].replace("−", "-"))  # fmt: skip
    others = float(re.search(r"together: ([+−][\d.]+)", page.locator("#rest").inner_text())[1].replace("−", "-"))  # fmt: skip
    nats = [float(t.replace("−", "-")) for t in page.locator("#costs td:first-child").all_inner_texts()]  # fmt: skip
    assert nats == sorted(nats, reverse=True)
    assert sum(nats) + others == pytest.approx(cost, abs=0.01 + 0.005 * len(nats))
    assert "Only the explanations of layer 1 decide" in page.locator("#rest").inner_text()
    assert page.locator("#costs a").first.get_attribute("href").startswith(f"/r/{key}/neuron/{model}/1/")  # fmt: skip
    page.locator("#model").select_option("crate-2l-init")
    until(page, "document.querySelector('#explained').hidden")
    assert f"--model {model}-init` first" in page.locator("#missing").inner_text()
    page.locator("#model").select_option("gpt2-2l")
    until(page, "document.querySelector('#missing').hidden && document.querySelectorAll('#costs tr').length > 0")  # fmt: skip


def test_the_servers_sentence_is_shown(page, address, library):
    key, model, _ = names(library)
    page.goto(f"{address}/r/{key}/live?model={model}&layer=1")
    settled(page, "live")
    page.get_by_label("neuron").first.fill("99999")
    until(page, "document.querySelector('#status').textContent.includes('has no neuron 99999')")
    page.get_by_label("neuron").first.fill("1")
    page.get_by_label("Text").fill("")
    until(page, "document.querySelector('#status').textContent.includes('Enter a text')")


def test_a_late_answer_about_an_earlier_neuron_is_not_shown(page, address, library):
    key, model, _ = names(library)
    page.goto(f"{address}/r/{key}/live?model={model}&layer=1")
    settled(page, "live")
    held = []
    page.route("**/live/activations", lambda route: held.append(route))
    page.get_by_label("neuron").first.fill("99999")
    for _ in range(50):
        if held:
            break
        page.wait_for_timeout(100)
    page.get_by_label("Text").fill("")
    until(page, "document.querySelector('#status').textContent.includes('Enter a text')")
    with contextlib.suppress(playwright.Error):  # the page has cancelled it
        held[0].continue_()
    page.wait_for_timeout(1000)
    assert "Enter a text" in page.locator("#status").inner_text()


def test_an_export_from_disk(page, library, tmp_path):
    export(library, tmp_path / "out", 6, False)
    key, model, _ = names(library)
    page.goto(f"file://{tmp_path / 'out' / 'index.html'}")
    page.get_by_role("link", name=f"{model}, layer 1", exact=True).click()
    page.get_by_role("button", name="maximum").click()
    values = page.eval_on_selector_all("tbody tr td:last-child", "cells => cells.map(c => Number(c.dataset.value))")  # fmt: skip
    assert values == sorted(values, reverse=True)
    cells = page.locator("tbody td.text").all_inner_texts()
    page.get_by_label("filter").fill(next(c.split()[0] for c in cells if len(c) > 10))
    shown = page.locator("tbody tr:visible").count()
    assert 0 < shown < len(values)
    assert page.locator("svg.map g.n").count() > 6  # neurons without a page are described, too
    page.locator("svg.map g.n").first.focus()
    until(page, "document.querySelector('#map-neuron .text') !== null")
    assert page.locator("#map-neuron .line span").count() > 0
    assert page.locator("#map-neuron a").count() == 0
    page.locator("tbody tr:visible a").first.click()
    page.wait_for_url("**/neuron/**")
    page.locator(".excerpt").nth(3).wait_for()
    page.get_by_label("simulated by").check()
    assert page.locator(".line.simulated").first.is_visible()
    assert serious_findings(page) == []
    assert key in page.url
