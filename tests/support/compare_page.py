"""What a person does on the compare tab, and where they look."""

import json
import re
from collections.abc import Sequence
from typing import Any

from browser import PATIENCE_MS
from playwright.sync_api import Locator, Page, Route, expect

KEY = "browser-0123456789abcdef"
DONE = re.compile("^Done")
RATIOS = [0.78, 0.87, 1.14, 0.84, 1.00, 1.34, 0.95, 1.02, 0.9, 1.1, 0.99]
"""Speed ratios of one prompt, as one run after the other gives them on a busy machine."""


def give_key(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use key").click()


def fill(
    page: Page,
    prompt: str = "Once upon a time",
    max_tokens: int = 40,
    temperature: float = 0,
    **options: object,
) -> None:
    """Fill the form for a text; `options` are fields by their labels, with _ for a blank."""
    page.get_by_role("radio", name="Text").check()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    settings(page, max_tokens=max_tokens, temperature=temperature, **options)


def settings(page: Page, *, max_tokens: int = 40, temperature: float = 0, **options: object) -> None:
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_label("Temperature").fill(str(temperature))
    if not page.get_by_label("Top p").is_visible():
        page.get_by_text("More options").click()
    page.get_by_label("Go on after the end of text").check()
    for label, value in options.items():
        page.get_by_label(label.replace("_", " ")).fill(str(value))


def start(page: Page) -> None:
    press(page, "Run")


def run(page: Page) -> None:
    """Start a run and wait for its end."""
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)


def press(page: Page, name: str) -> None:
    page.locator("#tab-compare").get_by_role("button", name=name, exact=True).click()


def card(page: Page, variant: str) -> Locator:
    return page.locator(f".card[data-variant={variant}]")


def figure(page: Page, label: str) -> tuple[Locator, Locator]:
    """A figure of the variant against the baseline, and what is said of it."""
    found = page.locator(".strip .figure").filter(has=page.get_by_text(label, exact=True))
    return found.locator(".value"), found.locator(".unit")


def history(page: Page) -> Locator:
    return page.locator("#history-rows tr")


def answer_with(
    page: Page, ratios: Sequence[float | None], speeds: Sequence[float | None] = (100.0, 100.0)
) -> list[Any]:
    """Timed comparisons come back with these speed ratios, one after the other; the bodies that were sent."""
    sent, left = [], list(ratios)

    def handle(route: Route) -> None:
        body = route.request.post_data_json
        sent.append(body)
        *events, last, done, end = route.fetch(timeout=PATIENCE_MS).text().split("\n\n")
        answer = json.loads(last.removeprefix("data: "))
        if not body["parallel"]:
            answer["results"][1]["against_baseline"]["tokens_per_second_ratio"] = left.pop(0)
            for result, speed in zip(answer["results"], speeds, strict=True):
                result["lowkey"]["tokens_per_second"] = speed
        text = "\n\n".join([*events, f"data: {json.dumps(answer)}", done, end])
        route.fulfill(body=text, content_type="text/event-stream")

    page.route("**/v1/compare", handle)
    return sent


def evaluate(page: Page, module: str, expression: str, *arguments: object) -> Any:
    """The value of an expression of one of the page's modules, which it knows as `m`, and of `args`."""
    file = page.locator("script[src]").get_attribute("src")
    assert file is not None
    script = f"async ([file, args]) => {{ const m = await import(`/${{file}}`); return {expression}; }}"
    return page.evaluate(script, [file.replace("app.js", module), list(arguments)])
