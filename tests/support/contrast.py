"""Contrast of text on a page, as WCAG 2.2 defines it."""

from playwright.sync_api import Page

_MEASURE = """() => {
  const parse = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => value * a + under[i] * (1 - a));
  const backgroundOf = (node) => {
    if (!node) return [255, 255, 255];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, backgroundOf(node.parentElement));
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    const words = text.textContent.trim().slice(0, 40);
    const visible = node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!words || !visible || node.closest(":disabled, noscript")) continue;
    seen += 1;
    const style = getComputedStyle(node);
    const background = backgroundOf(node);
    const ink = over(parse(node.namespaceURI.endsWith("svg") ? style.fill : style.color), background);
    const [dark, light] = [luminance(ink), luminance(background)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)}: ${node.tagName} ${words}`);
  }
  return [seen, low];
}"""


def low_contrast(page: Page) -> tuple[int, list[str]]:
    """How many visible texts there are, and those whose contrast is below 4.5 to 1, or 3 to 1 where they are large.
    What is disabled counts as no text."""
    seen, low = page.evaluate(_MEASURE)
    return seen, low
