"""The page, in a headless Chromium."""

import shutil

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Error, expect, sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=["--no-sandbox"],
            )
        except Error:
            pytest.skip("there is no Chromium; install one, or run: playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.set_default_timeout(5000)
    page.hosts = set()
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
    page.goto(server.url)
    page.wait_for_selector("#source option", state="attached")  # the languages have come
    yield page
    page.close()


def translate(page, text, source="en", target="aa"):
    page.get_by_label("From").select_option(source)
    page.get_by_label("To", exact=True).select_option(target)
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#capacity")).to_be_visible()


def test_a_text_its_translation_and_the_passes_of_its_tokens(page, server):
    translate(page, "en1 en2 en3")
    expect(page.locator("#translation")).to_have_text(server.translate("en1 en2 en3"))
    answer = server.ask(
        fields={"q": "en1 en2 en3", "source": "en", "target": "aa", "capacity": True}
    ).json
    shown = page.locator("#mean-encoder"), page.locator("#mean-decoder")
    for cell, side in zip(shown, ("encoder", "decoder")):
        mean = answer["capacity"][0][side]["mean"]
        assert float(cell.inner_text()) == pytest.approx(mean, abs=0.006)
    tokens = [t for side in ("encoder", "decoder") for t in answer["capacity"][0][side]["tokens"]]
    elements = page.locator(".tokens .token").all()
    assert len(elements) == len(tokens)
    highest = max(2, *(p for token in tokens for p in token["passes"]))
    for element, token in zip(elements, tokens):
        passes = sum(token["passes"]) / len(token["passes"])
        step = round((passes - 1) / (highest - 1) * 3)
        assert f"step{step}" in element.get_attribute("class")
        assert element.get_attribute("aria-label").endswith(f": {passes:g} passes")
    # one layer of the encoder: the decoder's tokens are not in it
    page.get_by_label("Layers").select_option("encoder 0")
    assert elements[-1].get_attribute("aria-label").endswith("not in this layer")
    assert page.problems == [] and page.hosts == {f"127.0.0.1:{server.port}"}


def test_the_experts_of_a_token_by_keyboard(page):
    translate(page, "en1 en2")
    first = page.locator(".tokens .token").first
    first.focus()
    details = page.locator("#details")
    expect(details).to_contain_text("encoder, layer 2: expert")
    before = details.inner_text()
    for _ in range(20):
        page.keyboard.press("Tab")
        if details.inner_text().startswith("decoder"):
            break
    assert details.inner_text() != before and "decoder" in details.inner_text()


def test_it_can_be_used_without_a_mouse(page):
    page.get_by_label("Text").focus()
    page.keyboard.type("en1 en2")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#translation")).not_to_be_empty()
    page.get_by_role("button", name="Swap languages").focus()
    source = page.get_by_label("From").input_value()
    page.keyboard.press("Enter")
    assert page.get_by_label("To", exact=True).input_value() == source


def test_only_trained_directions_are_offered(page):
    page.get_by_label("From").select_option("aa")
    options = page.get_by_label("To", exact=True).locator("option").all()
    assert [option.get_attribute("value") for option in options] == ["en"]


def test_errors_are_told(page, server):
    page.get_by_label("Text").fill("en1 " * 6000)
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#status")).to_contain_text("at most 20,000")
    page.get_by_label("Text").fill("  ")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#status")).to_have_text("Type a text to translate.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_cut_and_all_text_can_be_read(scheme, width, browser, server):
    page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
    page.goto(server.url)
    translate(page, "en1 en2 en3 en4 en5 " * 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for contrast, text in page.evaluate(CONTRASTS):
        assert contrast >= 4.5, text
    for field in page.locator("select, textarea, button").all():
        assert field.evaluate("e => e.labels?.length || e.textContent || e.ariaLabel")
    page.close()


# contrast of every text with the colour behind it (WCAG 2)
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("h1, h2, h3, p, label, button, select, textarea, .token, .sample, td, th, caption")]
    .filter((element) => element.textContent.trim() && element.checkVisibility())
    .map((element) => {
      const [a, b] = [numbers(getComputedStyle(element).color), behind(element)].map(light);
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 80)];
    });
}"""
